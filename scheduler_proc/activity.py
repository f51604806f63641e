"""The periodic log line: what the cluster does, while it does something."""

import logging

from baton.scheduler_proc.cluster import Cluster

log = logging.getLogger(__name__)


class Activity:
    """Reads the cluster; `tick` logs every `interval_s` seconds in which there was work."""

    def __init__(self, cluster: Cluster, interval_s: float) -> None:
        self._cluster = cluster
        self._interval_s = interval_s
        self._logged_at: float | None = None
        self._generated: dict[bytes, int] = {}

    def tick(self, now: float) -> None:
        """Called often; costs nothing between lines."""
        if self._logged_at is not None and now - self._logged_at < self._interval_s:
            return
        elapsed_s, self._logged_at = now - (self._logged_at if self._logged_at is not None else now), now
        loads = {peer: worker.load for peer, worker in self._cluster.registry.workers.items() if worker.load}
        # Whom it sees for the first time may have worked for another scheduler before.
        known = [
            (load.generated_tokens, self._generated[peer]) for peer, load in loads.items() if peer in self._generated
        ]
        new_tokens = sum(now_generated - before for now_generated, before in known)
        self._generated = {peer: load.generated_tokens for peer, load in loads.items()}
        if not elapsed_s or (self._cluster.idle and not new_tokens):
            return
        running = sum(load.running for load in loads.values())
        waiting = sum(load.waiting for load in loads.values()) + len(self._cluster.queue)
        used = sum(load.used_blocks for load in loads.values())
        total = sum(load.used_blocks + load.free_blocks for load in loads.values())
        log.info(
            "%.1f tokens/s, %d running, %d waiting, KV %.1f %% of %d blocks",
            new_tokens / elapsed_s,
            running,
            waiting,
            100 * used / max(total, 1),
            total,
        )
