"""Blocks that may be another worker's by now, where workers share one pool and a handoff moves no byte.

    holder: Confirm(targets) ─► owner: all has settled: Swap ─► keeper ─► Swapped to both
                 │ the stream ends before: Withdraw ─► keeper ─► Swapped(done=False), or the other one was faster

The keeper decides, in the order in which it hears. Until its word comes each side holds on to the blocks that were its
own: the owner the lease's, the holder its targets. So at no moment can two workers use one block, whoever dies when.
"""

from baton.proto.messages import Holder, Swap, Swapped, Withdraw
from baton.worker.block_pool import BlockPool
from baton.worker.effects import Effect, ToKeeper


class Swaps:
    """The blocks of leases that were confirmed and of legs that are over, while nobody here knows whose they are."""

    def __init__(self, pool: BlockPool, outbox: list[Effect]) -> None:
        self._pool = pool
        self._outbox = outbox
        self._limbo: dict[tuple[int, int], list[int]] = {}  # (owner incarnation, lease) -> what was ours

    def give(
        self, key: tuple[int, int], blocks: list[int], holder: Holder, targets: tuple[int, ...], oldest: int
    ) -> None:
        """As the owner: the blocks of a lease, held with one reference each, for the holder's targets. No lease before
        `oldest` will follow."""
        self._limbo[key] = blocks
        self._outbox.append(ToKeeper(Swap(*key, holder.incarnation, tuple(blocks), targets, oldest)))

    def withdraw(self, key: tuple[int, int], targets: list[int]) -> None:
        """As the holder: the leg is over, and its targets may have been given away."""
        self._limbo[key] = targets
        self._outbox.append(ToKeeper(Withdraw(*key)))

    def swapped(self, event: Swapped) -> bool:
        """The keeper's word; False when it is not about blocks in here."""
        blocks = self._limbo.pop((event.owner_incarnation, event.lease), None)
        if blocks is None:
            return False
        if event.done:
            self._pool.exchange(blocks, event.blocks)
            blocks = list(event.blocks)
        self._pool.release(blocks)
        return True
