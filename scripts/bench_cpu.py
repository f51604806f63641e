"""CPU figures of the project, as ratios from one run: Baton beside a plain transformers loop on the same weights.

    .venv/bin/python scripts/bench_cpu.py [--rounds 3] [--output-json FILE]

SmolLM2-135M float32, 32 requests at once of 100 tokens in and 128 out, prefix cache off, and one stream alone. The
reference decodes in a loop at batch 32, its prefill not counted; Baton's rates are end to end over HTTP, prefill
included. Rounds interleave everything and the medians are compared, because the machine may be shared.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BATCH, INPUT, OUTPUT = 32, 100, 128
ALONE_OUTPUT = 64
START_TIMEOUT_S = 120
REFERENCE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
path, batch, length, steps = sys.argv[1], *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
ids = torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(steps):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    print(json.dumps(batch * steps / (time.perf_counter() - started)))
"""


def reference(model: Path, batch: int, steps: int) -> float:
    """Output tokens per second of a transformers decode loop; 2 threads, default settings."""
    command = [sys.executable, "-c", REFERENCE, str(model), *map(str, (batch, INPUT, steps))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """URL of a `baton serve demo` with these flags."""
    command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "serve", "demo", "--no-enable-prefix-caching"]
    command += ["--host", "127.0.0.1", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"ready at (\S+)", line):
                yield match[1]
                return
        raise RuntimeError("baton serve ended before it was ready")
    finally:
        process.terminate()
        process.wait()


def bench(url: str, prompts: int, output: int, concurrency: int) -> dict[str, float]:
    """Result of `baton bench serve` against `url`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "bench", "serve", "--base-url", url]
        command += ["--num-prompts", str(prompts), "--random-input-len", str(INPUT), "--random-output-len", str(output)]
        command += ["--ignore-eos", "--disable-tqdm", "--max-concurrency", str(concurrency), "--output-json", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())


def together(*flags: str) -> float:
    """Output tokens per second, end to end, of BATCH requests at once."""
    with served(*flags) as url:
        bench(url, 2, 8, 2)
        return bench(url, BATCH, OUTPUT, BATCH)["output_throughput"]


def alone(*flags: str) -> float:
    """Tokens per second of one stream's decoding."""
    with served(*flags) as url:
        bench(url, 1, 8, 1)
        return 1000.0 / bench(url, 1, ALONE_OUTPUT, 1)["median_tpot_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    resolve = [sys.executable, "-P", "-m", "baton.worker.weights.resolve", "demo"]
    model = Path(json.loads(subprocess.run(resolve, check=True, capture_output=True).stdout)["path"])
    work = {
        "transformers, batch 32": lambda: reference(model, BATCH, OUTPUT),
        "unified": lambda: together("--unified", "1"),
        "1 prefill + 1 decode": lambda: together("--prefill", "1", "--decode", "1"),
        "transformers, alone": lambda: reference(model, 1, ALONE_OUTPUT),
        "unified, alone": lambda: alone("--unified", "1"),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(args.rounds):
        for name, measure in work.items():
            rates[name].append(measure())
            print(f"round {round_number + 1}: {name:24s} {rates[name][-1]:7.1f} tok/s", flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        "(a) unified / transformers": median["unified"] / median["transformers, batch 32"],
        "(b) split / unified": median["1 prefill + 1 decode"] / median["unified"],
        "(c) alone / transformers alone": median["unified, alone"] / median["transformers, alone"],
    }
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, rate in median.items():
        print(f"{name:32s} {rate:7.1f} tok/s")
    for name, ratio in ratios.items():
        print(f"{name:32s} {ratio:7.2f}")
    if args.output_json:
        args.output_json.write_text(json.dumps({"rates": rates, "medians": median, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
