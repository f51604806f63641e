"""Streams that want the prompt's vector and no tokens, in a worker's batcher."""

import pytest
from support.worker_bench import BLOCK, Bench, rows, sid, to_scheduler, tokens

from baton.proto.messages import CancelStream, Ended, FirstToken, PrefillDone, Progress, Refused
from baton.worker import effects

PROMPT = list(range(40))


def pool(bench: Bench, n: int, prompt: list[int], pooling: str = "LAST", **fields: object) -> list[effects.Effect]:
    return bench.prefill(n, prompt, max_tokens=0, pooling=pooling, **fields)  # type: ignore[arg-type]


def vectors(out: list[effects.Effect], n: int) -> list[bytes]:
    return [row.vector for row in rows(out, n)]


@pytest.mark.parametrize("hand_over", [False, True])
@pytest.mark.parametrize(("pooling", "made_of"), [("LAST", b"1 of 1"), ("MEAN", b"40 of 40")])
def test_the_vector_comes_with_the_end_and_nothing_is_kept(hand_over: bool, pooling: str, made_of: bytes) -> None:
    bench = Bench(early_bind_tokens=1, budget=16)
    pool(bench, 1, PROMPT, pooling, hand_over=hand_over)
    out = bench.run()
    [row] = rows(out, 1)
    assert (row.pos, row.tokens, row.vector) == (0, (), made_of)
    assert row.finish is not None
    assert (row.finish.reason, row.finish.final) == ("stop", 0)
    assert row.ledger is not None
    assert (row.ledger.prefill_worker, row.ledger.decode_worker) == ("worker-0", "")
    assert (row.ledger.computed_tokens, row.ledger.transport) == (40, "")
    assert to_scheduler(out, Ended) == [Ended(sid(1), 1, "prefill")]
    assert not to_scheduler(out, PrefillDone) + to_scheduler(out, Progress) + to_scheduler(out, FirstToken)
    assert bench.batcher.pool.num_used == 0
    assert bench.batcher.leases.num_live == 0
    load = bench.batcher.load(with_holdings=True)
    assert (load.pooled_vectors, load.generated_tokens, load.holdings) == (1, 0, ())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_vectors_and_tokens_are_made_in_the_same_steps(depth: int) -> None:
    bench = Bench(depth=depth, budget=32)
    bench.prefill(1, PROMPT, max_tokens=9)
    pool(bench, 2, list(range(100, 177)), "MEAN")
    pool(bench, 3, list(range(200, 250)), "LAST")
    out = bench.run()
    assert tokens(out, 1) == [1040 + i for i in range(9)]
    assert vectors(out, 2) == [b"77 of 77"]
    assert vectors(out, 3) == [b"1 of 1"]
    assert bench.batcher.pool.num_used == 0


def test_a_last_token_takes_cached_blocks_and_a_mean_can_not() -> None:
    bench = Bench()
    for n, (pooling, cached) in enumerate([("LAST", 0), ("LAST", 2 * BLOCK), ("MEAN", 0), ("MEAN", 0)]):
        pool(bench, n, PROMPT, pooling)
        [row] = rows(bench.run(), n)
        assert row.ledger is not None
        assert row.ledger.cached_tokens == cached
        assert row.vector == (b"1 of 1" if pooling == "LAST" else b"40 of 40")


def test_what_a_mean_has_computed_serves_others() -> None:
    bench = Bench()
    pool(bench, 1, PROMPT, "MEAN")
    bench.run()
    bench.prefill(2, PROMPT, max_tokens=1)
    [row] = rows(bench.run(), 2)
    assert row.ledger is not None
    assert row.ledger.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize("depth", [1, 2])
def test_one_that_gives_way_starts_from_zero(depth: int) -> None:
    """A stream that grows takes the last blocks while the prompt is half computed."""
    bench = Bench(num_blocks=8, budget=3, depth=depth, caching=False)
    bench.prefill(1, list(range(15)), max_tokens=60)
    while not rows(bench.step(), 1):
        pass
    pool(bench, 2, list(range(96)), "MEAN")
    out = bench.run()
    assert tokens(out, 1) == [1016 + i for i in range(59)]
    assert vectors(out, 2) == [b"96 of 96"]
    assert bench.batcher.load(with_holdings=False).preemptions > 0


def test_a_prompt_may_fill_the_context_because_nothing_follows() -> None:
    bench = Bench(num_blocks=4)
    pool(bench, 1, list(range(4 * BLOCK)))
    assert vectors(bench.run(), 1) == [b"1 of 1"]
    [refused] = to_scheduler(pool(bench, 2, list(range(4 * BLOCK + 1))), Refused)
    assert isinstance(refused, Refused)
    [refused] = to_scheduler(bench.prefill(3, list(range(4 * BLOCK))), Refused)
    assert isinstance(refused, Refused)


def test_a_cancelled_one_frees_its_blocks_while_its_step_runs() -> None:
    bench = Bench(budget=16)
    pool(bench, 1, PROMPT, "MEAN")
    bench.step()
    bench.launch()
    out = bench.handle(CancelStream(sid(1), 1))
    assert to_scheduler(out, Ended) == [Ended(sid(1), 1, "prefill")]
    assert rows(bench.run(), 1) == []
    assert bench.batcher.pool.num_used == 0


def test_the_next_attempt_is_like_the_first() -> None:
    bench = Bench(budget=16)
    pool(bench, 1, PROMPT, "MEAN")
    bench.step()
    pool(bench, 1, PROMPT, "MEAN", attempt=2)
    [row] = rows(bench.run(), 1)
    assert (row.attempt, row.vector) == (2, b"40 of 40")
