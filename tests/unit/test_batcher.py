"""What a worker's batcher promises, one behaviour at a time, on a virtual clock."""

import pytest
from support.worker_bench import Bench, carry, rows, sid, to_scheduler, tokens

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto.messages import (
    CancelCommand,
    CancelStream,
    Confirm,
    Ended,
    FirstToken,
    Gone,
    Ok,
    Open,
    PrefillDone,
    Progress,
    Refused,
    Settled,
    Welcome,
)
from baton.worker import effects

PROMPT = list(range(40))


def test_a_unified_stream_runs_from_prompt_to_limit() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, max_tokens=3)
    out = bench.run()
    assert tokens(out, 1) == [1040, 1041, 1042]
    assert [row.pos for row in rows(out, 1)] == [0, 1, 2]
    assert [row.finish for row in rows(out, 1)][:2] == [None, None]
    finish = rows(out, 1)[-1].finish
    assert finish is not None
    assert (finish.reason, finish.final) == ("length", 3)
    assert to_scheduler(out, FirstToken) == [FirstToken(sid(1), 1)]
    assert to_scheduler(out, Ended) == [Ended(sid(1), 1, "prefill")]
    assert bench.batcher.pool.num_used == 0


def test_a_stop_token_ends_the_stream_and_is_part_of_it() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, max_tokens=50, stop_token_ids=(1042,))
    out = bench.run()
    assert tokens(out, 1) == [1040, 1041, 1042]
    finish = rows(out, 1)[-1].finish
    assert finish is not None
    assert finish.reason == "stop"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_steps_in_flight_change_no_token(depth: int) -> None:
    bench = Bench(depth=depth)
    for n in range(5):
        bench.prefill(n, list(range(10 + 7 * n)), max_tokens=20, stop_token_ids=(1040,))
    out = bench.run()
    for n in range(5):
        expected = [1000 + position for position in range(10 + 7 * n, 30 + 7 * n)]
        if 1040 in expected:
            expected = expected[: expected.index(1040) + 1]
        assert tokens(out, n) == expected
    assert bench.batcher.pool.num_used == 0


def test_a_long_prompt_is_computed_in_chunks_beside_running_streams() -> None:
    bench = Bench(budget=32)
    bench.prefill(1, PROMPT[:10], max_tokens=50)
    bench.step()
    bench.prefill(2, list(range(100)), max_tokens=2)
    plan = bench.launch()
    assert plan is not None
    assert [(row.num_tokens, row.samples) for row in plan.rows] == [(1, True), (31, False)]
    bench.finish()
    plan = bench.launch()
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(11, 1), (31, 31)]


def test_a_prompt_that_ranks_before_running_streams_does_not_stop_them() -> None:
    bench = Bench(num_blocks=400, budget=16)
    bench.prefill(1, PROMPT[:5], max_tokens=200)
    bench.step()
    bench.prefill(2, list(range(500)), max_tokens=3, priority=-1)
    for _ in range(40):
        assert len(tokens(bench.step(), 1)) == 1


def test_legs_that_keep_coming_do_not_starve_a_stream_that_was_preempted() -> None:
    """A decode worker whose pool is full, with two more legs always waiting for it."""
    owner = Bench("prefill-0", incarnation=1, num_blocks=4000, budget=4096)
    reader = Bench("decode-0", incarnation=2, num_blocks=40, budget=256)
    finished: list[int] = []
    started, last_token, longest_wait = 0, {}, 0
    for step in range(1500):
        out = reader.step()
        if len(reader.batcher._pulls) < 2:
            started += 1
            owner.prefill(started, [started * 1000 + i for i in range(60)], max_tokens=120, hand_over=True)
            (done,) = to_scheduler(owner.run(), PrefillDone)
            out += reader.decode(owner, done, max_tokens=120)
        owner.now = reader.now
        for row in carry(reader, owner, out):
            if isinstance(row, effects.Emit):
                n = row.sid[1]
                longest_wait = max(longest_wait, step - last_token.get(n, step))
                last_token[n] = step
                finished += [n] if row.finish else []
    assert reader.batcher._steps.preemptions
    assert len(finished) > 0.8 * started
    assert longest_wait < 300


def test_a_preempted_stream_that_an_older_one_keeps_out_holds_up_no_leg() -> None:
    """The third, of a few blocks, runs while the second waits for the end of the first."""
    owner = Bench("prefill-0", incarnation=1, num_blocks=200, budget=4096)
    reader = Bench("decode-0", incarnation=2, num_blocks=100, budget=256)
    out: list[effects.Effect] = []

    def start(n: int, num_tokens: int, max_tokens: int) -> None:
        owner.now = reader.now
        owner.prefill(n, [n * 10000 + i for i in range(num_tokens)], max_tokens=max_tokens, hand_over=True)
        (done,) = to_scheduler(owner.run(), PrefillDone)
        out.extend(carry(reader, owner, reader.decode(owner, done, max_tokens=max_tokens)))

    start(1, 700, 800)
    start(2, 800, 700)
    while not reader.batcher._steps.preemptions:
        out += reader.step()
    start(3, 20, 20)
    for _ in range(25):
        out += reader.step()
    assert [request.sid[1] for request in reader.batcher._steps.waiting] == [2]
    assert len(tokens(out, 3)) == 20
    out += reader.run(2000)
    assert [len(tokens(out, n)) for n in (1, 2, 3)] == [800, 700, 20]


def test_a_leg_of_higher_priority_does_not_wait_for_a_preempted_stream() -> None:
    owner = Bench("prefill-0", incarnation=1, num_blocks=200, budget=4096)
    reader = Bench("decode-0", incarnation=2, num_blocks=12, budget=256)
    for n, priority in ((1, 0), (2, 9), (3, -9)):
        owner.prefill(n, [n * 1000 + i for i in range(60)], max_tokens=100, hand_over=True)
        (done,) = to_scheduler(owner.run(), PrefillDone)
        carry(reader, owner, reader.decode(owner, done, max_tokens=100, priority=priority))
        while n == 2 and not reader.batcher._steps.preemptions:
            reader.step()
    assert [request.sid[1] for request in reader.batcher._steps.waiting] == [2]
    assert len(tokens(reader.step(), 3)) == 2


@pytest.mark.parametrize("depth", [1, 2])
def test_with_prompts_first_streams_enter_what_prompts_leave_of_a_step(depth: int) -> None:
    bench = Bench(budget=32, depth=depth, prompts_first=True)
    bench.prefill(1, list(range(10)), max_tokens=30)
    bench.step()
    bench.prefill(2, list(range(100, 140)), max_tokens=30)
    bench.prefill(3, list(range(200, 230)), max_tokens=30)
    steps, out = [], []
    for _ in range(3):
        plan = bench.launch()
        assert plan is not None
        steps.append([row.num_tokens for row in plan.rows])
        out += bench.finish()
    assert steps == [[32], [8, 24], [6, 1, 1]]
    out += bench.run()
    assert [len(tokens(out, n)) for n in (2, 3)] == [30, 30]


def test_a_second_request_reuses_the_blocks_of_a_shared_prefix() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, max_tokens=1)
    bench.run()
    bench.prefill(2, [*PROMPT[:36], 7, 7, 7], max_tokens=1)
    plan = bench.launch()
    assert plan is not None
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(32, 7)]
    ledger = rows(bench.finish(), 2)[0].ledger
    assert ledger is not None
    assert (ledger.cached_tokens, ledger.computed_tokens) == (32, 7)


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    bench = Bench()
    for n in (1, 2):
        bench.prefill(n, list(range(32)), max_tokens=1)
        assert tokens(bench.run(), n) == [1032]
    assert bench.batcher.load(False).cached_tokens == 16


def test_the_latest_arrival_gives_way_and_comes_back_with_the_same_tokens() -> None:
    bench = Bench(num_blocks=8, caching=False)
    for n in range(3):
        bench.prefill(n, list(range(30)), max_tokens=60)
    out = bench.run(limit=2000)
    for n in range(3):
        assert tokens(out, n) == list(range(1030, 1090))
        assert [row.pos for row in rows(out, n)] == list(range(60))
    assert bench.batcher.load(False).preemptions > 0
    assert bench.batcher.pool.num_used == 0


def test_an_older_attempt_is_dropped_by_a_newer_one_and_never_comes_back() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT)
    bench.prefill(1, PROMPT, attempt=2)
    assert [holding.attempt for holding in bench.batcher.holdings()] == [2]
    bench.prefill(1, PROMPT, attempt=1)
    assert [holding.attempt for holding in bench.batcher.holdings()] == [2]


def test_a_cancel_that_overtakes_its_start_wins() -> None:
    bench = Bench()
    bench.handle(CancelCommand(1, 1, sid(1), 1))
    bench.prefill(1, PROMPT)
    assert bench.batcher.holdings() == ()
    bench.prefill(1, PROMPT, attempt=2)
    assert len(bench.batcher.holdings()) == 1


def test_commands_of_an_older_epoch_are_refused() -> None:
    bench = Bench()
    bench.handle(Welcome(2))
    bench.prefill(1, PROMPT)
    assert bench.batcher.holdings() == ()


def test_a_prompt_without_room_for_output_is_refused_with_the_bound() -> None:
    bench = Bench(num_blocks=2)
    (refused,) = to_scheduler(bench.prefill(1, PROMPT), Refused)
    assert isinstance(refused, Refused)
    assert "holds 32" in refused.reason


def test_a_resumed_stream_counts_its_earlier_output() -> None:
    bench = Bench()
    bench.prefill(1, [*PROMPT, 1040, 1041], max_tokens=4, prompt_len=len(PROMPT))
    out = bench.run()
    assert [row.pos for row in rows(out, 1)] == [2, 3]
    assert tokens(out, 1) == [1042, 1043]


def test_an_aborted_stream_frees_its_blocks_while_its_step_runs() -> None:
    bench = Bench()
    bench.prefill(1, PROMPT, max_tokens=50)
    bench.launch()
    out = bench.handle(CancelStream(sid(1), 1))
    assert to_scheduler(out, Ended) == [Ended(sid(1), 1, "prefill")]
    assert bench.batcher.pool.num_used == 0
    assert bench.batcher.pool.num_free_for_pull == 64 - 3
    assert rows(bench.finish(), 1) == []
    assert bench.batcher.pool.num_free_for_pull == 64


class Pair:
    """A prefill and a decode worker."""

    def __init__(self, **decode: object) -> None:
        self.owner = Bench("prefill-0", 1, early_bind_tokens=64)
        self.reader = Bench("decode-0", 2, **decode)  # type: ignore[arg-type]

    def prefilled(self, n: int = 1, prompt: list[int] = PROMPT, max_tokens: int = 4) -> PrefillDone:
        self.owner.prefill(n, prompt, max_tokens, hand_over=True)
        (done,) = to_scheduler(self.owner.run(), PrefillDone)
        assert isinstance(done, PrefillDone)
        return done


def test_a_handed_over_stream_goes_on_at_the_reader_and_repeats_the_first_token() -> None:
    pair = Pair()
    done = pair.prefilled()
    assert done.first_rows.tokens == (1040,)
    assert pair.owner.batcher.load(False).leases == 1
    rest = carry(pair.reader, pair.owner, pair.reader.decode(pair.owner, done))
    assert to_scheduler(rest, Ended) == [Ended(sid(1), 1, "prefill")]
    assert pair.owner.batcher.pool.num_used == 0
    out = pair.reader.run()
    assert [(row.pos, row.tokens) for row in rows(out, 1)] == [(0, (1040, 1041)), (2, (1042,)), (3, (1043,))]
    assert pair.reader.batcher.pool.num_used == 0


def test_only_blocks_that_the_reader_lacks_are_pulled() -> None:
    pair = Pair()
    carry(pair.reader, pair.owner, pair.reader.decode(pair.owner, pair.prefilled(1)))
    pair.reader.run()
    out = pair.reader.decode(pair.owner, pair.prefilled(2, [*PROMPT[:36], 9, 9]))
    (pull,) = [effect for effect in out if isinstance(effect, Pull)]
    assert len(pull.source) == 1
    carry(pair.reader, pair.owner, out)
    assert tokens(pair.reader.run(), 2) == [1038, 1039, 1040, 1041]


def test_pulled_blocks_are_published_only_after_the_owner_confirmed() -> None:
    pair = Pair()
    out = pair.reader.decode(pair.owner, pair.prefilled())
    (pull,) = [effect for effect in out if isinstance(effect, Pull)]
    (confirm,) = pair.reader.handle(PullDone(pull.transfer, ok=True))
    assert isinstance(confirm, effects.ToOwner)
    assert isinstance(confirm.message, Confirm)
    pair.reader.handle(Gone(confirm.message.holder, confirm.message.lease))
    assert pair.reader.batcher.pool.match([b""]) == []
    assert pair.reader.batcher.pool.num_used == 0
    assert pair.reader.batcher.holdings() == ()


def test_a_lease_that_is_gone_ends_the_attempt_with_a_reason() -> None:
    pair = Pair()
    done = pair.prefilled()
    pair.owner.now += 10.0
    pair.owner.batcher.tick(pair.owner.now)
    (ended,) = to_scheduler(pair.owner.take(), Ended)
    assert isinstance(ended, Ended)
    assert "expired" in ended.retry
    rest = carry(pair.reader, pair.owner, pair.reader.decode(pair.owner, done))
    (ended,) = to_scheduler(rest, Ended)
    assert isinstance(ended, Ended)
    assert "gone" in ended.retry
    assert pair.owner.batcher.pool.num_used == pair.reader.batcher.pool.num_used == 0


def test_a_reader_without_room_waits_renews_and_then_pulls() -> None:
    pair = Pair(num_blocks=4)
    pair.reader.prefill(9, list(range(500, 520)), max_tokens=30)
    pair.reader.step()
    out = pair.reader.decode(pair.owner, pair.prefilled())
    assert [type(effect) for effect in out] == [effects.ToOwner]
    for _ in range(12):
        pair.reader.now += 1.0
        pair.owner.now += 1.0
        pair.reader.batcher.tick(pair.reader.now)
        pair.owner.batcher.tick(pair.owner.now)
        carry(pair.reader, pair.owner, pair.reader.take())
    assert pair.owner.batcher.load(False).leases == 1
    out = pair.reader.run()
    carry(pair.reader, pair.owner, out)
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]


def test_a_long_prompt_is_pulled_while_it_is_computed() -> None:
    pair = Pair(num_blocks=64)
    prompt = list(range(150))
    pair.owner.prefill(1, prompt, hand_over=True)
    (progress,) = to_scheduler(pair.owner.step(), Progress)
    assert isinstance(progress, Progress)
    assert (progress.num_tokens, progress.total_tokens, len(progress.blocks)) == (64, 150, 4)
    early = PrefillDone(sid(1), 1, progress.lease, progress.num_tokens, progress.blocks, None)  # type: ignore[arg-type]
    out = pair.reader.decode(pair.owner, early, early=True)
    pulls = [effect for effect in out if isinstance(effect, Pull)]
    assert [len(pull.source) for pull in pulls] == [4]
    carry(pair.reader, pair.owner, out)
    for settled_blocks in (4, 2):
        out = pair.owner.step()
        (settled,) = [x.message for x in out if isinstance(x, effects.ToHolder)]
        assert isinstance(settled, Settled)
        out = pair.reader.handle(settled)
        (pull,) = [effect for effect in out if isinstance(effect, Pull)]
        assert len(pull.source) == settled_blocks
        carry(pair.reader, pair.owner, out)
    assert tokens(pair.reader.run(), 1) == [1150, 1151, 1152, 1153]
    assert pair.owner.batcher.pool.num_used == 0


def test_blocks_under_a_transfer_are_not_reused_before_it_ends() -> None:
    pair = Pair(num_blocks=4)
    out = pair.reader.decode(pair.owner, pair.prefilled())
    (pull,) = [effect for effect in out if isinstance(effect, Pull)]
    pair.reader.handle(CancelCommand(1, 99, sid(1), 1))
    assert pair.reader.batcher.pool.num_used == 3
    pair.reader.handle(PullDone(pull.transfer, ok=True))
    assert pair.reader.batcher.pool.num_used == 0


def test_a_failed_transfer_ends_the_attempt() -> None:
    pair = Pair()
    out = pair.reader.decode(pair.owner, pair.prefilled())
    (pull,) = [effect for effect in out if isinstance(effect, Pull)]
    (ended,) = to_scheduler(pair.reader.handle(PullDone(pull.transfer, ok=False, reason="link down")), Ended)
    assert isinstance(ended, Ended)
    assert "link down" in ended.retry
    assert pair.reader.batcher.pool.num_used == 0


def test_a_lost_confirmation_is_asked_for_again() -> None:
    pair = Pair()
    out = pair.reader.decode(pair.owner, pair.prefilled())
    (pull,) = [effect for effect in out if isinstance(effect, Pull)]
    (first,) = pair.reader.handle(PullDone(pull.transfer, ok=True))
    assert isinstance(first, effects.ToOwner)
    (answer,) = [x for x in pair.owner.handle(first.message) if isinstance(x, effects.ToHolder)]
    assert isinstance(answer.message, Ok)  # lost
    pair.reader.now += 1.0
    pair.reader.batcher.tick(pair.reader.now)
    rest = carry(pair.reader, pair.owner, pair.reader.take())
    assert rest == []
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]


def test_a_lease_of_an_earlier_incarnation_is_gone() -> None:
    pair = Pair()
    out = pair.reader.decode(pair.owner, pair.prefilled())
    (opened,) = [x.message for x in out if isinstance(x, effects.ToOwner)]
    assert isinstance(opened, Open)
    restarted = Bench("prefill-0", 77)
    (answer,) = restarted.handle(opened)
    assert isinstance(answer, effects.ToHolder)
    assert isinstance(answer.message, Gone)


def test_a_leg_that_arrives_at_this_workers_limit_ends_there() -> None:
    owner = Bench("prefill-0", incarnation=1)
    reader = Bench("decode-0", incarnation=2, max_model_len=len(PROMPT) + 1)
    owner.prefill(1, PROMPT, max_tokens=9, hand_over=True)
    (done,) = to_scheduler(owner.run(), PrefillDone)
    out = carry(reader, owner, reader.decode(owner, done, max_tokens=9)) + reader.run()
    assert tokens(out, 1) == [1040]
    finish = rows(out, 1)[-1].finish
    assert finish is not None
    assert (finish.reason, finish.final) == ("length", 1)
    assert [end.leg for end in to_scheduler(out, Ended)] == ["prefill", "decode"]
    assert reader.batcher.pool.num_used == 0


def test_a_leg_that_hands_over_does_not_end_at_this_workers_limit() -> None:
    owner = Bench("prefill-0", incarnation=1, max_model_len=len(PROMPT) + 1)
    reader = Bench("decode-0", incarnation=2)
    owner.prefill(1, PROMPT, max_tokens=3, hand_over=True)
    (done,) = to_scheduler(owner.run(), PrefillDone)
    out = carry(reader, owner, reader.decode(owner, done, max_tokens=3)) + reader.run()
    assert tokens(out, 1) == [1040, 1041, 1042]


def test_both_legs_on_one_worker_move_no_byte() -> None:
    bench = Bench("prefill-0", 1)
    bench.prefill(1, PROMPT, hand_over=True)
    (done,) = to_scheduler(bench.run(), PrefillDone)
    assert isinstance(done, PrefillDone)
    used = bench.batcher.pool.num_used
    out = bench.decode(bench, done)
    assert not [effect for effect in out if isinstance(effect, Pull)]
    assert bench.batcher.pool.num_used == used
    out = bench.run()
    assert tokens(out, 1) == [1040, 1041, 1042, 1043]
    assert rows(out, 1)[0].ledger is not None
    assert rows(out, 1)[0].ledger.transport == "local"
    assert bench.batcher.pool.num_used == 0


def test_a_stream_whose_tokens_all_arrived_earlier_is_only_closed() -> None:
    bench = Bench()
    out = bench.prefill(1, [*PROMPT, 1040, 1041], max_tokens=2, prompt_len=len(PROMPT))
    (row,) = rows(out, 1)
    assert row.finish is not None
    assert (row.tokens, row.finish.reason, row.finish.final) == ((), "length", 2)
    assert bench.batcher.holdings() == ()


def test_so_is_one_that_has_come_to_this_workers_limit() -> None:
    bench = Bench(max_model_len=len(PROMPT) + 2)
    out = bench.prefill(1, [*PROMPT, 1040, 1041], max_tokens=9, prompt_len=len(PROMPT))
    (row,) = rows(out, 1)
    assert row.finish is not None
    assert (row.tokens, row.finish.reason, row.finish.final) == ((), "length", 2)
    assert to_scheduler(bench.prefill(2, list(range(len(PROMPT) + 2)), max_tokens=9), Refused)
