"""Many seeds, on all cores."""

import multiprocessing
import os
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from .scenario import Scenario

SEEDS_PER_TASK = 50


@dataclass
class Tally:
    """What came of many seeds."""

    runs: int = 0
    requests: int = 0
    retries: int = 0
    vectors: int = 0
    failures: list[str] = field(default_factory=list)
    """Per failed seed: how to see it again, and the error."""

    def add(self, other: "Tally") -> None:
        """Sum up."""
        self.runs += other.runs
        self.requests += other.requests
        self.retries += other.retries
        self.vectors += other.vectors
        self.failures += other.failures


def run_seeds(seeds: Iterable[int], depth: int, shared: bool = False) -> Tally:
    """One after the other, in this process."""
    tally = Tally()
    for seed in seeds:
        tally.runs += 1
        try:
            report = Scenario(seed, depth, shared).run()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            replay = f"python tests/faults/replay.py {seed} --depth {depth}{' --shared' if shared else ''}"
            tally.failures.append(f"{replay}\n    {where.name}: {type(error).__name__}: {str(error)[:500]}")
        else:
            tally.requests += report.outcomes.total()
            tally.retries += report.retries
            tally.vectors += report.vectors
    return tally


def run_campaign(seeds: range, depth: int, shared: bool = False) -> Tally:
    """Spread over the cores."""
    tasks = [seeds[i : i + SEEDS_PER_TASK] for i in range(0, len(seeds), SEEDS_PER_TASK)]
    tally = Tally()
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(run_seeds, tasks, [depth] * len(tasks), [shared] * len(tasks)):
            tally.add(part)
    return tally
