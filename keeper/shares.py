"""Who owns which block of a pool that several workers share: the one record of it, and it outlives every worker.

A worker owns blocks by its name. Their number never changes: blocks change owner only as many for as many, when the
owner of a lease asks for it. A worker's next incarnation owns what the one before owned, so a death loses and doubles
nothing, whatever was on its way then: a swap is done when it is heard here, not before and not in part.
"""

from collections.abc import Mapping

import numpy as np

from baton.proto.messages import Swap, Withdraw


class Shares:
    """`parts`: worker -> its part of the blocks, which sum to 1. Knows nothing of processes and bytes."""

    def __init__(self, num_blocks: int, parts: Mapping[str, float]) -> None:
        names = list(parts)
        ends = np.round(np.cumsum([0.0, *parts.values()]) * num_blocks).astype(int)
        self._index = {name: index for index, name in enumerate(names)}
        self._owner = np.repeat(np.arange(len(names)), np.diff(ends))  # [num_blocks]
        self._incarnations: dict[str, int] = {}
        self._withdrawn: dict[int, set[int]] = {}  # owner's incarnation -> its leases that holders gave up

    def join(self, worker: str, incarnation: int) -> np.ndarray:
        """The blocks of a worker, int32; its earlier incarnation is over. KeyError when it has no part in the pool."""
        blocks = np.flatnonzero(self._owner == self._index[worker]).astype(np.int32)
        self.leave(worker)
        self._incarnations[worker] = incarnation
        self._withdrawn[incarnation] = set()
        return blocks

    def leave(self, worker: str) -> None:
        """Its incarnation is over; its blocks wait for the next one."""
        self._withdrawn.pop(self._incarnations.pop(worker, 0), None)

    def worker(self, incarnation: int) -> str | None:
        """Whose incarnation this is, while it lasts."""
        return next((name for name, current in self._incarnations.items() if current == incarnation), None)

    def swap(self, swap: Swap) -> bool:
        """Let the blocks change owner; False, and no change, when that can't be any more."""
        owner, holder = self.worker(swap.owner_incarnation), self.worker(swap.holder_incarnation)
        if owner is None:
            return False
        withdrawn = {lease for lease in self._withdrawn[swap.owner_incarnation] if lease >= swap.oldest}
        self._withdrawn[swap.owner_incarnation] = withdrawn
        if holder is None or swap.lease in withdrawn:
            return False
        give, take = np.asarray(swap.give), np.asarray(swap.take)
        if not self._owns(owner, give) or not self._owns(holder, take) or len(give) != len(take):
            return False
        self._owner[give], self._owner[take] = self._index[holder], self._index[owner]
        return True

    def withdraw(self, withdraw: Withdraw) -> None:
        """A holder will not take the blocks of this lease: a swap that comes later is refused."""
        leases = self._withdrawn.get(withdraw.owner_incarnation)
        if leases is not None:
            leases.add(withdraw.lease)

    def _owns(self, worker: str, blocks: np.ndarray) -> bool:
        known = len(blocks) > 0 and blocks.min() >= 0 and blocks.max() < len(self._owner)
        return bool(known and (self._owner[blocks] == self._index[worker]).all())
