#!/usr/bin/env python
"""Prefill and decode on two GPUs: each step in a process of its own, under a time limit, with a JSON file of its own.

    scripts/bench_two_gpus.sh --part 1|2 [--steps NAME …] [--models DIR] [--out DIR] [--seconds 20] [--dry-run]

Part 1: conformance (the transports' suite between two GPUs), transfer (scattered blocks beside plain copies), handoff
(from the first token to the first decode step, and what chunk-wise transfer of long prompts gains). Part 2: split (1
prefill + 1 decode worker) and unified (two workers that do both) on the works of the table, and the rate up to which
90 % of the requests meet both targets. DIR of --models holds llama-3.1-8b-shape. --dry-run: the demo model on CPU.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import math
import shlex
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from bench_gpu_served import PORT, Server, bench
from bench_transfer import SPLIT, Figures, WatchedServer, handoffs
from prometheus_client.parser import text_string_to_metric_families

SCRIPTS = Path(__file__).resolve().parent
TARGETS = ("--goodput", "ttft:300", "tpot:10")
ENOUGH = 0.9
"""Of the requests meet both targets: then a rate counts."""


@dataclass(frozen=True)
class Scale:
    """How much of everything; the figures of docs/performance.md are FULL."""

    conformance: tuple[str, ...]
    """pytest's selections, one run each."""
    transports: tuple[str, ...]
    sizes_mib: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    """(tokens, how often) of the handoffs."""
    works: tuple[tuple[int, int, float], ...]
    """(prompt tokens, output tokens, requests a second)."""
    sweep: tuple[float, ...]
    """More rates for the first work's lengths, of the split pair."""
    seconds: float
    """Of Poisson arrivals."""


FULL = Scale(
    conformance=(
        "tests/gpu/test_kv_transports.py -k '(BetweenGpus or NcclInManyMessages) and not killed_owners' {parallel}",
        "tests/gpu/test_kv_transports.py -k 'BetweenGpus and killed_owners'",
    ),
    transports=("cuda_ipc", "nccl"),
    sizes_mib=(16, 64, 256, 1024),
    prompts=((4096, 60), (8192, 10), (32768, 6)),
    works=((1024, 128, 8), (1024, 128, 24), (1024, 128, 40), (4096, 256, 8)),
    sweep=(28, 32, 36),
    seconds=20,
)
DRY = Scale(
    conformance=("tests/integration/test_kv_transports.py -k 'TestGloo and scattered' {parallel}",),
    transports=("shm", "gloo"),
    sizes_mib=(16,),
    prompts=((600, 2), (1200, 1)),
    works=((64, 8, 2), (128, 8, 1)),
    sweep=(3,),
    seconds=4,
)


# -------------------------------------------------------------------------------------------------------------- steps


def conformance(args: argparse.Namespace) -> Figures:
    """Passed and failed tests."""
    parallel = "-n 6" if importlib.util.find_spec("xdist") else ""
    passed, failed = 0, []
    for number, selection in enumerate(args.scale.conformance):
        report = args.out / f"conformance-{number}.xml"
        words = f"-q --timeout 60 --junitxml {report} {selection.format(parallel=parallel)}"
        subprocess.run([sys.executable, "-m", "pytest", *shlex.split(words)], check=False, cwd=SCRIPTS.parent)
        for case in ET.parse(report).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            if [each for each in case if each.tag in ("failure", "error", "skipped")]:
                failed.append(name)
            else:
                passed += 1
        report.unlink()
    return {"passed": passed, "failed or skipped": failed}


def transfer(args: argparse.Namespace) -> Figures:
    """GB/s of each transport and of plain copies."""
    path = args.out / "speeds.json"
    sizes = [str(size) for size in args.scale.sizes_mib]
    words = ["--sizes", *sizes, "--transports", *args.scale.transports, "--json", str(path)]
    subprocess.run([sys.executable, str(SCRIPTS / "bench_peer.py"), *words], check=True)
    figures: Figures = json.loads(path.read_text())
    path.unlink()
    return figures


def handoff(args: argparse.Namespace) -> Figures:
    """Prompts one after the other, transferred chunk by chunk while they are computed, and at the end."""
    figures: Figures = {}
    for name, flags in {
        "as by default": "",
        "transferred at the end": "--early-bind-tokens 1000000",
    }.items():
        args.serve_flags = flags if args.dry_run else f"--max-model-len 40960 {flags}"
        with WatchedServer(args, *SPLIT) as server:
            url = server.url
            for tokens, count in args.scale.prompts:
                figures[f"{tokens} tokens, {name}"] = found = handoffs(url, tokens, count, warm_up=2)
                print(tokens, name, json.dumps(found), flush=True)
        (args.out / "handoff.json").write_text(json.dumps(figures, indent=1))
    return figures


def split(args: argparse.Namespace) -> Figures:
    """1 prefill + 1 decode worker."""
    return serving(args, ["--prefill", "1", "--decode", "1"], args.scale.sweep)


def unified(args: argparse.Namespace) -> Figures:
    """Two workers that do both, each request on one of them."""
    return serving(args, ["--unified", "2"], ())


def serving(args: argparse.Namespace, workers: list[str], sweep: tuple[float, ...]) -> Figures:
    """`baton bench serve`'s figures of each work, and of more rates."""
    if not args.dry_run:
        workers += ["--device", "cuda", "--gpus", args.gpus, "--load-format", "dummy", "--max-model-len", "8192"]
    scale: Scale = args.scale
    input_len, output_len, _ = scale.works[0]
    works = [*scale.works, *((input_len, output_len, rate) for rate in sweep)]
    figures: Figures = {}
    with Server(args.model, args.out / f"{args.step}.log", workers=workers) as server:
        figures["ready after, s"] = server.ready_s
        bench(max(2, int(scale.seconds)), input_len, output_len, 16)  # clocks and caches
        for input_len, output_len, rate in works:
            count, before = round(rate * scale.seconds), handoff_sums()
            found = bench(
                count, input_len, output_len, rate, *TARGETS, "--metric-percentiles", "50,90,99", "--save-detailed"
            )
            found["share inside both targets"] = found["request_goodput"] * found["duration"] / count
            found |= gaps(found.pop("itls")) | handoff_means(before, handoff_sums())
            for name in ("ttfts", "input_lens", "output_lens", "errors"):
                del found[name]
            figures[f"{input_len} / {output_len} at {rate:g} req/s"] = found
            print(args.step, input_len, output_len, rate, short(found), flush=True)
            (args.out / f"{args.step}.json").write_text(json.dumps(figures, indent=1))
    inside = [rate for (_, _, rate), found in zip(works, list(figures.values())[1:], strict=True) if good(found)]
    figures["highest rate with enough inside both targets, any lengths, req/s"] = max(inside, default=0)
    return figures


def handoff_sums() -> dict[str, float]:
    """Seconds of all handoffs so far, whole and by part, and how many they were."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    sums: dict[str, float] = collections.defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        name = {
            "baton_handoff_seconds_count": "count",
            "baton_handoff_seconds_sum": "whole",
            "baton_handoff_stage_seconds_sum": f"up to {sample.labels.get('stage')}",
        }.get(sample.name)
        if name:
            sums[name] += sample.value
    return sums


def handoff_means(before: dict[str, float], after: dict[str, float]) -> Figures:
    """Of the handoffs between."""
    count = after.get("count", 0) - before.get("count", 0)
    names = [name for name in after if name != "count"] if count else []
    return {f"handoff, {name}, mean ms": (after[name] - before.get(name, 0)) / count * 1e3 for name in names}


def gaps(itls: list[list[float]]) -> Figures:
    """What P99 ITL is made of, in milliseconds: one gap in as many as a request has tokens spans its handoff."""
    first, later = [gap for each in itls for gap in each[:1]], [gap for each in itls for gap in each[1:]]
    return {
        f"{name} gaps, {percent} %, ms": float(np.percentile(values, percent)) * 1e3
        for name, values in (("first", first), ("later", later))
        for percent in (1, 50, 99, 99.8)
        if values
    }


def good(found: dict[str, float]) -> bool:
    return found["share inside both targets"] >= ENOUGH


def short(found: dict[str, float]) -> str:
    """The columns of the table."""
    columns = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "share inside both targets")
    gaps = ("first gaps, 1 %, ms", "first gaps, 50 %, ms", "later gaps, 99 %, ms", "later gaps, 99.8 %, ms")
    return " / ".join(f"{found.get(column, math.nan):.2f}" for column in (*columns, *gaps))


@dataclass(frozen=True)
class Step:
    """One process."""

    run: Callable[[argparse.Namespace], Figures]
    part: int
    limit_s: int


STEPS = {
    "conformance": Step(conformance, 1, 180),
    "transfer": Step(transfer, 1, 120),
    "handoff": Step(handoff, 1, 210),
    "split": Step(split, 2, 260),
    "unified": Step(unified, 2, 260),
}


# --------------------------------------------------------------------------------------------------------------- main


def run_step(name: str, words: list[str]) -> bool:
    """In a process of its own, which takes what it started with it when it runs over its limit."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--step", name, *words], check=False, timeout=STEPS[name].limit_s
        )
        outcome = f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        outcome = f"was cut off after {STEPS[name].limit_s} s"
    print(f"== {name} {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return outcome == "ended with 0"


def device() -> list[str]:
    """The GPUs, or that there are none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except FileNotFoundError:
        return ["CPU"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="instead of a whole part")
    parser.add_argument("--models", type=Path, default=SCRIPTS.parent.parent / "shared/models")
    parser.add_argument("--out", type=Path, default=Path("build/bench_two_gpus"))
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--seconds", type=float, help="of Poisson arrivals, instead of 20")
    parser.add_argument("--dry-run", action="store_true", help="on CPU")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        args.scale = DRY if args.dry_run else FULL
        if args.seconds:
            args.scale = dataclasses.replace(args.scale, seconds=args.seconds)
        args.device = "cpu" if args.dry_run else "cuda"
        args.model = "demo" if args.dry_run else str(args.models / "llama-3.1-8b-shape")
        figures = STEPS[args.step].run(args)
        figures |= {"device": device(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        (args.out / f"{args.step}.json").write_text(json.dumps(figures, indent=1))
        return 0
    words = ["--models", str(args.models), "--out", str(args.out), "--gpus", args.gpus]
    words += ["--dry-run"] if args.dry_run else []
    words += ["--seconds", str(args.seconds)] if args.seconds else []
    wanted = args.steps or [name for name, step in STEPS.items() if step.part == args.part]
    succeeded = [run_step(name, words) for name in wanted]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
