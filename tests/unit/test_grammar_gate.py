"""Streams with a grammar in the batcher: compiled before they run, planned only when their last token is known."""

import pytest
from support.worker_bench import Bench, carry, rows, sid, to_scheduler, tokens

from baton.proto.messages import CancelStream, Ended, PrefillDone
from baton.worker.effects import Compile, Compiled, Release
from baton.worker.plan import StepResult

PROMPT = list(range(40))
GRAMMAR = "a grammar"


def test_a_stream_waits_for_its_grammar_and_nobody_waits_for_the_stream() -> None:
    bench = Bench()
    assert Compile(GRAMMAR) in bench.prefill(1, PROMPT, grammar=GRAMMAR)
    assert bench.batcher.load(False).waiting == 1
    bench.prefill(2, PROMPT)
    out = bench.run()
    assert tokens(out, 1) == []
    assert len(tokens(out, 2)) == 4
    bench.handle(Compiled(GRAMMAR))
    assert len(tokens(bench.run(), 1)) == 4


def test_a_grammar_that_does_not_compile_ends_its_streams_with_the_reason() -> None:
    bench = Bench()
    for n in (1, 2):
        bench.prefill(n, PROMPT, grammar=GRAMMAR)
    out = bench.handle(Compiled(GRAMMAR, "too complex"))
    for n in (1, 2):
        (row,) = rows(out, n)
        assert row.finish is not None
        assert (row.finish.reason, row.finish.final, row.finish.message) == ("error", 0, "too complex")
    assert to_scheduler(out, Ended) == [Ended(sid(1), 1, "prefill"), Ended(sid(2), 1, "prefill")]
    assert bench.run() == []
    assert bench.batcher.holdings() == ()


def test_each_request_lets_go_of_its_grammar_once_when_it_is_over() -> None:
    bench = Bench()
    for n in (1, 2, 3):
        assert Compile(GRAMMAR) in bench.prefill(n, PROMPT, grammar=GRAMMAR)
    bench.handle(Compiled(GRAMMAR))
    assert bench.handle(CancelStream(sid(1), 1)).count(Release(GRAMMAR)) == 1
    assert bench.run().count(Release(GRAMMAR)) == 2


def test_a_cancelled_stream_is_not_admitted_when_its_grammar_comes() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, grammar=GRAMMAR)
    bench.handle(CancelStream(sid(1), 1))
    assert bench.handle(Compiled(GRAMMAR)) == []
    assert bench.run() == []
    assert bench.batcher.load(False).waiting == 0


@pytest.mark.parametrize("kv_first", [True, False])
def test_a_decode_leg_pulls_while_its_grammar_is_compiled(kv_first: bool) -> None:
    owner, reader = Bench("prefill-0"), Bench("decode-0", incarnation=2)
    owner.prefill(1, PROMPT, hand_over=True, grammar=GRAMMAR)
    owner.handle(Compiled(GRAMMAR))
    (done,) = to_scheduler(owner.run(), PrefillDone)
    assert isinstance(done, PrefillDone)
    out = reader.decode(owner, done, grammar=GRAMMAR)
    assert Compile(GRAMMAR) in out
    if not kv_first:
        reader.handle(Compiled(GRAMMAR))
    carry(reader, owner, [effect for effect in out if effect != Compile(GRAMMAR)])
    if kv_first:
        assert reader.run() == []
        reader.handle(Compiled(GRAMMAR))
    assert tokens(reader.run(), 1) == [1040, 1041, 1042, 1043]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_constrained_row_always_brings_its_token_along(depth: int) -> None:
    bench = Bench(depth=depth)
    bench.prefill(1, PROMPT, max_tokens=10, grammar=GRAMMAR)
    bench.handle(Compiled(GRAMMAR))
    bench.prefill(2, PROMPT, max_tokens=30)
    mine, other = [], []
    while True:
        while plan := bench.launch():
            mine += [row for row in plan.rows if row.slot == 0]
            other += [row for row in plan.rows if row.slot == 1 and row.samples]
        if not bench.in_flight:
            break
        bench.finish()
    assert len(mine) == 10
    assert not any(row.from_device for row in mine)
    assert len(other) == 30


def test_a_stream_that_leaves_its_grammar_ends_with_the_reason() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, grammar=GRAMMAR)
    bench.handle(Compiled(GRAMMAR))
    plan = bench.launch()
    assert plan is not None
    bench.in_flight.popleft()
    bench.batcher.complete(StepResult(plan.step, [[7]], {}, 0.0, 0.0, {0: "left its grammar"}), bench.now)
    (row,) = rows(bench.take(), 1)
    assert row.tokens == ()
    assert row.finish is not None
    assert (row.finish.reason, row.finish.message) == ("error", "left its grammar")
    assert bench.batcher.pool.num_used == 0
