"""What this GPU's steps take, timed once before the first request."""

import logging
import time
from collections.abc import Sequence

from baton.proto.messages import SamplingParams
from baton.worker.cuda.graphs import mixed_tokens
from baton.worker.cuda.runner import CudaRunner
from baton.worker.plan import Row, SlotInit, StepPlan
from baton.worker.step_costs import StepCosts

log = logging.getLogger(__name__)

_BEYOND_GRAPHS = (2048, 3072)
"""Not 1,536, which compute no more a second than 1,024: products of 4,096 columns fill the GPU twice, the second time
by half. Larger steps compute prompts hardly faster: they only hold up whoever waits for a token."""
_SHORTEST = 64
_PROBE_TOKENS, _PROBE_START = 512, 8192
_PROBE_ROWS, _PROBE_LENGTH = 64, 1024


def measure_costs(runner: CudaRunner, own: Sequence[int]) -> StepCosts | None:
    """Time steps of the sizes that a step with prompts may have. What is in the blocks, this worker's own, is lost.

    None where sequences are so short that chunks make no difference.
    """
    if runner.max_model_len < _SHORTEST:
        return None
    probe = _Probe(runner, own)
    longest = runner.max_model_len - 1
    tokens = min(_PROBE_TOKENS, runner.max_tokens, longest // 2)
    start = min(_PROBE_START, longest - tokens)
    per_pair = (probe.seconds([(start, tokens)]) - probe.seconds([(0, tokens)])) / (tokens * start)
    rows, length = min(_PROBE_ROWS, runner.max_seqs), min(_PROBE_LENGTH, longest - 1)
    per_key = (probe.seconds([(length, 1)] * rows) - probe.seconds([(1, 1)] * rows)) / (rows * (length - 1))
    most = min(runner.max_tokens, runner.max_seqs * longest)  # few short sequences fill no large step
    sizes = [size for size in (*mixed_tokens(runner.max_tokens), *_BEYOND_GRAPHS) if size <= most]
    table = [(size, probe.seconds([(0, part) for part in _parts(size, longest)])) for size in sizes]
    log.info(
        "a step of %s; %.1f ns a key, %.2f ns a query and 1,000 keys",
        ", ".join(f"{tokens} tokens: {seconds * 1000:.1f} ms" for tokens, seconds in table),
        per_key * 1e9,
        per_pair * 1e12,
    )
    return StepCosts(table, max(per_key, 0.0), max(per_pair, 0.0), padded_to=mixed_tokens(runner.max_tokens)[-1])


def _parts(total: int, largest: int) -> list[int]:
    """`total` in parts of at most `largest`."""
    return [min(largest, total - start) for start in range(0, total, largest)]


class _Probe:
    """Times steps of rows given as (tokens cached before, tokens computed)."""

    def __init__(self, runner: CudaRunner, own: Sequence[int]) -> None:
        self._runner, self._own = runner, own

    def seconds(self, rows: list[tuple[int, int]]) -> float:
        """Of one of two such steps, enqueued one behind the other; a first one compiles what is not yet compiled."""
        self._runner.execute(self._plan(0, rows))
        started = time.monotonic()
        for pending in [self._runner.launch(self._plan(step, rows)) for step in (0, 1)]:
            ended = pending.wait().sampled_s
        return (ended - started) / 2

    def _plan(self, step: int, rows: list[tuple[int, int]]) -> StepPlan:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        planned, inits, block = [], [], 0
        for slot, (start, count) in enumerate(rows):
            needed = -(-(start + count) // self._runner.block_size)
            blocks = [self._own[index % len(self._own)] for index in range(block, block + needed)]
            block += needed
            inits.append(SlotInit(slot, (0, slot), 0, params, start + count, [0] * (start + count), blocks))
            planned.append(Row(slot, start, count, [0] * count, False, [], True, 0))
        return StepPlan(step, planned, inits)
