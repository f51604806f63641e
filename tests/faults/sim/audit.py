"""What must hold of a worker's blocks at any moment, and of everything when all is quiet."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from baton.keeper.shares import Shares
from baton.proto.lifecycle import Outcome, RejectCode, Role
from baton.scheduler_proc.cluster import Cluster
from baton.worker.batcher import Batcher
from baton.worker.request import Request

from .frontend import Call
from .worker import WorkerSpec


def audit_blocks(batcher: Batcher) -> None:
    """Every block is free, cached, fenced or owned, and has as many references as owners."""
    pool = batcher.pool
    owners: Counter[int] = Counter()
    for request in batcher._requests.values():
        owners.update(request.blocks)
    for orphan in {id(orphan): orphan for orphan in batcher._pulls._orphans.values()}.values():
        owners.update(orphan.blocks)
    for limbo in batcher._swaps._limbo.values():
        owners.update(limbo)
    copied = Counter(block for step in batcher._steps._in_flight for block in step.copied)
    idle = [*pool._free, *pool._cached, *(block for _, block in pool._fenced)]
    assert len(idle) == len(set(idle)), f"blocks are free twice: {[b for b, n in Counter(idle).items() if n > 1]}"
    for block in pool._references:
        assert pool._references[block] == owners[block] + copied[block], (
            f"block {block} has {pool._references[block]} references, {owners[block]} owners, {copied[block]} copies"
        )
    kept = set(owners) | set(copied)
    assert set(idle).isdisjoint(kept), f"blocks are free and owned: {set(idle) & kept}"
    lost = set(pool._references) - set(idle) - kept
    assert not lost, f"blocks are neither free nor owned: {lost}"
    assert len(pool._references) == pool.num_blocks, f"{len(pool._references)} blocks instead of {pool.num_blocks}"
    for request in batcher._requests.values():
        for block in request.blocks[_num_known(request, batcher._block_size) :]:
            assert owners[block] == 1, f"block {block} is shared but may still be written"


def _num_known(request: Request, block_size: int) -> int:
    """Leading blocks that nobody writes any more: full and settled, or found here by a leg that pulls the rest."""
    pulls = request.remote is not None and not request.settled
    return request.remote.hit_blocks if pulls else request.settled // block_size


def audit_shares(batchers: list[Batcher]) -> None:
    """No block is in use by two workers. What is in limbo is used by nobody, and may be another's by now."""
    users: Counter[int] = Counter()
    for batcher in batchers:
        limbo = {block for limbo in batcher._swaps._limbo.values() for block in limbo}
        offered = {b for r in batcher._pulls._by_lease.values() if r.remote and r.remote.offered for b in r.blocks}
        users.update(set(batcher.pool._references) - limbo - offered)
    assert not [b for b, n in users.items() if n > 1], f"in use twice: {[b for b, n in users.items() if n > 1]}"


def audit_keeper(batchers: list[Batcher], shares: Shares) -> None:
    """When all is quiet workers and keeper agree on every block."""
    for batcher in batchers:
        owned = set(np.flatnonzero(shares._owner == shares._index[batcher.me.worker]).tolist())
        assert set(batcher.pool._references) == owned, f"{batcher.me.worker} and the keeper differ"


def leftovers(batcher: Batcher) -> str:
    """What a worker still keeps; empty when nothing."""
    if batcher._swaps._limbo or batcher.holdings() or batcher.pool.num_used or batcher.leases.num_live:
        used, leases = batcher.pool.num_used, batcher.leases.num_live
        return f"{batcher.me.worker}: {used} blocks, {leases} leases, {batcher.holdings()}"
    if batcher._device.prompts_since is not None:
        return f"{batcher.me.worker} gives way to prompts that are not there"
    return ""


def scheduler_leftovers(cluster: Cluster) -> str:
    """What the scheduler still keeps; empty when nothing."""
    streams = {sid: stream.state.name for sid, stream in cluster.streams.items()}
    promised = {w.name: len(w.promises) for w in cluster.registry.workers.values() if w.promises or w.streams}
    return f"scheduler: {streams} {promised}" if streams or promised or len(cluster.queue) else ""


def held_until(specs: Sequence[WorkerSpec], call: Call, complete: bool) -> int:
    """At how many tokens these workers would end a call, as it is now, at the latest; 0 when none can go on with it.

    `complete`: all have been there once, and so may do what is not their role.
    """
    owners = [spec for spec in specs if spec.role != Role.DECODE]
    if call.vector:
        paths = [(owner, owner) for owner in owners]
    else:
        takers = [spec for spec in specs if spec.role != Role.PREFILL]
        paths = [(one, two) for one in owners for two in takers if one is two or one.role == Role.PREFILL]
    needed = call.num_tokens + min(call.params.max_tokens, 1)
    by_roles = [two.max_model_len for one, two in paths if needed <= min(one.max_model_len, two.max_model_len)]
    alone = [spec.max_model_len for spec in specs if spec.max_model_len >= needed - bool(call.received)]
    return max(by_roles or alone * complete, default=0)


def audit_end(call: Call, left: Sequence[WorkerSpec], complete: bool) -> None:
    """Who was turned away, or given up, hears why; and only what nobody who is left can hold is given up."""
    match call.outcome:
        case Outcome.REJECTED:
            assert call.message, f"rejected without a reason: {call}"
            assert call.code in list(RejectCode), f"rejected for {call.code}: {call.message}"
            needed = call.num_tokens + min(call.params.max_tokens, 1)
            short = needed <= min(call.contexts, default=0)
            assert call.code != RejectCode.TOO_LONG or not short, f"anybody could hold it: {call.message}"
        case Outcome.FAILED:
            assert call.message.startswith("the request could not be resumed"), f"failed: {call.message}"
            assert not held_until(left, call, complete), f"given up, and somebody could hold it: {call.message}"
        case Outcome.IMPOSSIBLE:
            raise AssertionError(f"sent where it can't be served: {call.message}")
