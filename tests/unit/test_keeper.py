"""Who owns which block, who may load, and what becomes of it when a worker dies."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from baton.keeper.shares import Shares
from baton.keeper.state import Allocator, Instruction, Keeper, OutOfMemoryError, Send, Watch
from baton.proto.messages import (
    Allocate,
    Allocated,
    EndTurn,
    Filled,
    Join,
    Message,
    Note,
    Prompts,
    Share,
    Swap,
    Swapped,
    TakeTurn,
    Turn,
    Withdraw,
)

PREFILL, DECODE, AGAIN = b"prefill-0:1", b"decode-0:2", b"prefill-0:3"


class Counted(Allocator):
    """16 bytes, and which parts of them are out."""

    def __init__(self) -> None:
        self.out: dict[bytes, int] = {}

    def allocate(self, num_bytes: int) -> bytes:
        if sum(self.out.values()) + num_bytes > 16:
            raise OutOfMemoryError("16 bytes are all there is")
        handle = str(len(self.out)).encode()
        self.out[handle] = num_bytes
        return handle

    def free(self, handle: bytes) -> None:
        del self.out[handle]


@pytest.fixture
def allocator() -> Counted:
    return Counted()


@pytest.fixture
def keeper(allocator: Counted) -> Keeper:
    return Keeper(allocator, {"prefill-0": 0.25, "decode-0": 0.75})


def sent(out: list[Instruction], to: bytes) -> list[Message]:
    return [each.message for each in out if isinstance(each, Send) and each.peer == to]


def start(keeper: Keeper, sender: bytes) -> list[Instruction]:
    return keeper.handle(sender, TakeTurn(sender.decode().split(":")[0], 100))


@pytest.fixture
def shares() -> Iterator[Shares]:
    """prefill-0 has 0 to 3 as incarnation 11, decode-0 has 4 to 15 as 22."""
    shares = Shares(16, {"prefill-0": 0.25, "decode-0": 0.75})
    assert shares.join("prefill-0", 11).tolist() == [0, 1, 2, 3]
    assert shares.join("decode-0", 22).tolist() == list(range(4, 16))
    yield shares
    owned = np.concatenate([shares.join("prefill-0", 1), shares.join("decode-0", 2)])
    assert sorted(owned.tolist()) == list(range(16))


def test_blocks_change_owner_as_many_for_as_many(shares: Shares) -> None:
    assert shares.swap(Swap(11, 1, 22, give=(1, 3), take=(9, 4)))
    assert shares.join("prefill-0", 12).tolist() == [0, 2, 4, 9]


@pytest.mark.parametrize(
    "swap",
    [
        Swap(10, 1, 22, (1,), (9,)),
        Swap(11, 1, 21, (1,), (9,)),
        Swap(11, 1, 22, (9,), (10,)),
        Swap(11, 1, 22, (1,), (2,)),
        Swap(11, 1, 22, (1, 2), (9,)),
        Swap(11, 1, 22, (1,), (16,)),
        Swap(11, 1, 22, (-1,), (9,)),
        Swap(11, 1, 22, (), ()),
    ],
    ids=[
        "an owner that is over",
        "a holder that is over",
        "not the owner's",
        "not the holder's",
        "fewer for more",
        "beyond the pool",
        "below it",
        "nothing",
    ],
)
def test_what_is_not_theirs_to_swap_stays(shares: Shares, swap: Swap) -> None:
    assert not shares.swap(swap)
    assert shares.join("prefill-0", 12).tolist() == [0, 1, 2, 3]


def test_a_swap_that_comes_after_the_holder_has_withdrawn_is_refused(shares: Shares) -> None:
    shares.withdraw(Withdraw(11, 1))
    assert not shares.swap(Swap(11, 1, 22, (1,), (9,)))
    assert shares.swap(Swap(11, 2, 22, (1,), (9,)))


def test_what_was_withdrawn_is_forgotten_once_its_owner_asks_for_it_no_more(shares: Shares) -> None:
    for lease in range(1, 100):
        shares.withdraw(Withdraw(11, lease))
    assert not shares.swap(Swap(11, 98, 22, (1,), (9,), oldest=98))
    assert not shares.swap(Swap(11, 99, 22, (1,), (9,), oldest=98))
    assert shares._withdrawn[11] == {98, 99}


def test_both_sides_hear_what_they_have_got(keeper: Keeper) -> None:
    for sender in (PREFILL, DECODE):
        start(keeper, sender)
        if sender == PREFILL:
            keeper.handle(sender, Allocate("kv", 16, num_blocks=16))
        keeper.handle(sender, EndTurn())
        (share,) = keeper.handle(sender, Join(11 if sender == PREFILL else 22))
        assert isinstance(share, Send)
        assert share.message == Share()
    out = keeper.handle(PREFILL, Swap(11, 1, 22, (0,), (15,)))
    assert sent(out, PREFILL) == [Swapped(11, 1, True, (15,))]
    assert sent(out, DECODE) == [Swapped(11, 1, True, (0,))]
    assert sent(keeper.handle(DECODE, Withdraw(11, 1)), DECODE) == [Swapped(11, 1, False)]
    out = keeper.handle(PREFILL, Swap(11, 2, 33, (1,), (14,)))
    assert sent(out, PREFILL) == [Swapped(11, 2, False)]


def test_each_hears_of_the_oldest_prompt_that_is_not_its_own(allocator: Counted) -> None:
    keeper = Keeper(allocator, {"prefill-0": 0.4, "prefill-1": 0.4, "decode-0": 0.2})
    other = b"prefill-1:4"
    for sender in (PREFILL, other, DECODE):
        start(keeper, sender)
        if sender == PREFILL:
            keeper.handle(sender, Allocate("kv", 16, num_blocks=16))
        keeper.handle(sender, EndTurn())
        keeper.handle(sender, Join(11))

    def heard(out: list[Instruction]) -> list[list[Message]]:
        return [sent(out, each) for each in (PREFILL, other, DECODE)]

    assert heard(keeper.handle(PREFILL, Prompts(5.0))) == [[], [Prompts(5.0)], [Prompts(5.0)]]
    assert heard(keeper.handle(other, Prompts(4.0))) == [[Prompts(4.0)], [], [Prompts(4.0)]]
    assert sent(keeper.handle(DECODE, Join(13)), DECODE) == [Share(), Prompts(4.0)]
    assert heard(keeper.handle(PREFILL, Prompts(None))) == [[], [Prompts(None)], [Prompts(4.0)]]
    again = keeper.handle(other, Join(12))
    assert heard(again) == [[Prompts(None)], [Share()], [Prompts(None)]]
    keeper.handle(other, Prompts(6.0))
    assert heard(keeper.gone(other)) == [[Prompts(None)], [], [Prompts(None)]]


def test_one_loads_at_a_time_and_the_next_finds_what_it_left(keeper: Keeper) -> None:
    out = start(keeper, PREFILL)
    assert Watch(PREFILL, 100) in out
    assert [type(message) for message in sent(out, PREFILL)] == [Turn]
    assert sent(start(keeper, DECODE), DECODE) == []
    assert sent(start(keeper, DECODE), DECODE) == []  # asked again: it was not heard, for all it knows
    (allocated,) = sent(keeper.handle(PREFILL, Allocate("weights", 8)), PREFILL)
    assert isinstance(allocated, Allocated)
    keeper.handle(PREFILL, Filled("weights"))
    keeper.handle(PREFILL, Note("costs", b"7 ms"))
    (turn,) = sent(keeper.handle(PREFILL, EndTurn()), DECODE)
    assert isinstance(turn, Turn)
    assert turn.memories["weights"].ready
    assert turn.notes == {"costs": b"7 ms"}


def test_what_a_process_had_not_filled_dies_with_it_and_the_next_one_fills(keeper: Keeper, allocator: Counted) -> None:
    start(keeper, PREFILL)
    start(keeper, DECODE)
    keeper.handle(PREFILL, Allocate("weights", 8))
    (turn,) = sent(keeper.gone(PREFILL), DECODE)
    assert isinstance(turn, Turn)
    assert turn.memories == {}
    assert allocator.out == {}


def test_a_process_waits_until_the_one_before_it_is_gone(keeper: Keeper) -> None:
    start(keeper, PREFILL)
    keeper.handle(PREFILL, Allocate("kv", 16, num_blocks=16))
    keeper.handle(PREFILL, EndTurn())
    assert sent(start(keeper, AGAIN), AGAIN) == []  # its steps may still run
    (turn,) = sent(start(keeper, DECODE), DECODE)
    assert isinstance(turn, Turn)
    keeper.handle(DECODE, EndTurn())
    assert [type(message) for message in sent(keeper.gone(PREFILL), AGAIN)] == [Turn]


def test_messages_of_a_process_that_is_gone_come_too_late(keeper: Keeper) -> None:
    start(keeper, PREFILL)
    keeper.handle(PREFILL, Allocate("kv", 16, num_blocks=16))
    keeper.gone(PREFILL)
    assert keeper.handle(PREFILL, Join(11)) == []
    assert keeper.handle(PREFILL, Swap(11, 1, 22, (0,), (15,))) == []


def test_too_large_a_memory_is_refused_in_words(keeper: Keeper) -> None:
    start(keeper, PREFILL)
    (answer,) = sent(keeper.handle(PREFILL, Allocate("kv", 17, num_blocks=17)), PREFILL)
    assert answer == Allocated(None, "16 bytes are all there is")


def test_the_process_imports_no_torch() -> None:
    """It is there before the workers have finished importing theirs, and takes no memory for it."""
    program = "import sys, baton.keeper.main, baton.keeper.cuda_memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


def test_a_worker_without_a_part_gets_no_turn(keeper: Keeper) -> None:
    assert start(keeper, b"stranger:9") == []
