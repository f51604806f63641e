"""The owner's side of a handoff: leases on KV blocks, from the first settled chunk to the reader's confirmation.

    FILLING ── last block settled ──► READY ── Confirm by the holder ──► CONSUMED ── forgotten after remember_s
       │                                │
       └── cancel, preemption ──► GONE ◄┘ deadline, cancel

The owner arbitrates: the first holder to Open or Confirm a lease holds it, it is consumed once, and whoever else asks
is told Gone. Deadlines are judged when a message arrives, so an expired lease that no sweep has seen yet is gone, and a
renewal never revives one. Ids are never reused. Times are seconds on the owner's monotonic clock.
"""

from dataclasses import dataclass
from enum import Enum, auto

from baton.proto.config import LeaseConfig
from baton.proto.messages import FirstRows, Gone, Holder, Ok, Settled, Sid


class LeaseState(Enum):
    """See the picture above."""

    FILLING = auto()
    READY = auto()
    CONSUMED = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class Lease:
    """One handoff, seen by the worker that owns the blocks."""

    id: int
    sid: Sid
    attempt: int
    state: LeaseState = LeaseState.FILLING
    holder: Holder | None = None
    deadline: float = float("inf")
    num_tokens: int = 0
    """Settled so far."""
    blocks: tuple[int, ...] = ()
    """That hold the settled tokens, in order."""
    first_rows: FirstRows | None = None
    targets: tuple[int, ...] = ()
    """What the holder has offered for the blocks, ahead of the last one."""

    @property
    def live(self) -> bool:
        """Whether the blocks are still pinned for the handoff."""
        return self.state in (LeaseState.FILLING, LeaseState.READY)


class Leases:
    """All leases of one worker incarnation. Whoever calls it unpins the blocks of leases that end."""

    def __init__(self, config: LeaseConfig) -> None:
        self._config = config
        self._leases: dict[int, Lease] = {}
        self._next_id = 1

    @property
    def num_live(self) -> int:
        """Leases that pin blocks."""
        return sum(lease.live for lease in self._leases.values())

    @property
    def oldest(self) -> int:
        """No lease before this one is remembered."""
        return next(iter(self._leases), self._next_id)

    def create(self, sid: Sid, attempt: int) -> Lease:
        """A new FILLING lease."""
        lease = Lease(self._next_id, sid, attempt)
        self._leases[lease.id] = lease
        self._next_id += 1
        return lease

    def settle(
        self, lease: Lease, num_tokens: int, blocks: list[int], first_rows: FirstRows | None, now: float
    ) -> None:
        """More tokens may be read; with first_rows, all of them: READY."""
        lease.num_tokens = num_tokens
        lease.blocks = tuple(blocks)
        if first_rows is not None:
            lease.first_rows = first_rows
            lease.state = LeaseState.READY
            lease.deadline = now + (self._config.holder_s if lease.holder else self._config.unbound_s)

    def open(self, lease_id: int, holder: Holder, now: float) -> Settled | Gone:
        """Take or renew the lease."""
        lease = self._hold(lease_id, holder, now)
        if lease is None or not lease.live:
            return Gone(holder, lease_id)
        if lease.state is LeaseState.READY:
            lease.deadline = now + self._config.holder_s
        return self.settled_message(lease, holder)

    def confirm(
        self, lease_id: int, holder: Holder, now: float, targets: tuple[int, ...] = ()
    ) -> tuple[Ok | Gone | Settled, Lease | None]:
        """Answer the reader; the lease that this consumed is returned once, for its blocks to be unpinned.

        With `targets` it may come while the lease is FILLING, for the owner to carry out when it is READY.
        """
        lease = self._hold(lease_id, holder, now)
        if lease is not None and lease.live and targets:
            lease.targets = targets
        if lease is not None and lease.state is LeaseState.FILLING and targets:
            return self.settled_message(lease, holder), None
        if lease is None or lease.state in (LeaseState.GONE, LeaseState.FILLING):
            return Gone(holder, lease_id), None
        # Who offers targets may not have heard of the first rows yet, and asks no other way any more.
        answer = Ok(holder, lease_id, lease.first_rows if lease.targets else None)
        if lease.state is LeaseState.CONSUMED:
            return answer, None
        lease.state = LeaseState.CONSUMED
        lease.deadline = now + self._config.remember_s
        return answer, lease

    def cancel(self, lease: Lease) -> None:
        """The owner takes the lease back; its blocks may be reused at once."""
        lease.state = LeaseState.GONE
        self._leases.pop(lease.id, None)

    def expire(self, now: float) -> list[Lease]:
        """Leases whose time ran out since the last sweep, for their blocks to be unpinned."""
        over = [lease for lease in self._leases.values() if lease.deadline <= now]
        expired = [lease for lease in over if lease.live]
        for lease in over:
            self.cancel(lease)
        return expired

    def next_deadline(self) -> float:
        """When `expire` has something to do; infinity when never."""
        return min((lease.deadline for lease in self._leases.values()), default=float("inf"))

    def ready_unopened(self) -> list[Lease]:
        """What a restarted scheduler must hear of again."""
        return [x for x in self._leases.values() if x.state is LeaseState.READY and x.holder is None]

    @staticmethod
    def settled_message(lease: Lease, holder: Holder) -> Settled:
        """What the holder may read now."""
        return Settled(holder, lease.id, lease.num_tokens, lease.blocks, lease.first_rows)

    def _hold(self, lease_id: int, holder: Holder, now: float) -> Lease | None:
        lease = self._leases.get(lease_id)
        if lease is None or lease.deadline <= now or (holder.sid, holder.attempt) != (lease.sid, lease.attempt):
            return None
        if lease.holder is None:
            lease.holder = holder
        return lease if lease.holder == holder else None
