"""Metrics: every series from the start, counters that survive restarts, stages that add up."""

from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.proto.messages import Close, KVLink, Ledger, Load, SamplingParams, Submit
from baton.scheduler_proc.instructions import LoadReport, WorkerJoined, WorkerLeft
from baton.scheduler_proc.metrics import DEPARTED, Metrics

STAGES = {
    "received": 1.0,
    "submitted": 1.1,
    "scheduled": 1.3,
    "sampled": 1.6,
    "first_token": 1.61,
    "reported": 1.615,
    "bound": 1.62,
    "pull_issued": 1.63,
    "pulled": 1.65,
    "confirmed": 1.66,
    "stepped": 1.7,
    "finished": 2.61,
}


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.observe(WorkerJoined("prefill-0", "prefill"))
    metrics.observe(WorkerJoined("decode-0", "decode"))
    return metrics


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(metrics.text()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield sample.name, sample.labels, sample.value


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return sum(v for n, found, v in samples(metrics) if n == name and labels.items() <= found.items())


def test_every_series_exists_as_zero_once_workers_are_there(metrics: Metrics) -> None:
    found = {name: total for name, _, total in samples(metrics)}
    for name in ("requests_running", "requests_waiting", "kv_blocks_used", "kv_blocks_total", "kv_leases"):
        assert found[f"baton_{name}"] == 0
    for name in ("requests_total", "tokens_total", "embeddings_total", "preemptions_total", "retries_total"):
        assert found[f"baton_{name}"] == 0
    for name in ("ttft", "tpot", "queue", "prefill", "handoff", "decode"):
        assert found[f"baton_{name}_seconds_count"] == 0


def test_a_load_sets_gauges_and_counts_tokens(metrics: Metrics, idle: Load) -> None:
    load = msgspec.structs.replace(idle, used_blocks=3, free_blocks=7, leases=2, computed_tokens=64)
    metrics.observe(LoadReport("prefill-0", 1, "prefill", load))
    metrics.observe(LoadReport("prefill-0", 1, "prefill", msgspec.structs.replace(load, computed_tokens=100)))
    assert value(metrics, "baton_kv_blocks_used", worker="prefill-0", role="prefill") == 3
    assert value(metrics, "baton_kv_blocks_total", worker="prefill-0") == 10
    assert value(metrics, "baton_kv_leases") == 2
    assert value(metrics, "baton_tokens_total", source="computed", worker="prefill-0") == 100


def test_counters_go_on_over_a_workers_restart(metrics: Metrics, idle: Load) -> None:
    load = msgspec.structs.replace(idle, generated_tokens=50, preemptions=1, pooled_vectors=3)
    metrics.observe(LoadReport("decode-0", 1, "decode", load))
    metrics.observe(LoadReport("decode-0", 2, "decode", msgspec.structs.replace(load, generated_tokens=20)))
    assert value(metrics, "baton_tokens_total", source="generated") == 70
    assert value(metrics, "baton_preemptions_total") == 2
    assert value(metrics, "baton_embeddings_total", worker="decode-0") == 6


def test_gauges_of_a_worker_that_left_end_and_its_counters_stay(metrics: Metrics, idle: Load) -> None:
    metrics.observe(LoadReport("decode-0", 1, "decode", msgspec.structs.replace(idle, generated_tokens=50)))
    metrics.observe(WorkerLeft("decode-0", "decode"))
    pools = {labels["worker"] for name, labels, _ in samples(metrics) if name == "baton_kv_blocks_total"}
    assert pools == {"prefill-0"}
    assert value(metrics, "baton_tokens_total", worker="decode-0") == 50


def test_close_is_counted_by_outcome_and_timed_by_its_ledger(metrics: Metrics) -> None:
    ledger = Ledger(prefill_worker="prefill-0", decode_worker="decode-0", stages=STAGES)
    metrics.observe(Close((1, 1), 1, "stop", 64, 11, ledger))
    assert value(metrics, "baton_requests_total", outcome="stop") == 1
    assert value(metrics, "baton_ttft_seconds_sum", worker="prefill-0") == pytest.approx(0.61)
    assert value(metrics, "baton_queue_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "baton_prefill_seconds_sum") == pytest.approx(0.3)
    assert value(metrics, "baton_handoff_seconds_sum", worker="decode-0") == pytest.approx(0.1)
    assert value(metrics, "baton_decode_seconds_sum") == pytest.approx(0.91)
    assert value(metrics, "baton_tpot_seconds_sum") == pytest.approx(0.1)


def test_links_and_moved_bytes_are_counted_by_transport(metrics: Metrics, idle: Load) -> None:
    assert value(metrics, "baton_kv_links", worker="decode-0", transport="shm") == 0
    assert value(metrics, "baton_kv_moved_bytes_total", worker="decode-0", transport="shm") == 0
    two = (KVLink("prefill-0", "shm"), KVLink("prefill-1", "", "it does not answer"))
    metrics.observe(LoadReport("decode-0", 1, "decode", msgspec.structs.replace(idle, links=two)))
    metrics.observe(LoadReport("decode-0", 1, "decode", idle))
    assert value(metrics, "baton_kv_links", worker="decode-0", transport="shm") == 1
    assert value(metrics, "baton_kv_links", worker="decode-0", transport="none") == 1
    metrics.observe(LoadReport("decode-0", 1, "decode", msgspec.structs.replace(idle, links=())))
    assert value(metrics, "baton_kv_links") == 0
    ledger = Ledger(prefill_worker="prefill-0", decode_worker="decode-0", transport="tcp", moved_bytes=100)
    metrics.observe(Close((1, 1), 1, "stop", 64, 11, ledger))
    assert value(metrics, "baton_kv_moved_bytes_total", transport="tcp", worker="decode-0") == 100
    metrics.observe(WorkerLeft("decode-0", "decode"))
    assert not [labels for name, labels, _ in samples(metrics) if name == "baton_kv_links"]


def test_the_stages_of_a_handoff_add_up_to_it(metrics: Metrics) -> None:
    ledger = Ledger(prefill_worker="prefill-0", decode_worker="decode-0", stages=STAGES)
    metrics.observe(Close((1, 1), 1, "stop", 64, 11, ledger))
    assert value(metrics, "baton_handoff_stage_seconds_sum", stage="reported") == pytest.approx(0.015)
    assert value(metrics, "baton_handoff_stage_seconds_sum", stage="pulled") == pytest.approx(0.02)
    total = value(metrics, "baton_handoff_seconds_sum")
    assert value(metrics, "baton_handoff_stage_seconds_sum") == pytest.approx(total)


EARLY = {**STAGES, "bound": 1.4, "pull_issued": 1.41, "pulled": 1.64}
NOTHING_TO_PULL = {stage: at for stage, at in STAGES.items() if stage not in ("pull_issued", "pulled")}


@pytest.mark.parametrize("stages", [EARLY, NOTHING_TO_PULL], ids=["bound early", "nothing to pull"])
def test_the_sum_of_the_stages_is_the_whole_whichever_of_them_came(metrics: Metrics, stages: dict[str, float]) -> None:
    stages = {stage: at for stage, at in stages.items() if stage != "reported"}
    metrics.observe(Close((1, 1), 1, "stop", 64, 11, Ledger("prefill-0", "decode-0", stages=stages)))
    assert value(metrics, "baton_handoff_stage_seconds_sum") == pytest.approx(0.1)
    assert value(metrics, "baton_handoff_stage_seconds_count", stage="bound") == 1
    assert value(metrics, "baton_handoff_stage_seconds_sum", stage="bound") == pytest.approx(
        0.02 if stages["bound"] > stages["sampled"] else 0
    )


def test_a_request_that_ended_early_is_timed_as_far_as_it_came(metrics: Metrics) -> None:
    metrics.observe(Close((1, 1), 1, "rejected", 64, 0, Ledger(stages={"received": 1.0, "finished": 1.1})))
    assert value(metrics, "baton_requests_total", outcome="rejected") == 1
    assert value(metrics, "baton_ttft_seconds_count") == 0


def test_a_part_of_a_request_is_no_request(metrics: Metrics) -> None:
    ledger = Ledger("prefill-0", "decode-0", stages=STAGES, client="me")
    before = metrics.text()
    metrics.observe(Close((1, 1), 1, "length", 64, 1, ledger, part=True))
    assert metrics.text() == before


def test_retries_and_the_schedulers_own_queue_are_counted(metrics: Metrics) -> None:
    metrics.observe(Submit((1, 1), 2, 64, SamplingParams(max_tokens=16)))
    metrics.set_queued(3)
    assert value(metrics, "baton_retries_total") == 1
    assert value(metrics, "baton_requests_waiting", worker="scheduler") == 3


def test_counters_of_workers_that_left_end_once_many_have_left_since(metrics: Metrics, idle: Load) -> None:
    lines = metrics.text().count("\n")
    for i in range(3 * DEPARTED):
        metrics.observe(WorkerJoined(f"decode-{i}", "decode"))
        load = msgspec.structs.replace(idle, generated_tokens=1)
        metrics.observe(LoadReport(f"decode-{i}", i, "decode", load))
        metrics.observe(WorkerLeft(f"decode-{i}", "decode"))
    names = {labels["worker"] for _, labels, _ in samples(metrics) if "worker" in labels}
    assert names == {"prefill-0", "scheduler", *(f"decode-{i}" for i in range(2 * DEPARTED, 3 * DEPARTED))}
    assert value(metrics, "baton_tokens_total", source="generated") == DEPARTED
    assert metrics.text().count("\n") < (DEPARTED + 1) * lines
    before = metrics.text()
    late = Ledger(prefill_worker="decode-0", decode_worker="decode-1", stages=STAGES)
    metrics.observe(Close((1, 1), 1, "stop", 3, 3, late))
    assert metrics.text().count("\n") == before.count("\n")
