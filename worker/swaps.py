"""Blocks that may be another worker's by now, where workers share one pool and a handoff moves no byte.

    holder: Confirm(targets) ─► owner: Swap ─► keeper ─► Swapped to both
                 │ the stream ends before: Withdraw ─► keeper ─► Swapped(done=False), or the other one was faster

The keeper decides, in the order in which it hears. Until its word comes each side holds on to the blocks that were its
own: the owner the lease's, the holder its targets. So at no moment can two workers use one block, whoever dies when.
"""

from dataclasses import dataclass

from baton.proto.messages import Confirm, Swap, Swapped, Withdraw
from baton.worker.block_pool import BlockPool
from baton.worker.effects import Effect, ToKeeper


@dataclass(slots=True, frozen=True)
class Limbo:
    """Ours until the keeper says that the other ones are."""

    ours: list[int]
    theirs: tuple[int, ...]


class Swaps:
    """The blocks of leases that were confirmed and of legs that are over, while nobody here knows whose they are."""

    def __init__(self, pool: BlockPool, outbox: list[Effect]) -> None:
        self._pool = pool
        self._outbox = outbox
        self._limbo: dict[tuple[int, int], Limbo] = {}  # (owner incarnation, lease)

    def give(self, blocks: list[int], confirm: Confirm) -> None:
        """As the owner: offer the blocks of a lease, held with one reference each, for the holder's targets."""
        self._limbo[confirm.owner_incarnation, confirm.lease] = Limbo(blocks, confirm.targets)
        holder = confirm.holder.incarnation
        swap = Swap(confirm.owner_incarnation, confirm.lease, holder, tuple(blocks), confirm.targets)
        self._outbox.append(ToKeeper(swap))

    def withdraw(self, key: tuple[int, int], targets: list[int], source: tuple[int, ...]) -> None:
        """As the holder: the leg is over, and its targets may have been given away."""
        self._limbo[key] = Limbo(targets, source)
        self._outbox.append(ToKeeper(Withdraw(*key)))

    def swapped(self, event: Swapped) -> bool:
        """The keeper's word; False when it is not about blocks in here."""
        limbo = self._limbo.pop((event.owner_incarnation, event.lease), None)
        if limbo is None:
            return False
        if event.done:
            self._pool.exchange(limbo.ours, limbo.theirs)
        self._pool.release(list(limbo.theirs) if event.done else limbo.ours)
        return True
