#!/usr/bin/env python
"""The GPU table: runs the parts that the rows need, each in processes of its own, and judges the figures.

    scripts/bench_gpu.sh [--rows A1 A2 …] [--seconds 60] [--models DIR] [--out DIR]

DIR of --models holds llama-3.1-8b-shape and qwen3-0.6b-shape. --seconds: Poisson arrivals of B2 to B5. About how long
on an H200: A rows and C1 2 minutes, B rows 6, D1 1, C2 2. Every part also writes JSON into --out as it ends.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).resolve().parent


class Goal(NamedTuple):
    """vLLM 0.26.0 on one H100 80 GB (2026-11-23), what must be reached there, and what can be. More is better if so."""

    vllm: float
    must: float
    aim: float

    def reached(self, value: float) -> str:
        """Which of the two."""
        sign = 1 if self.aim > self.vllm else -1
        return "aim" if sign * value >= sign * self.aim else "must" if sign * value >= sign * self.must else ""


GOALS = {
    "A1 out tok/s": Goal(12_900, 15_500, 18_000),
    "A2 out tok/s": Goal(3_690, 3_750, 3_850),
    "A3 ms/token": Goal(6.52, 5.7, 5.4),
    "A4 tok/s": Goal(42_500, 42_800, 45_000),
    "A5 batch 32 ms": Goal(8.43, 7.95, 7.75),
    "A5 batch 128 ms": Goal(13.80, 13.0, 12.6),
    "A5 batch 256 ms": Goal(21.26, 20.4, 19.8),
    "A5r 31x512+16000 ms": Goal(1.91, 1.9, 1.8),
    "A5r log-normal ms": Goal(9.70, 9.6, 9.2),
    "A6 ms": Goal(217, 213, 200),
    "B1 out tok/s": Goal(11_486, 14_000, 17_000),
    "B1 mean TTFT ms": Goal(2_461, 1_900, 1_500),
    "B1 P99 ITL ms": Goal(256, 150, 80),
    "B2 mean TTFT ms": Goal(50.5, 50, 40),
    "B2 P99 TTFT ms": Goal(83.6, 83, 65),
    "B2 mean TPOT ms": Goal(7.37, 7.2, 6.8),
    "B2 P99 TPOT ms": Goal(8.59, 8.5, 8),
    "B2 P99 ITL ms": Goal(31.0, 18, 15),
    "B3 mean TTFT ms": Goal(57.2, 57, 46),
    "B3 P99 TTFT ms": Goal(107.5, 105, 85),
    "B3 mean TPOT ms": Goal(8.42, 8.2, 7.6),
    "B3 P99 TPOT ms": Goal(10.06, 10, 9),
    "B3 P99 ITL ms": Goal(33.8, 19, 16),
    "B4 mean TTFT ms": Goal(78.3, 78, 62),
    "B4 P99 TTFT ms": Goal(148.0, 145, 120),
    "B4 mean TPOT ms": Goal(11.85, 11, 10),
    "B4 P99 TPOT ms": Goal(16.17, 16, 13),
    "B4 P99 ITL ms": Goal(43.2, 22, 18),
    "B5 req/s": Goal(22.73, 22.9, 23.4),
    "B5 mean TTFT ms": Goal(106.2, 106, 90),
    "B5 P99 TTFT ms": Goal(237.7, 230, 190),
    "B5 mean TPOT ms": Goal(19.44, 18, 16),
    "B5 P99 TPOT ms": Goal(29.27, 28, 24),
    "B5 P99 ITL ms": Goal(82.2, 40, 30),
    "D1 ms/token": Goal(1.76, 1.3, 0.9),
    "D1 HTTP out tok/s": Goal(18_600, 22_000, 30_000),
    "C1 KV tokens": Goal(444_528, 444_528, 444_529),
    "C2 cold s": Goal(207, 60, 40),
    "C2 warm s": Goal(116, 20, 12),
}
PARTS = {
    "offline": ("A1", "A2", "A3", "A4", "A5", "A6", "C1"),
    "attention": ("A5r",),
    "served": ("B1", "B2", "B3", "B4", "B5"),
    "small": ("D1",),
    "start": ("C2",),
}


def run(script: str, out: Path, name: str, *words: str) -> dict[str, float]:
    """Figures that a script writes; what it prints is passed on."""
    path = out / f"{name}.json"
    subprocess.run([sys.executable, str(SCRIPTS / script), *words, "--json", str(path)], check=True)
    figures: dict[str, float] = json.loads(path.read_text())
    return figures


def measure(part: str, rows: list[str], args: argparse.Namespace) -> dict[str, float]:
    """One part's figures."""
    large, small = str(args.models / "llama-3.1-8b-shape"), str(args.models / "qwen3-0.6b-shape")
    if part in ("offline", "attention"):  # two processes: what attention's row leaves in memory would be missing in C1
        return run("bench_gpu_offline.py", args.out, part, large, "--rows", *rows)
    if part == "small":
        figures = run("bench_gpu_offline.py", args.out, "small-offline", small, "--rows", *rows)
        return figures | run("bench_gpu_served.py", args.out, "small-served", small, "--rows", *rows)
    return run("bench_gpu_served.py", args.out, part, large, "--rows", *rows, "--seconds", str(args.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [row for rows in PARTS.values() for row in rows]
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--models", type=Path, default=SCRIPTS.parent.parent / "shared/models")
    parser.add_argument("--out", type=Path, default=Path("build/bench_gpu"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    for part, rows in PARTS.items():
        if wanted := [row for row in rows if row in args.rows]:
            figures |= measure(part, wanted, args)
    device = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[0]
    report = {"device": device, "date": datetime.now(UTC).isoformat(timespec="seconds"), "figures": figures}
    (args.out / "table.json").write_text(json.dumps(report, indent=1))
    print(f"\n{device}, bfloat16, dummy weights\n{'':24}{'here':>12}{'vLLM, H100':>12}{'must':>10}{'aim':>10}")
    for name, value in figures.items():
        goal = GOALS.get(name)
        beside = f"{goal.vllm:>12,g}{goal.must:>10,g}{goal.aim:>10,g}  {goal.reached(value)}" if goal else ""
        print(f"{name:24}{value:>12,.2f}{beside}")


if __name__ == "__main__":
    main()
