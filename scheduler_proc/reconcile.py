"""What the scheduler believes against what its peers say they have.

    a stream that a worker should hold and does not, for reconcile_after_s ─► Retry
    a holding that no stream accounts for ─► CancelCommand (after grace_s: its frontend may be about to claim it)
    after a restart: Claim + Holding of one attempt ─► adopted; a Claim alone for grace_s ─► Retry (cluster.py)

This takes the place of an acknowledgement for each message between scheduler and workers.
"""

from collections.abc import Callable, Sequence

from baton.proto.config import SchedulerConfig
from baton.proto.messages import Claim, Holding, Sid
from baton.scheduler_proc.legs import Legs
from baton.scheduler_proc.registry import Registry, Worker
from baton.scheduler_proc.stream import Leg, State, Stream


class Reconciler:
    """Compares reports with beliefs; `retry` ends an attempt that turned out to be nowhere."""

    def __init__(
        self,
        config: SchedulerConfig,
        registry: Registry,
        streams: dict[Sid, Stream],
        legs: Legs,
        retry: Callable[[Stream, str, float], None],
    ) -> None:
        self._config = config
        self._registry = registry
        self._streams = streams
        self._legs = legs
        self._retry = retry

    def claim(self, frontend: bytes, claims: Sequence[Claim], now: float) -> None:
        """A frontend has introduced itself with its open streams."""
        for claim in claims:
            if claim.sid in self._streams:
                continue
            stream = Stream(
                sid=claim.sid,
                attempt=claim.attempt,
                frontend=frontend,
                prompt_len=claim.prompt_len,
                since=now,
                state=State.CLAIMED,
                arrived=now,
                request=claim.request,
            )
            self._streams[claim.sid] = stream
            for worker in self._registry.workers.values():
                leg = worker.holdings.get((claim.sid, claim.attempt))
                if leg is not None:
                    self._legs.adopt(stream, worker, leg, now)

    def holdings(self, worker: Worker, holdings: Sequence[Holding], now: float) -> None:
        """A worker has listed all that it keeps."""
        worker.holdings = {(holding.sid, holding.attempt): holding.leg for holding in holdings}
        for sid in list(worker.streams):
            stream = self._streams[sid]
            leg = stream.leg_on(worker.identity)
            assert leg is not None
            if (sid, stream.attempt) in worker.holdings:
                leg.absent_since = None
            else:
                self._absent(worker, stream, leg, now)
        for (sid, attempt), name in worker.holdings.items():
            self._account_for(worker, sid, attempt, name, now)

    def _absent(self, worker: Worker, stream: Stream, leg: Leg, now: float) -> None:
        """A command that has not been applied may still be on its way: give it longer, but not for ever."""
        applied = worker.load is not None and worker.load.last_cmd_seq >= leg.cmd_seq
        if not applied and now - leg.sent_at < self._config.reconcile_after_s:
            return
        if leg.absent_since is None:
            leg.absent_since = now
        elif now - leg.absent_since >= self._config.reconcile_after_s:
            self._retry(stream, f"{worker.name} does not have it any more", now)

    def _account_for(self, worker: Worker, sid: Sid, attempt: int, leg: str, now: float) -> None:
        stream = self._streams.get(sid)
        if stream is not None and stream.attempt == attempt:
            if stream.leg_on(worker.identity) is not None:
                return
            if stream.state is State.CLAIMED or _is_other_half(stream, leg):
                self._legs.adopt(stream, worker, leg, now)
                return
        elif stream is None and now - worker.joined_at < self._config.grace_s:
            return
        self._legs.cancel(worker.identity, sid, attempt)


def _is_other_half(stream: Stream, leg: str) -> bool:
    """Whether an adopted stream lacks just this leg: its workers come back one after the other."""
    adopted = bool(stream.legs) and all(leg.cmd_seq == 0 for leg in stream.legs)
    return adopted and (stream.decode if leg == "decode" else stream.prefill) is None
