"""The decode side of a handoff: reserve, pull, confirm.

    StartDecode ─► waits for room ─► reserved ─► pulling ⇄ Settled ─► everything here ─► Confirm ─► Ok ─► ready
                         │                          │                                     │
                         └──────────────────────────┴──────── Gone, failure ──────────────┴─► the attempt can't go on

A request takes all its blocks at once, prefix hits included: if waiting requests pinned their hits, they could hold the
room that the first of them waits for.

Blocks that a pull may still write are given back only when the transport says PullDone, whatever became of the request.

Where both workers' blocks lie in one pool nothing is pulled: the Confirm goes out as soon as blocks are reserved and
offers them for the owner's (swaps.py). The leg is ready once Swapped and the first rows are here, in any order.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto.config import LeaseConfig
from baton.proto.lifecycle import Stage
from baton.proto.messages import Confirm, Ended, FirstRows, Open, Peer, Swapped
from baton.worker.block_pool import BlockPool
from baton.worker.effects import Effect, ToOwner, ToScheduler
from baton.worker.request import RemoteKV, Request, State
from baton.worker.shared_prompts import SharedPrompts
from baton.worker.swaps import Swaps


@dataclass(slots=True)
class Orphan:
    """Blocks of a request that is over, held until the last transfer into them has ended."""

    blocks: list[int]
    transfers: set[int]


class Pulls:
    """Decode legs whose KV is still elsewhere. `ready` receives each one whose KV is here and confirmed.

    `has_room`: whether a request may have so many blocks now, for all that others need.
    """

    def __init__(
        self,
        me: Peer,
        pool: BlockPool,
        swaps: Swaps,
        block_size: int,
        config: LeaseConfig,
        shared: SharedPrompts,
        outbox: list[Effect],
        ready: Callable[[Request], None],
        failed: Callable[[Request], None],
        has_room: Callable[[Request, int], bool],
    ) -> None:
        self._me = me
        self._pool = pool
        self._swaps = swaps
        self._block_size = block_size
        self._config = config
        self._shared = shared
        self._outbox = outbox
        self._ready = ready
        self._failed = failed
        self._has_room = has_room
        self._unreserved: list[Request] = []  # sorted by rank
        self._by_lease: dict[tuple[int, int], Request] = {}  # (owner incarnation, lease)
        self._transfers: dict[int, Request] = {}
        self._orphans: dict[int, Orphan] = {}  # transfer -> what it may still write
        self._next_transfer = 1
        self.pulled_tokens = 0
        self.swapped_with: set[str] = set()
        """Workers whose blocks are taken in exchange."""

    def __len__(self) -> int:
        return len(self._by_lease)

    def start(self, request: Request, now: float) -> None:
        """Take over a request with `remote` set: tell the owner, pull as soon as there is room."""
        remote = _remote(request)
        self._by_lease[remote.owner.incarnation, remote.lease] = request
        remote.heard_at = now
        self._open(request, now)
        self._shared.claim(request, remote.total)
        bisect.insort(self._unreserved, request, key=lambda other: other.rank)
        self.reserve(now)

    def reserve(self, now: float) -> None:
        """Give blocks to waiting requests, by rank; called whenever blocks may have come free, or others' KV has.
        Those whose prompt is being pulled for another wait for that and let others go before."""
        for request in list(self._unreserved):
            remote = _remote(request)
            owner = self._shared.owner(request, remote.total)
            if owner is not None and owner.settled < remote.total:
                continue
            if not self._has_room(request, 0):
                return
            full = remote.total // self._block_size
            known = self._pool.match(request.block_hashes(self._block_size, full)) if owner is None else []
            if owner is not None:
                known = owner.blocks[:full]
                self._pool.share(known)
            fresh = -(-remote.total // self._block_size) - len(known)
            blocks = self._pool.allocate(fresh, for_pull=True) if self._has_room(request, fresh) else None
            if blocks is None:
                self._pool.release(known)
                return
            self._unreserved.remove(request)
            request.blocks = known + blocks
            remote.hit_blocks = remote.asked_blocks = len(known)
            self._advance(request, now)

    def settled(
        self, key: tuple[int, int], num_tokens: int, blocks: tuple[int, ...], rows: FirstRows | None, now: float
    ) -> None:
        """The owner says that more may be read. Messages may repeat or arrive late."""
        request = self._by_lease.get(key)
        if request is None:
            return
        remote = _remote(request)
        remote.heard_at = now
        if num_tokens > remote.settled:
            remote.settled, remote.source = num_tokens, blocks
        remote.first_rows = remote.first_rows or rows
        if request not in self._unreserved:
            self._advance(request, now)

    def ok(self, key: tuple[int, int], rows: FirstRows | None, now: float) -> None:
        """The owner confirmed: the copy is ours and true, or the keeper will say whose the blocks are."""
        request = self._by_lease.get(key)
        if request is None or _remote(request).confirm_sent_at is None:
            return
        remote = _remote(request)
        remote.heard_at = now
        if not self._shares_pool(remote):
            self._arrived(key, request, now)
        elif rows is not None:
            remote.settled, remote.first_rows = remote.total, rows
            self._advance(request, now)

    def swapped(self, event: Swapped, now: float) -> None:
        """The keeper's word on blocks that were offered for the owner's."""
        key = event.owner_incarnation, event.lease
        request = self._by_lease.get(key)
        if request is None or not _remote(request).offered:
            if event.done:
                raise AssertionError(f"blocks of lease {event.lease} were swapped, but not for any of ours")
            return
        remote = _remote(request)
        remote.offered = False
        if not event.done:
            self._fail(request, "its blocks were not swapped")
            return
        self._pool.exchange(request.blocks, event.blocks)
        request.blocks = list(event.blocks)
        remote.swapped, remote.heard_at = True, now
        self.swapped_with.add(remote.owner.worker)
        request.ledger.transport = "local"
        request.ledger.moved_blocks = len(request.blocks)
        request.ledger.stages[Stage.PULLED] = now
        self._advance(request, now)

    def _arrived(self, key: tuple[int, int], request: Request, now: float) -> None:
        del self._by_lease[key]
        remote = _remote(request)
        request.ledger.stages[Stage.CONFIRMED] = now
        request.ledger.decode_cached_tokens = remote.hit_blocks * self._block_size
        self.pulled_tokens += remote.total - remote.hit_blocks * self._block_size
        self._ready(request)

    def gone(self, key: tuple[int, int]) -> None:
        """The owner no longer vouches for the blocks: discard."""
        request = self._by_lease.get(key)
        if request is not None:
            self._fail(request, "the lease on its KV is gone")

    def pull_done(self, event: PullDone, now: float) -> None:
        """A transfer has ended, well or not."""
        orphan = self._orphans.pop(event.transfer, None)
        if orphan is not None:
            orphan.transfers.remove(event.transfer)
            if not orphan.transfers:
                self._pool.release(orphan.blocks)
            return
        request = self._transfers.pop(event.transfer)
        remote = _remote(request)
        count = remote.pulling.pop(event.transfer)
        if not event.ok:
            self._fail(request, f"the transfer of its KV failed: {event.reason}")
            return
        ledger = request.ledger
        ledger.transport = event.transport
        ledger.moved_blocks += count
        ledger.moved_bytes += event.num_bytes
        self._advance(request, now)

    def cancel(self, request: Request) -> None:
        """Forget the request; blocks under a running transfer follow when it ends."""
        remote = _remote(request)
        key = remote.owner.incarnation, remote.lease
        self._by_lease.pop(key, None)
        if remote.offered:
            self._swaps.withdraw(key, request.blocks)
            request.blocks = []
            return
        if request in self._unreserved:
            self._unreserved.remove(request)
        orphan = Orphan(request.blocks, set(remote.pulling))
        for transfer in orphan.transfers:
            del self._transfers[transfer]
            self._orphans[transfer] = orphan
        if not orphan.transfers:
            self._pool.release(request.blocks)
        request.blocks = []

    def tick(self, now: float) -> None:
        """Renew leases and ask again for confirmations that did not come. A silent owner's lease is as good as gone."""
        for request in list(self._by_lease.values()):
            remote = _remote(request)
            if now - remote.heard_at >= self._config.holder_s:
                self._fail(request, f"{remote.owner.worker}, which has its KV, does not answer")
            elif remote.confirm_sent_at is not None:
                if now - remote.confirm_sent_at >= self._config.renew_interval_s:
                    self._confirm(request, now)
            elif now - remote.opened_at >= self._config.renew_interval_s:
                self._open(request, now)

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity when never."""
        times = (_remote(r).confirm_sent_at or _remote(r).opened_at for r in self._by_lease.values())
        return min(times, default=float("inf")) + self._config.renew_interval_s

    def _advance(self, request: Request, now: float) -> None:
        """Pull what has settled and was not asked for; confirm when all is here."""
        remote = _remote(request)
        done = remote.first_rows is not None and remote.settled >= remote.total
        if remote.swapped and done:
            self._arrived((remote.owner.incarnation, remote.lease), request, now)
            return
        if self._shares_pool(remote):
            if remote.confirm_sent_at is None:
                self._confirm(request, now)
            return
        readable = -(-remote.total // self._block_size) if done else remote.settled // self._block_size
        if readable > remote.asked_blocks:
            self._pull(request, remote.asked_blocks, readable, now)
        if done and not remote.pulling and remote.confirm_sent_at is None:
            request.ledger.stages[Stage.PULLED] = now
            if Stage.PULL_ISSUED in request.ledger.stages:
                request.ledger.transfer_s = now - request.ledger.stages[Stage.PULL_ISSUED]
            self._confirm(request, now)

    def _pull(self, request: Request, first: int, end: int, now: float) -> None:
        remote = _remote(request)
        transfer, self._next_transfer = self._next_transfer, self._next_transfer + 1
        remote.asked_blocks = end
        remote.pulling[transfer] = end - first
        self._transfers[transfer] = request
        request.ledger.stages.setdefault(Stage.PULL_ISSUED, now)
        source, target = (np.array(blocks[first:end], np.int64) for blocks in (remote.source, request.blocks))
        self._outbox.append(Pull(transfer, remote.owner, source, target))

    def _open(self, request: Request, now: float) -> None:
        remote = _remote(request)
        remote.opened_at = now
        self._outbox.append(ToOwner(remote.owner, Open(remote.owner.incarnation, remote.lease, remote.holder)))

    def _confirm(self, request: Request, now: float) -> None:
        remote = _remote(request)
        remote.confirm_sent_at = now
        remote.offered = self._shares_pool(remote) and not remote.swapped
        targets = tuple(request.blocks) if remote.offered else ()
        confirm = Confirm(remote.owner.incarnation, remote.lease, remote.holder, targets)
        self._outbox.append(ToOwner(remote.owner, confirm))

    def _shares_pool(self, remote: RemoteKV) -> bool:
        """Whether blocks of ours can be swapped for the owner's."""
        return bool(self._me.shared_pool) and remote.owner.shared_pool == self._me.shared_pool

    def _fail(self, request: Request, reason: str) -> None:
        self.cancel(request)
        request.state = State.OVER
        self._outbox.append(ToScheduler(Ended(request.sid, request.attempt, request.leg, reason)))
        self._failed(request)


def _remote(request: Request) -> RemoteKV:
    assert request.remote is not None
    return request.remote
