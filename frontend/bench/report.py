"""From the timings of requests to the figures that the field compares."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH = 50


@dataclass
class Result:
    """One request, seen by the client."""

    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    """Sent until the first token arrived."""
    itl_s: list[float] = field(default_factory=list)
    """Gaps between the arrivals after it."""
    latency_s: float = 0.0
    """Sent until the last token arrived."""
    error: str = ""
    """Empty when it succeeded."""


@dataclass(frozen=True)
class Metrics:
    """Totals over the successful requests; latencies in milliseconds."""

    completed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p99_itl_ms: float


def tpot_s(result: Result) -> float:
    """Time per output token without the first: (E2E - TTFT) / (n - 1), for n > 1."""
    return (result.latency_s - result.ttft_s) / (result.output_tokens - 1)


def summarise(results: Sequence[Result], duration_s: float) -> Metrics:
    """Figures of a run that took duration_s; failed requests count nowhere."""
    done = [result for result in results if not result.error]
    inputs = sum(result.input_tokens for result in done)
    outputs = sum(result.output_tokens for result in done)
    return Metrics(
        len(done),
        duration_s,
        inputs,
        outputs,
        len(done) / duration_s,
        outputs / duration_s,
        (inputs + outputs) / duration_s,
        *_spread_ms([result.ttft_s for result in done]),
        *_spread_ms([tpot_s(result) for result in done if result.output_tokens > 1]),
        *_spread_ms([gap for result in done for gap in result.itl_s]),
    )


def _spread_ms(seconds: list[float]) -> tuple[float, float, float]:
    """Mean, median and 99th percentile; zeros for nothing."""
    values = np.array(seconds or [0.0]) * 1000
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 99))


def block(metrics: Metrics) -> str:
    """The result block that users of vLLM's and SGLang's benchmarks know, to the character."""
    m = metrics
    return "\n".join(
        [
            f"{' Serving Benchmark Result ':=^{WIDTH}}",
            _line("Successful requests:", m.completed),
            _line("Benchmark duration (s):", m.duration),
            _line("Total input tokens:", m.total_input_tokens),
            _line("Total generated tokens:", m.total_output_tokens),
            _line("Request throughput (req/s):", m.request_throughput),
            _line("Output token throughput (tok/s):", m.output_throughput),
            _line("Total Token throughput (tok/s):", m.total_token_throughput),
            *_latency("Time to First Token", "TTFT", m.mean_ttft_ms, m.median_ttft_ms, m.p99_ttft_ms),
            *_latency(
                "Time per Output Token (excl. 1st token)", "TPOT", m.mean_tpot_ms, m.median_tpot_ms, m.p99_tpot_ms
            ),
            *_latency("Inter-token Latency", "ITL", m.mean_itl_ms, m.median_itl_ms, m.p99_itl_ms),
            "=" * WIDTH,
        ]
    )


def _latency(title: str, name: str, mean: float, median: float, p99: float) -> list[str]:
    return [
        f"{title:-^{WIDTH}}",
        _line(f"Mean {name} (ms):", mean),
        _line(f"Median {name} (ms):", median),
        _line(f"P99 {name} (ms):", p99),
    ]


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value if isinstance(value, int) else format(value, '.2f')}"


def errors(results: Sequence[Result]) -> list[tuple[str, int]]:
    """What failed and how often, the most frequent first."""
    return Counter(result.error for result in results if result.error).most_common()
