"""From the timings of requests to the figures that the field compares."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH = 50
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
"""The latencies by the names that options and results call them."""
TARGETED = ("ttft", "tpot", "e2el")
"""Those that are one value per request, so that a request can meet a target."""


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
class Spread:
    """Of one latency over the requests (ITL: over all gaps), in milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]
    """Percentile -> value."""


@dataclass(frozen=True)
class Metrics:
    """Totals over the successful requests, and how long they took."""

    completed: int
    duration: float
    """Seconds."""
    total_input_tokens: int
    total_output_tokens: int
    latencies: Mapping[str, Spread]
    """By the names of TITLES."""
    request_goodput: float | None = None
    """Requests a second that met every target; None without targets."""

    @property
    def request_throughput(self) -> float:
        """Requests a second."""
        return self.completed / self.duration

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return self.total_output_tokens / self.duration

    @property
    def total_token_throughput(self) -> float:
        """Prompt and output tokens a second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration


def tpot_s(result: Result) -> float:
    """Time per output token without the first: (E2E - TTFT) / (n - 1); 0 for one token."""
    return (result.latency_s - result.ttft_s) / max(1, result.output_tokens - 1)


def summarise(
    results: Sequence[Result],
    duration_s: float,
    percentiles: Sequence[float] = (99,),
    targets_ms: Mapping[str, float] | None = None,
) -> Metrics:
    """Figures of a run that took duration_s; failed requests count nowhere. targets_ms: name of TARGETED -> at most."""
    done = [result for result in results if not result.error]
    seconds = {
        "ttft": [result.ttft_s for result in done],
        "tpot": [tpot_s(result) for result in done if result.output_tokens > 1],
        "itl": [gap for result in done for gap in result.itl_s],
        "e2el": [result.latency_s for result in done],
    }
    return Metrics(
        len(done),
        duration_s,
        sum(result.input_tokens for result in done),
        sum(result.output_tokens for result in done),
        {name: _spread_ms(values, percentiles) for name, values in seconds.items()},
        sum(_meets(result, targets_ms) for result in done) / duration_s if targets_ms else None,
    )


def _spread_ms(seconds: list[float], percentiles: Sequence[float]) -> Spread:
    """Zeros for nothing."""
    values = np.array(seconds or [0.0]) * 1000
    at = {percentile: float(np.percentile(values, percentile)) for percentile in percentiles}
    return Spread(float(values.mean()), float(np.median(values)), float(values.std()), at)


def _meets(result: Result, targets_ms: Mapping[str, float]) -> bool:
    took_s = {"ttft": result.ttft_s, "tpot": tpot_s(result), "e2el": result.latency_s}
    return all(took_s[name] * 1000 <= target for name, target in targets_ms.items())


def flat(metrics: Metrics) -> dict[str, float]:
    """As one level of names and numbers, those of vLLM's result files."""
    figures: dict[str, float] = {
        "duration": metrics.duration,
        "completed": metrics.completed,
        "total_input_tokens": metrics.total_input_tokens,
        "total_output_tokens": metrics.total_output_tokens,
        "request_throughput": metrics.request_throughput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
    }
    if metrics.request_goodput is not None:
        figures["request_goodput"] = metrics.request_goodput
    for name, spread in metrics.latencies.items():
        figures |= {f"{kind}_{name}_ms": getattr(spread, kind) for kind in ("mean", "median", "std")}
        figures |= {f"p{percentile:g}_{name}_ms": value for percentile, value in spread.percentiles.items()}
    return figures


def block(metrics: Metrics, shown: Sequence[str] = ("ttft", "tpot", "itl")) -> str:
    """The result block that users of vLLM's and SGLang's benchmarks know, to the character; `shown` of TITLES."""
    goodput = metrics.request_goodput
    return "\n".join(
        [
            f"{' Serving Benchmark Result ':=^{WIDTH}}",
            _line("Successful requests:", metrics.completed),
            _line("Benchmark duration (s):", metrics.duration),
            _line("Total input tokens:", metrics.total_input_tokens),
            _line("Total generated tokens:", metrics.total_output_tokens),
            _line("Request throughput (req/s):", metrics.request_throughput),
            *([] if goodput is None else [_line("Request goodput (req/s):", goodput)]),
            _line("Output token throughput (tok/s):", metrics.output_throughput),
            _line("Total Token throughput (tok/s):", metrics.total_token_throughput),
            *(line for name in shown for line in _latency(name, metrics.latencies[name])),
            "=" * WIDTH,
        ]
    )


def _latency(name: str, spread: Spread) -> list[str]:
    return [
        f"{TITLES[name]:-^{WIDTH}}",
        _line(f"Mean {name.upper()} (ms):", spread.mean),
        _line(f"Median {name.upper()} (ms):", spread.median),
        *(_line(f"P{percentile:g} {name.upper()} (ms):", value) for percentile, value in spread.percentiles.items()),
    ]


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value if isinstance(value, int) else format(value, '.2f')}"


def errors(results: Sequence[Result]) -> list[tuple[str, int]]:
    """What failed and how often, the most frequent first."""
    return Counter(result.error for result in results if result.error).most_common()
