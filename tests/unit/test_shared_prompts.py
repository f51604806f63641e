"""Streams that begin alike compute, or pull, it once and share its blocks."""

import pytest
from support.worker_bench import BLOCK, Bench, carry, rows, sid, to_scheduler, tokens

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto.logprobs import entry_bytes
from baton.proto.messages import CancelStream, Confirm, Holder, PrefillDone
from baton.worker import effects
from baton.worker.plan import StepPlan, StepResult
from baton.worker.request import Request

PROMPT = list(range(40))
FULL, TAIL = 2, 1
"""Blocks of the prompt's first 39 tokens."""


def computed(bench: Bench) -> int:
    return bench.batcher.computed_tokens


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_samples_compute_the_prompt_once_and_the_last_token_each(depth: int, caching: bool) -> None:
    bench = Bench(depth=depth, caching=caching)
    for n in range(1, 5):
        bench.prefill(n, PROMPT, max_tokens=20)
    out = bench.run()
    for n in range(1, 5):
        assert tokens(out, n) == list(range(1040, 1060))
    assert computed(bench) == 40 + 3
    assert bench.batcher.pool.num_used == 0


def test_full_blocks_are_shared_and_the_one_being_filled_is_copied() -> None:
    bench = Bench()
    for n in (1, 2):
        bench.prefill(n, PROMPT, max_tokens=20)
    bench.step()
    plan = bench.launch()
    assert plan is not None
    first, second = (bench.batcher._requests[sid(n), "prefill"].blocks for n in (1, 2))
    assert first[:FULL] == second[:FULL]
    assert set(first[FULL:]).isdisjoint(second[FULL:])
    assert plan.copies == [(first[FULL], second[FULL])]
    assert bench.batcher.pool.num_used == FULL + 2 * TAIL


def test_a_prompt_that_fills_its_blocks_needs_no_copy() -> None:
    bench = Bench()
    for n in (1, 2):
        bench.prefill(n, PROMPT[:33], max_tokens=4)
    bench.step()
    plan = bench.launch()
    assert plan is not None
    assert plan.copies == []
    assert bench.run()[-1]


def test_others_go_past_those_that_wait() -> None:
    bench = Bench(budget=16)
    for n in (1, 2):
        bench.prefill(n, PROMPT)
    bench.prefill(3, [7, 8])
    plans: list[StepPlan | None] = [bench.launch()]
    bench.finish()
    while not any(rows(bench.take(), n) for n in (1,)) and plans[-1] is not None and len(plans) < 3:
        plans.append(bench.launch())
        bench.finish()
    last = plans[-1]
    assert last is not None
    assert [row.num_tokens for row in last.rows] == [8, 2], "the rest of the first prompt, then the third"


def test_when_the_first_is_cancelled_the_next_computes_the_prompt() -> None:
    bench = Bench(budget=16)
    for n in (1, 2, 3):
        bench.prefill(n, PROMPT)
    bench.step()
    bench.handle(CancelStream(sid(1), 1))
    out = bench.run()
    assert tokens(out, 2) == tokens(out, 3) == [1040, 1041, 1042, 1043]
    assert bench.batcher.pool.num_used == 0


def test_the_block_that_is_copied_is_given_to_no_pull_before_the_step_has_passed() -> None:
    bench = Bench(num_blocks=5, caching=False)
    for n in (1, 2):
        bench.prefill(n, PROMPT)
    bench.step()
    bench.launch()
    ((source, _target),) = bench.in_flight[0].copies
    bench.handle(CancelStream(sid(1), 1))
    assert source not in free_for_a_pull(bench)
    bench.finish()
    assert source in free_for_a_pull(bench)


@pytest.mark.parametrize("caching", [True, False])
def test_nor_when_it_was_filled_and_its_stream_ended_meanwhile(caching: bool) -> None:
    last = 3 * BLOCK
    bench = Bench(num_blocks=9, depth=2, caching=caching, token_of=lambda position: 7 if position == last else 1)
    bench.prefill(1, PROMPT, max_tokens=60, stop_token_ids=(7,))
    while not [row for row in bench.launch().rows if row.start == last - 1]:
        bench.finish()
    bench.prefill(2, PROMPT, max_tokens=60)
    ((source, _target),) = bench.launch().copies
    bench.finish()
    assert source not in free_for_a_pull(bench)
    bench.finish()
    assert source in free_for_a_pull(bench)


def free_for_a_pull(bench: Bench) -> list[int]:
    pool = bench.batcher.pool
    blocks = pool.allocate(pool.num_free_for_pull, for_pull=True)
    assert blocks is not None
    pool.release(blocks)
    return blocks


def test_another_salt_shares_nothing() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, salt="one")
    bench.prefill(2, PROMPT, salt="other")
    bench.run()
    assert computed(bench) == 80


def test_samples_are_handed_over_under_a_lease_each_and_the_reader_pulls_full_blocks_once() -> None:
    owner = Bench("prefill-0", incarnation=1)
    reader = Bench("decode-0", incarnation=2)
    for n in (1, 2, 3):
        owner.prefill(n, PROMPT, max_tokens=6, hand_over=True)
    out = owner.run()
    done = [message for message in to_scheduler(out, PrefillDone) if isinstance(message, PrefillDone)]
    assert computed(owner) == 42
    assert owner.batcher.pool.num_used == FULL + 3 * TAIL
    started = [effect for each in done for effect in reader.decode(owner, each, max_tokens=6)]
    pulls = [effect for effect in started if isinstance(effect, Pull)]
    assert [len(pull.source) for pull in pulls] == [3], "the others wait for what the first pulls"
    rest = carry(reader, owner, started)
    assert rest is not None
    out = reader.run()
    for n in (1, 2, 3):
        assert tokens(out, n) == list(range(1040, 1046))
    assert reader.batcher._pulls.pulled_tokens == 40 + 2 * 8
    assert owner.batcher.pool.num_used == reader.batcher.pool.num_used == 0


def test_when_a_pull_fails_the_sample_that_waited_for_it_pulls_itself() -> None:
    owner, reader = Bench("prefill-0", incarnation=1), Bench("decode-0", incarnation=2)
    for n in (1, 2):
        owner.prefill(n, PROMPT, max_tokens=6, hand_over=True)
    done = [message for message in to_scheduler(owner.run(), PrefillDone) if isinstance(message, PrefillDone)]
    (pull,) = [e for each in done for e in reader.decode(owner, each, max_tokens=6) if isinstance(e, Pull)]
    out = reader.handle(PullDone(pull.transfer, ok=False, reason="broken", transport="shm"))
    (again,) = [effect for effect in out if isinstance(effect, Pull)]
    assert len(again.source) == 3
    holder = Holder("decode-0", 2, done[0].sid, 1)
    assert effects.ToOwner(owner.me, Confirm(1, done[0].lease, holder)) not in out


def test_prompt_logprobs_are_computed_whatever_is_cached_and_once_only_over_a_preemption() -> None:
    bench = Bench(budget=16)
    bench.prefill(1, PROMPT, max_tokens=1)
    bench.run()
    bench.prefill(2, PROMPT, max_tokens=2, prompt_logprobs=0)
    asked: list[int] = []
    out: list[effects.Effect] = []
    while (plan := bench.launch()) is not None:
        bench.in_flight.clear()
        told = {index: told_of(row.targets) for index, row in enumerate(plan.rows) if row.targets}
        asked += [target for row in plan.rows for target in row.targets]
        sampled = [[7] if row.samples else [] for row in plan.rows]
        bench.batcher.complete(StepResult(plan.step, sampled, {}, 1.0, 2.0, prompt_logprobs=told), bench.now)
        out += bench.take()
        if len(asked) == 16:
            bench.batcher._steps._preempt(bench.batcher._requests[sid(2), "prefill"])
    first, second = rows(out, 2)
    assert first.prompt_logprobs is not None
    assert second.prompt_logprobs is None
    assert first.prompt_logprobs.data == told_of(PROMPT[1:])
    assert asked == PROMPT[1:], "blocks whose log-probabilities are known may come from the cache again"


def told_of(targets: list[int]) -> bytes:
    """Something that tells which tokens it is of."""
    return b"".join(target.to_bytes(entry_bytes(0), "little") for target in targets)


def test_to_look_for_an_owner_costs_no_more_for_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done for everybody who waits, at each step and each report."""
    bench = Bench()
    for n in (1, 2):
        bench.prefill(n, PROMPT)
    bench.launch()

    def listed(*_: object) -> list[bytes]:
        raise AssertionError("the hashes of a whole prompt are listed")

    monkeypatch.setattr(Request, "block_hashes", listed)
    assert bench.batcher.load(with_holdings=False).queued_tokens == 2
