"""A handoff between two workers with one pool: blocks change owner, whatever is lost or ends on the way."""

from collections import deque

import pytest
from support.worker_bench import Bench, sid, to_scheduler, tokens

from baton.keeper.shares import Shares
from baton.kv_transfer.contract import Pull
from baton.proto.messages import (
    CancelCommand,
    Confirm,
    Ended,
    Gone,
    Message,
    Ok,
    PrefillDone,
    Progress,
    Settled,
    Swap,
    Swapped,
    Withdraw,
)
from baton.worker import effects

PROMPT = list(range(40))
BLOCKS = 12


class Pair:
    """A prefill worker with blocks 0 to 11, a decode worker with 12 to 23, and the record of it."""

    def __init__(self) -> None:
        self.owner = Bench("prefill-0", 1, BLOCKS, caching=False, shared_pool="pool")
        self.reader = Bench("decode-0", 2, BLOCKS, caching=False, shared_pool="pool", first_block=BLOCKS)
        self.shares = Shares(2 * BLOCKS, {"prefill-0": 0.5, "decode-0": 0.5})
        self.shares.join("prefill-0", 1)
        self.shares.join("decode-0", 2)
        self.lost: list[type[Message]] = []
        """Messages of these types do not arrive."""

    def prefilled(self, n: int = 1) -> PrefillDone:
        self.owner.prefill(n, PROMPT, hand_over=True)
        (done,) = to_scheduler(self.owner.run(), PrefillDone)
        assert isinstance(done, PrefillDone)
        return done

    def carry(self, out: list[effects.Effect]) -> list[effects.Effect]:
        """Until it falls silent; what else came out."""
        rest: list[effects.Effect] = []
        queue = deque(out)
        while queue:
            effect = queue.popleft()
            assert not isinstance(effect, Pull), "bytes would move"
            match effect:
                case effects.ToOwner(_, message) if type(message) not in self.lost:
                    queue += self.owner.handle(message)
                case effects.ToHolder(_, message) if type(message) not in self.lost:
                    queue += self.reader.handle(message)
                case effects.ToKeeper(message):
                    queue += self.keeper(message)
                case effects.ToScheduler() | effects.Emit():
                    rest.append(effect)
        return rest

    def keeper(self, message: Swap | Withdraw) -> list[effects.Effect]:
        key = message.owner_incarnation, message.lease
        if isinstance(message, Withdraw):
            self.shares.withdraw(message)
            return self.reader.handle(Swapped(*key, False))
        done = self.shares.swap(message)
        out = self.reader.handle(Swapped(*key, done, message.give if done else ()))
        return self.owner.handle(Swapped(*key, done, message.take if done else ())) + out

    def check(self) -> None:
        """Nothing is held any more, and everybody agrees on every block."""
        for bench in (self.owner, self.reader):
            assert bench.batcher.pool.num_used == 0
            assert bench.batcher.holdings() == ()
            owned = owned_by(self.shares, bench.me.worker)
            assert sorted(bench.batcher.pool._references) == owned
            assert len(owned) == BLOCKS


def owned_by(shares: Shares, worker: str) -> list[int]:
    return [i for i, owner in enumerate(shares._owner) if owner == shares._index[worker]]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def confirm_of(out: list[effects.Effect]) -> Confirm:
    (confirm,) = [x.message for x in out if isinstance(x, effects.ToOwner) and isinstance(x.message, Confirm)]
    assert isinstance(confirm, Confirm)
    return confirm


def test_a_handoff_swaps_blocks_and_moves_no_byte(pair: Pair) -> None:
    done = pair.prefilled()
    rest = pair.carry(pair.reader.decode(pair.owner, done))
    assert to_scheduler(rest, Ended) == [Ended(sid(1), 1, "prefill")]
    (request,) = pair.reader.batcher._requests.values()
    assert tuple(request.blocks) == done.blocks
    assert (request.ledger.transport, request.ledger.moved_blocks, request.ledger.moved_bytes) == ("local", 3, 0)
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]
    pair.check()


def test_a_reader_that_offers_early_has_the_blocks_when_the_last_one_has_settled() -> None:
    pair = Pair()
    pair.owner.batcher._early_bind_tokens = 32
    pair.owner.prefill(1, PROMPT, hand_over=True)
    pair.owner.launch()
    (progress,) = to_scheduler(pair.owner.take(), Progress)
    assert isinstance(progress, Progress)
    early = PrefillDone(sid(1), 1, progress.lease, 0, (), None)  # type: ignore[arg-type]
    pair.carry(pair.reader.decode(pair.owner, early, early=True))
    assert pair.reader.batcher.pool.num_used == 3
    rest = pair.carry(pair.owner.finish())
    assert to_scheduler(rest, Ended) == [Ended(sid(1), 1, "prefill")]
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]
    pair.check()


def test_first_rows_that_were_lost_come_with_the_answer_to_the_next_confirm() -> None:
    pair = Pair()
    pair.owner.batcher._early_bind_tokens = 32
    pair.owner.prefill(1, PROMPT, hand_over=True)
    pair.owner.launch()
    (progress,) = to_scheduler(pair.owner.take(), Progress)
    assert isinstance(progress, Progress)
    early = PrefillDone(sid(1), 1, progress.lease, 0, (), None)  # type: ignore[arg-type]
    pair.carry(pair.reader.decode(pair.owner, early, early=True))
    pair.lost = [Settled]
    pair.carry(pair.owner.finish())
    assert pair.reader.run() == []
    pair.reader.now += 1.0
    pair.reader.batcher.tick(pair.reader.now)
    pair.carry(pair.reader.take())
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]
    pair.check()


def test_first_rows_that_were_lost_come_also_with_the_answer_to_a_late_confirm() -> None:
    """The reader had no room before the prompt was done."""
    pair = Pair()
    pair.owner.batcher._early_bind_tokens = 32
    pair.owner.prefill(1, PROMPT, hand_over=True)
    pair.owner.launch()
    (progress,) = to_scheduler(pair.owner.take(), Progress)
    assert isinstance(progress, Progress)
    early = PrefillDone(sid(1), 1, progress.lease, 0, (), None)  # type: ignore[arg-type]
    others = pair.reader.batcher.pool.allocate(BLOCKS)
    assert others is not None
    pair.carry(pair.reader.decode(pair.owner, early, early=True))
    pair.lost = [Settled]
    pair.carry(pair.owner.finish())
    pair.reader.batcher.pool.release(others)
    pair.reader.batcher.tick(pair.reader.now)
    pair.carry(pair.reader.take())
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]
    pair.check()


@pytest.mark.parametrize("lost", [[Ok], [Confirm], [Ok, Confirm]])
def test_what_is_lost_between_the_workers_is_sent_again_or_not_needed(pair: Pair, lost: list[type[Message]]) -> None:
    pair.lost = lost
    pair.carry(pair.reader.decode(pair.owner, pair.prefilled()))
    pair.lost = []
    pair.reader.now += 1.0
    pair.reader.batcher.tick(pair.reader.now)
    pair.carry(pair.reader.take())
    assert tokens(pair.reader.run(), 1) == [1040, 1041, 1042, 1043]
    pair.check()


def test_a_leg_cancelled_before_the_owner_has_heard_keeps_its_blocks(pair: Pair) -> None:
    confirm = confirm_of(pair.reader.decode(pair.owner, pair.prefilled()))
    cancelled = pair.reader.handle(CancelCommand(1, 99, sid(1), 1))
    assert pair.reader.batcher.pool.num_used == 3  # they may be the owner's by now
    pair.carry(cancelled)
    assert pair.reader.batcher.pool.num_used == 0
    pair.carry(pair.owner.handle(confirm))
    pair.check()


def test_the_keeper_forgets_withdrawals_that_no_swap_can_follow(pair: Pair) -> None:
    for n in range(1, 20):
        confirm_of(pair.reader.decode(pair.owner, pair.prefilled(n)))  # the owner never hears it
        pair.carry(pair.reader.handle(CancelCommand(1, 99, sid(n), 1)))
        pair.owner.handle(CancelCommand(1, 99, sid(n), 1))
    pair.carry(pair.reader.decode(pair.owner, pair.prefilled(20)))
    assert pair.shares._withdrawn[1] == set()
    pair.reader.run()
    pair.check()


def test_a_leg_cancelled_while_its_swap_is_on_its_way_gets_the_other_blocks(pair: Pair) -> None:
    confirm = confirm_of(pair.reader.decode(pair.owner, pair.prefilled()))
    swap = pair.owner.handle(confirm)
    cancelled = pair.reader.handle(CancelCommand(1, 99, sid(1), 1))
    pair.carry(swap)
    pair.carry(cancelled)
    pair.check()
    assert 0 in pair.reader.batcher.pool._references


def test_a_lease_that_is_gone_gives_the_targets_back(pair: Pair) -> None:
    done = pair.prefilled()
    pair.owner.now += 10.0
    pair.owner.batcher.tick(pair.owner.now)
    pair.owner.take()
    rest = pair.carry(pair.reader.decode(pair.owner, done))
    (ended,) = to_scheduler(rest, Ended)
    assert isinstance(ended, Ended)
    assert "gone" in ended.retry
    pair.check()


def test_an_owner_that_is_silent_ends_the_attempt_and_its_late_swap_is_refused(pair: Pair) -> None:
    confirm = confirm_of(pair.reader.decode(pair.owner, pair.prefilled()))
    pair.reader.now += 5.0
    pair.reader.batcher.tick(pair.reader.now)
    (ended,) = to_scheduler(pair.carry([x for x in pair.reader.take() if not isinstance(x, effects.ToOwner)]), Ended)
    assert isinstance(ended, Ended)
    assert "does not answer" in ended.retry
    pair.carry(pair.owner.handle(confirm))
    pair.check()


def test_a_swap_with_a_holder_that_has_died_is_refused_and_nothing_leaks(pair: Pair) -> None:
    confirm = confirm_of(pair.reader.decode(pair.owner, pair.prefilled()))
    pair.shares.leave("decode-0")
    (swap,) = [x.message for x in pair.owner.handle(confirm) if isinstance(x, effects.ToKeeper)]
    assert isinstance(swap, Swap)
    assert not pair.shares.swap(swap)
    pair.owner.handle(Swapped(1, swap.lease, False))
    assert pair.owner.batcher.pool.num_used == 0
    assert pair.shares.join("decode-0", 3).tolist() == list(range(BLOCKS, 2 * BLOCKS))


def test_a_copying_reader_cannot_confirm_what_has_not_settled(pair: Pair) -> None:
    lease = pair.owner.batcher.leases.create(sid(1), 1)
    holder = confirm_of(pair.reader.decode(pair.owner, pair.prefilled())).holder
    (answer,) = pair.owner.handle(Confirm(1, lease.id, holder))
    assert isinstance(answer, effects.ToHolder)
    assert answer.message == Gone(holder, lease.id)
