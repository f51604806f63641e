#!/usr/bin/env python
"""A unified worker's batcher against Poisson arrivals on a virtual clock: latencies that a table of step costs implies.

    python scripts/simulate_steps.py [--rates 8 16 24] [--input-len 1024] [--output-len 128] [--target-itl-ms 15]

Needs no GPU: the batcher and the cost model are the real ones, only the device is a clock. The table is that of an H100
with the 8B shape in bfloat16 (2026-11-26, as the worker logs it at start). `--rates inf` sends 1,000 requests at once;
`--output-len 1` makes it a prefill worker.
"""

import argparse
from collections import defaultdict, deque

import numpy as np

from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.messages import Peer, SamplingParams, StartPrefill
from baton.worker.batcher import Batcher
from baton.worker.effects import Emit
from baton.worker.plan import StepPlan, StepResult
from baton.worker.step_costs import StepCosts

H100_MS = {16: 6.2, 32: 6.3, 48: 6.5, 64: 6.6, 96: 7.2, 128: 7.3, 160: 7.7, 192: 7.9, 224: 8.4, 256: 8.4, 320: 9.7}
H100_MS |= {384: 10.5, 512: 11.9, 640: 14.7, 768: 18.3, 1024: 21.9, 2048: 40.7, 3072: 64.8}
HOT = {32: 1.02, 48: 1.03, 64: 1.015, 96: 1.013, 128: 1.026, 160: 1.01, 192: 1.03, 224: 1.02, 256: 1.02, 320: 1.02}
HOT |= {384: 1.006, 512: 1.048, 640: 1.085, 768: 1.028, 1024: 1.109, 2048: 1.203, 3072: 1.2}
"""What steps took under load at 24 requests a second, beside that table: the GPU is at its power limit."""
HOST_S = 0.0015
"""From planning a step to the device's beginning it."""
GRAPHS_TO, PER_KEY_S, PER_PAIR_S = 1024, 52.6e-9, 0.64e-9
NUM_BLOCKS = 27_000


def h100_costs(hot: bool = False) -> StepCosts:
    table = [(tokens, ms / 1000 * (HOT.get(tokens, 1.0) if hot else 1.0)) for tokens, ms in H100_MS.items()]
    return StepCosts(table, PER_KEY_S, PER_PAIR_S, GRAPHS_TO)


class Clock:
    """One batcher and a device that takes as long as the table says; two steps in flight."""

    def __init__(self, target_itl_ms: float, input_len: int, output_len: int, slower: float, spread: float) -> None:
        self.batcher = Batcher(
            Peer("unified-0", 1, "", ""),
            range(NUM_BLOCKS),
            max_model_len=8192,
            cache=CacheConfig(num_blocks=NUM_BLOCKS, enable_prefix_caching=False),
            batch=BatchConfig(8192, 1024, target_itl_ms, depth=2),
            lease=LeaseConfig(),
            early_bind_tokens=2**31,
            costs=h100_costs(),
        )
        self._device, self._slower, self._spread = h100_costs(hot=True), slower, spread
        self._rng = np.random.default_rng(0)
        self._input_len, self._output_len = input_len, output_len
        self._in_flight: deque[tuple[StepPlan, float, float]] = deque()
        self._free_at = 0.0

    def run(self, arrivals: list[float]) -> tuple[dict[int, list[float]], float]:
        """When each request's tokens came, by its number, and when the last one did."""
        came: dict[int, list[float]] = defaultdict(list)
        waiting, now = deque(enumerate(arrivals)), 0.0
        while True:
            self._launch(now)
            next_arrival = waiting[0][1] if waiting else np.inf
            next_end = self._in_flight[0][2] if self._in_flight else np.inf
            if next_arrival == next_end == np.inf:
                return came, max(times[-1] for times in came.values())
            now = min(next_arrival, next_end, max(now, self.batcher.next_deadline()))
            if next_arrival == now:
                self._arrive(waiting.popleft()[0], now)
            elif next_end == now:
                self._finish(came, now)

    def _arrive(self, number: int, now: float) -> None:
        tokens = np.arange(number, number + self._input_len, dtype=np.int32)  # equal prompts would be computed once
        command = StartPrefill(
            epoch=1,
            cmd_seq=number + 1,
            sid=(1, number),
            attempt=1,
            prompt_len=self._input_len,
            params=SamplingParams(max_tokens=self._output_len),
            reply_to="",
            continue_decode=True,
        )
        self.batcher.handle(command, (tokens.tobytes(), pack_hashes(hash_chain(tokens))), now)

    def _launch(self, now: float) -> None:
        if self.batcher.next_deadline() <= now:
            self.batcher.tick(now)
        while (plan := self.batcher.schedule(now)) is not None:
            keys = sum(row.start + 1 for row in plan.rows if row.num_tokens == 1)
            pairs = sum(row.start * row.num_tokens for row in plan.rows if row.num_tokens > 1)
            seconds = self._device.seconds(plan.num_tokens, keys, pairs) * self._slower
            self._free_at = max(now + HOST_S, self._free_at) + seconds * self._rng.normal(1, self._spread)
            self._in_flight.append((plan, now, self._free_at))

    def _finish(self, came: dict[int, list[float]], now: float) -> None:
        plan, launched, ended = self._in_flight.popleft()
        tokens = [[0] if row.samples else [] for row in plan.rows]
        self.batcher.complete(StepResult(plan.step, tokens, {}, launched, ended), now)
        for effect in self.batcher.outbox:
            if isinstance(effect, Emit):
                came[effect.sid[1]] += [now] * len(effect.tokens)
        self.batcher.outbox.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[4.0, 8.0, 16.0, 24.0], help="requests a second")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target-itl-ms", type=float, default=15.0)
    parser.add_argument("--slower", type=float, default=1.0, help="what steps take beside what they did in the trace")
    parser.add_argument("--spread", type=float, default=0.0, help="standard deviation of that")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{'req/s':>7} {'done/s':>7} {'TTFT mean / P99':>18} {'TPOT mean / P99':>17} {'ITL P99, ms':>12}")
    for rate in args.rates:
        count = 1000 if rate == np.inf else int(rate * args.seconds)
        arrivals = np.random.default_rng(args.seed).exponential(1 / rate, count).cumsum()
        clock = Clock(args.target_itl_ms, args.input_len, args.output_len, args.slower, args.spread)
        came, end = clock.run(arrivals.tolist())
        times = [np.array(came[number]) for number in range(count)]
        ttft = 1e3 * (np.array([each[0] for each in times]) - arrivals)
        tpot = 1e3 * np.array([(each[-1] - each[0]) / max(1, len(each) - 1) for each in times])
        itl = 1e3 * np.concatenate([np.diff(each) for each in times])
        pairs = [f"{values.mean():.1f} / {np.percentile(values, 99):.1f}" for values in (ttft, tpot)]
        pause = np.percentile(itl, 99) if len(itl) else 0.0
        print(f"{rate:7.1f} {count / end:7.2f} {pairs[0]:>18} {pairs[1]:>17} {pause:12.1f}")


if __name__ == "__main__":
    main()
