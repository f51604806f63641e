"""What a newcomer sees first."""

import subprocess
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "scripts" / "demo"


@pytest.mark.slow
def test_the_demo_answers_shows_where_the_time_went_and_ends() -> None:
    done = subprocess.run([DEMO, "--once"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    stages = [line.split()[0] for line in lines if "│" in line]
    assert stages == ["queue", "prefill", "handoff", "decode"]
    assert any(line.startswith("TTFT ") and "tokens/s" in line for line in lines)
    assert "prefill on prefill-0, decode on decode-0" in lines[-1]
    assert "moved by shm" in lines[-1]
