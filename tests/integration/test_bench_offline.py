"""`baton bench throughput` and `baton bench latency` over a tiny model, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

SMALL = ["--load-format", "dummy", "--max-model-len", "256", "--num-blocks", "64", "--threads", "1"]


def bench(*words: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_throughput_counts_what_was_generated(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    work = ["--num-prompts", "5", "--input-len", "20", "--output-len", "7", "--n", "2"]
    out = bench("throughput", "--model", str(tiny_model), *SMALL, *work, "--output-json", str(file))
    throughput, prompts, outputs = out.splitlines()
    assert throughput.startswith("Throughput: ")
    assert prompts == "Total num prompt tokens:  100"
    assert outputs == "Total num output tokens:  70"
    saved = json.loads(file.read_text())
    assert saved["num_requests"] == 5
    assert saved["total_num_tokens"] == 170
    assert saved["tokens_per_second"] * saved["elapsed_time"] == 170


def test_throughput_over_recorded_conversations(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "conversations.json"
    turns = [
        {"from": "human", "value": "How many words are there in this question?"},
        {"from": "gpt", "value": "Eight."},
    ]
    data.write_text(json.dumps([{"conversations": turns}] * 3))
    work = ["--dataset-name", "sharegpt", "--dataset-path", str(data), "--num-prompts", "3"]
    out = bench("throughput", str(tiny_model), *SMALL, *work, "--sharegpt-output-len", "9")
    assert out.splitlines()[-1] == "Total num output tokens:  27"


def test_latency_has_percentiles(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    work = ["--batch-size", "2", "--input-len", "8", "--output-len", "4", "--num-iters", "3", "--num-iters-warmup", "1"]
    lines = bench("latency", str(tiny_model), *SMALL, *work, "--output-json", str(file)).splitlines()
    assert lines[0].startswith("Avg latency: ")
    assert [line.split("%")[0] for line in lines[1:]] == ["10", "25", "50", "75", "90", "99"]
    saved = json.loads(file.read_text())
    assert len(saved["latencies"]) == 3
    assert min(saved["latencies"]) <= saved["avg_latency"] <= max(saved["latencies"])
