"""The arithmetic of `baton bench serve`, and its result block to the character."""

import json
from pathlib import Path

import pytest

from baton.frontend.bench.dataset import arrival_times, random_work, read_sharegpt
from baton.frontend.bench.report import Metrics, Result, Spread, block, errors, flat, summarise, tpot_s
from baton.proto.errors import UserError

BLOCK = """\
============ Serving Benchmark Result ============
Successful requests:                     1000
Benchmark duration (s):                  151.32
Total input tokens:                      100608
Total generated tokens:                  127697
Request throughput (req/s):              6.61
Output token throughput (tok/s):         843.87
Total Token throughput (tok/s):          1508.72
---------------Time to First Token----------------
Mean TTFT (ms):                          66172.22
Median TTFT (ms):                        56837.92
P99 TTFT (ms):                           144176.81
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          238.06
Median TPOT (ms):                        265.18
P99 TPOT (ms):                           369.99
---------------Inter-token Latency----------------
Mean ITL (ms):                           240.68
Median ITL (ms):                         241.09
P99 ITL (ms):                            2159.38
=================================================="""


def spread(mean: float, median: float, p99: float, **more: float) -> Spread:
    return Spread(mean, median, 0.0, {99: p99} | {float(name[1:]): value for name, value in more.items()})


LATENCIES = {
    "ttft": spread(66172.22, 56837.92, 144176.81),
    "tpot": spread(238.06, 265.18, 369.99),
    "itl": spread(240.68, 241.09, 2159.38),
    "e2el": spread(1.0, 2.0, 3.0, p50=2.0),
}


def test_block_is_the_fields_own_to_the_character() -> None:
    assert block(Metrics(1000, 151.3235, 100608, 127697, LATENCIES)) == BLOCK


def test_block_shows_what_was_asked_for() -> None:
    lines = block(Metrics(1000, 151.32, 100608, 127697, LATENCIES, request_goodput=5.5), ("e2el",)).splitlines()
    assert lines[6] == "Request goodput (req/s):                 5.50"
    assert lines[9:-1] == [
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms):                          1.00",
        "Median E2EL (ms):                        2.00",
        "P99 E2EL (ms):                           3.00",
        "P50 E2EL (ms):                           2.00",
    ]


def test_tpot_leaves_the_first_token_out() -> None:
    assert tpot_s(Result(output_tokens=11, ttft_s=0.5, latency_s=1.5)) == pytest.approx(0.1)


def test_summary_of_two_successes_and_a_failure() -> None:
    results = [
        Result(input_tokens=10, output_tokens=3, ttft_s=0.1, itl_s=[0.2, 0.4], latency_s=0.7),
        Result(input_tokens=20, output_tokens=1, ttft_s=0.3, latency_s=0.3),
        Result(input_tokens=99, output_tokens=99, error="HTTP 429"),
    ]
    metrics = summarise(results, duration_s=2.0)
    assert (metrics.completed, metrics.total_input_tokens, metrics.total_output_tokens) == (2, 30, 4)
    assert (metrics.request_throughput, metrics.output_throughput, metrics.total_token_throughput) == (1.0, 2.0, 17.0)
    assert metrics.latencies["ttft"].mean == pytest.approx(200.0)
    assert metrics.latencies["ttft"].percentiles[99] == pytest.approx(298.0)
    assert metrics.latencies["tpot"].mean == pytest.approx(300.0)
    assert metrics.latencies["itl"].median == pytest.approx(300.0)
    assert metrics.latencies["e2el"].mean == pytest.approx(500.0)
    assert metrics.request_goodput is None
    assert errors(results) == [("HTTP 429", 1)]


def test_summary_of_nothing_is_zeros() -> None:
    assert summarise([], duration_s=1.0).latencies["itl"].percentiles[99] == 0.0


def test_goodput_counts_requests_that_meet_every_target() -> None:
    results = [
        Result(output_tokens=3, ttft_s=0.1, latency_s=0.7),
        Result(output_tokens=3, ttft_s=0.3, latency_s=0.5),
        Result(output_tokens=1, ttft_s=0.1, latency_s=0.1),
        Result(output_tokens=3, ttft_s=0.1, latency_s=0.2, error="HTTP 500"),
    ]
    targets = {"ttft": 200.0, "tpot": 250.0}
    assert summarise(results, duration_s=4.0, targets_ms=targets).request_goodput == 0.25
    assert summarise(results, duration_s=4.0, targets_ms={"e2el": 600.0}).request_goodput == 0.5


def test_result_files_name_the_figures_as_vllm_does() -> None:
    results = [Result(input_tokens=10, output_tokens=3, ttft_s=0.1, itl_s=[0.2, 0.4], latency_s=0.7)]
    figures = flat(summarise(results, 2.0, percentiles=(50, 99.9), targets_ms={"e2el": 600.0}))
    assert figures["request_throughput"] == 0.5
    assert figures["request_goodput"] == 0.0
    assert figures["mean_ttft_ms"] == pytest.approx(100.0)
    assert figures["std_ttft_ms"] == 0.0
    assert figures["p50_itl_ms"] == pytest.approx(300.0)
    assert {"median_e2el_ms", "p99.9_tpot_ms", "total_token_throughput"} <= set(figures)


def test_random_prompts_have_exact_lengths_and_follow_the_seed() -> None:
    work = random_work(5, 100, 20, 0.0, seed=3)
    assert [(len(prompt), output_len) for prompt, output_len in work] == [(100, 20)] * 5
    assert work == random_work(5, 100, 20, 0.0, seed=3)
    assert work != random_work(5, 100, 20, 0.0, seed=4)


def test_range_ratio_spreads_lengths() -> None:
    lengths = [len(prompt) for prompt, _ in random_work(200, 100, 20, 0.5, seed=0)]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 30


def test_arrivals_are_poisson_at_the_rate_or_all_at_once() -> None:
    times = arrival_times(20_000, 10.0, 1.0, seed=0)
    assert times[-1] == pytest.approx(2000, rel=0.05)
    assert times == sorted(times)
    assert arrival_times(3, float("inf"), 1.0, seed=0) == [0.0, 0.0, 0.0]


def test_sharegpt_takes_the_first_two_turns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "more"}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {"id": "empty"}]))
    assert read_sharegpt(file, seed=0) == [("q", "a")]


def test_a_file_of_another_shape_is_a_users_error(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('["no", "conversations"]')
    with pytest.raises(UserError, match=r"data\.json is no ShareGPT-style JSON file"):
        read_sharegpt(file, seed=0)
