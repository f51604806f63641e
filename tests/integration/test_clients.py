"""Third-party clients, in an environment of their own that is made the first time: tests/clients/README.md."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_chat_clients_and_schemathesis() -> None:
    run = subprocess.run(
        [str(ROOT / "scripts/test_clients"), "chat"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, run.stdout
