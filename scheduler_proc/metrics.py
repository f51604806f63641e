"""The cluster's metrics, as Prometheus reads them.

Gauges and token counters come from workers' Loads, request metrics from the ledgers that frontends send with Close.
Every series exists, as 0, from the moment its worker joins; a worker's gauges end when it leaves, its counters stay
until DEPARTED others have left after it.
"""

from collections import Counter as Counts

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from baton.proto.config import KV_TRANSFERS
from baton.proto.lifecycle import HANDOFF_PARTS, Outcome, Role, Stage, handoff_parts
from baton.proto.messages import Close, Load, Submit
from baton.scheduler_proc.instructions import LoadReport, WorkerJoined, WorkerLeft

DEPARTED = 64
"""Workers that have left and whose counters are still there. With a name for each start they would add up."""

WORKER_LABELS = ("worker", "role")
SCHEDULER_LABELS = ("scheduler", "scheduler")
"""Under which the scheduler's own queue is counted among the waiting."""

NO_TRANSPORT = "none"
TRANSPORTS = (*sorted({name for names in KV_TRANSFERS.values() for name in names}), NO_TRANSPORT)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TPOT_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)

GAUGES = {
    "baton_requests_running": "Streams in the running set of a worker",
    "baton_requests_waiting": "Streams waiting at a worker, and in the scheduler's queue",
    "baton_kv_blocks_used": "KV blocks held by requests or leases; merely cached ones are free",
    "baton_kv_blocks_total": "KV blocks of a worker's pool",
    "baton_kv_leases": "Leases that pin blocks for a handoff",
}
PREFILL_SPANS = {
    "baton_ttft_seconds": ("Request received to first token accepted", Stage.RECEIVED, Stage.FIRST_TOKEN),
    "baton_queue_seconds": ("Submitted to first chunk scheduled", Stage.SUBMITTED, Stage.SCHEDULED),
    "baton_prefill_seconds": ("First chunk scheduled to first token sampled", Stage.SCHEDULED, Stage.SAMPLED),
}
DECODE_SPANS = {
    "baton_handoff_seconds": ("First token sampled to first decode step", Stage.SAMPLED, Stage.STEPPED),
    "baton_decode_seconds": ("First decode step to the end", Stage.STEPPED, Stage.FINISHED),
}


class Metrics:
    """One instance per scheduler, with its own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges = {name: self._gauge(name, text) for name, text in GAUGES.items()}
        self._requests = self._counter("baton_requests", "Requests by how they ended", ("outcome",))
        self._client_tokens = self._counter(
            "baton_client_tokens", "Tokens of requests that have ended, by the name of the API key", ("client", "kind")
        )
        self._tokens = self._counter(
            "baton_tokens",
            "Prompt tokens computed, found in a prefix cache or pulled from another worker; tokens generated",
            ("source", *WORKER_LABELS),
        )
        self._vectors = self._counter("baton_embeddings", "Vectors made of prompts", WORKER_LABELS)
        self._preemptions = self._counter("baton_preemptions", "Streams preempted for lack of blocks", WORKER_LABELS)
        self._moved = self._counter(
            "baton_kv_moved_bytes", "KV that came from another worker, by transport", ("transport", *WORKER_LABELS)
        )
        self._links = Gauge(
            "baton_kv_links",
            "Workers whose KV a worker reads, by transport; none: it can't",
            ("transport", *WORKER_LABELS),
            registry=self._registry,
        )
        self._retries = self._counter("baton_retries", "Attempts that ended and were continued by another", ())
        spans = {**PREFILL_SPANS, **DECODE_SPANS}
        self._spans = {name: self._histogram(name, text, SECONDS) for name, (text, _, _) in spans.items()}
        self._tpot = self._histogram("baton_tpot_seconds", "Time per output token after the first", TPOT_SECONDS)
        self._handoff_stages = Histogram(
            "baton_handoff_stage_seconds",
            "Parts of the handoff, each up to the stage it is named after; their sum is baton_handoff_seconds",
            ("stage", *WORKER_LABELS),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._roles: dict[str, str] = {}
        self._departed: dict[str, None] = {}
        """Names of workers, those that left first first."""
        self._counted: dict[str, tuple[int, Load]] = {}  # worker -> its incarnation and last report
        for outcome in Outcome:
            self._requests.labels(outcome.value)
        self.set_queued(0)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, WORKER_LABELS, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, WORKER_LABELS, buckets=buckets, registry=self._registry)

    def text(self) -> str:
        """Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def set_queued(self, count: int) -> None:
        """Streams that wait at the scheduler for a prefill worker."""
        self._gauges["baton_requests_waiting"].labels(*SCHEDULER_LABELS).set(count)

    def observe(self, event: Close | Submit | LoadReport | WorkerJoined | WorkerLeft) -> None:
        """What the cluster asked to have observed."""
        match event:
            case WorkerJoined():
                self._joined(event)
            case WorkerLeft():
                for gauge in self._gauges.values():
                    gauge.remove(event.worker, event.role)
                for transport in TRANSPORTS if event.role != Role.PREFILL else ():
                    self._links.remove(transport, event.worker, event.role)
                self._departed[event.worker] = None
                if len(self._departed) > DEPARTED:
                    self._forget(next(iter(self._departed)))
            case LoadReport():
                self._load(event)
            case Submit():  # of a later attempt
                self._retries.inc()
            case Close(part=False):
                self._closed(event)

    def _joined(self, event: WorkerJoined) -> None:
        labels = (event.worker, event.role)
        self._roles[event.worker] = event.role
        self._departed.pop(event.worker, None)
        for gauge in self._gauges.values():
            gauge.labels(*labels)
        for source in ("computed", "cached", "pulled", "generated"):
            self._tokens.labels(source, *labels)
        self._preemptions.labels(*labels)
        self._vectors.labels(*labels)
        if event.role != Role.DECODE:
            for name in PREFILL_SPANS:
                self._spans[name].labels(*labels)
        if event.role != Role.PREFILL:
            for name in DECODE_SPANS:
                self._spans[name].labels(*labels)
            self._tpot.labels(*labels)
            for transport in TRANSPORTS:
                self._links.labels(transport, *labels)
                self._moved.labels(transport, *labels)
            for stage in HANDOFF_PARTS:
                self._handoff_stages.labels(stage.value, *labels)

    def _forget(self, worker: str) -> None:
        counters = (self._tokens, self._vectors, self._preemptions, self._moved, self._handoff_stages, self._tpot)
        for metric in (*counters, *self._spans.values()):
            metric.remove_by_labels({"worker": worker})
        del self._departed[worker]
        self._roles.pop(worker, None)
        self._counted.pop(worker, None)

    def _load(self, event: LoadReport) -> None:
        load, labels = event.load, (event.worker, event.role)
        gauges = self._gauges
        gauges["baton_requests_running"].labels(*labels).set(load.running)
        gauges["baton_requests_waiting"].labels(*labels).set(load.waiting)
        gauges["baton_kv_blocks_used"].labels(*labels).set(load.used_blocks)
        gauges["baton_kv_blocks_total"].labels(*labels).set(load.used_blocks + load.free_blocks)
        gauges["baton_kv_leases"].labels(*labels).set(load.leases)
        incarnation, before = self._counted.get(event.worker, (0, None))
        if incarnation != event.incarnation:
            before = None  # a new process counts from 0
        self._counted[event.worker] = event.incarnation, load
        for source in ("computed", "cached", "pulled", "generated"):
            name = f"{source}_tokens"
            self._tokens.labels(source, *labels).inc(getattr(load, name) - (getattr(before, name) if before else 0))
        if load.links is not None and event.role != Role.PREFILL:
            links = Counts(link.transport or NO_TRANSPORT for link in load.links)
            for transport in TRANSPORTS:
                self._links.labels(transport, *labels).set(links[transport])
        self._preemptions.labels(*labels).inc(load.preemptions - (before.preemptions if before else 0))
        self._vectors.labels(*labels).inc(load.pooled_vectors - (before.pooled_vectors if before else 0))

    def _closed(self, close: Close) -> None:
        ledger = close.ledger
        self._requests.labels(close.outcome).inc()
        if ledger.client:
            for kind, count in (("prompt", close.prompt_tokens), ("output", close.output_tokens)):
                self._client_tokens.labels(ledger.client, kind).inc(count)
        for spans, worker in ((PREFILL_SPANS, ledger.prefill_worker), (DECODE_SPANS, ledger.decode_worker)):
            for name, (_, start, end) in spans.items():
                seconds = _between(ledger.stages, start, end)
                if worker in self._roles and seconds is not None:
                    self._spans[name].labels(worker, self._roles[worker]).observe(seconds)
        if ledger.decode_worker not in self._roles:
            return
        labels = (ledger.decode_worker, self._roles[ledger.decode_worker])
        decoding = _between(ledger.stages, Stage.FIRST_TOKEN, Stage.FINISHED)
        if decoding is not None and close.output_tokens > 1:
            self._tpot.labels(*labels).observe(decoding / (close.output_tokens - 1))
        if ledger.moved_bytes:
            self._moved.labels(ledger.transport, *labels).inc(ledger.moved_bytes)
        for stage, seconds in handoff_parts(ledger.stages).items():
            self._handoff_stages.labels(stage.value, *labels).observe(seconds)


def _between(stages: dict[str, float], start: Stage, end: Stage) -> float | None:
    """Seconds, or None when one of the two moments did not come, or came in the wrong order over several attempts."""
    if start not in stages or end not in stages or stages[end] < stages[start]:
        return None
    return stages[end] - stages[start]
