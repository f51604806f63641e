"""How many prompt tokens a step takes while streams wait for their next token."""

import pytest
from support.worker_bench import Bench

from baton.worker.step_costs import StepCosts

TABLE = [(64, 0.005), (128, 0.006), (256, 0.008), (512, 0.013), (1024, 0.025), (2048, 0.049)]
"""Tokens and seconds, near those of an 8B model on one GPU."""


TARGET_S = 0.015


def costs(per_key: float = 0.0, per_pair: float = 0.0) -> StepCosts:
    return StepCosts(TABLE, per_key, per_pair, padded_to=1024)


def budget(costs: StepCosts, rows: int, keys: int = 0, start: int = 0, backlog: int = 0, waited_s: float = 0.0) -> int:
    return costs.budget(rows, keys, start, backlog, waited_s, TARGET_S)


@pytest.mark.parametrize(
    ("target_ms", "expected"), [(7, 128), (12, 256), (12.5, 512), (15, 512), (30, 1024), (1000, 2048)]
)
def test_a_step_is_the_largest_within_the_target(target_ms: float, expected: int) -> None:
    assert costs().budget(8, keys=0, start=0, backlog=0, waited_s=0.0, target_s=target_ms / 1000) == expected


def test_cached_keys_and_a_chunk_deep_in_its_prompt_make_steps_smaller() -> None:
    assert budget(costs(per_key=1e-8), 32, keys=600_000, backlog=100) == 256
    assert budget(costs(per_pair=1e-9), 32, backlog=100) == 512
    assert budget(costs(per_pair=1e-9), 32, start=30_000, backlog=100) == 256


def test_a_step_takes_as_long_as_the_next_prompt_has_waited() -> None:
    assert [budget(costs(), 8, backlog=6000, waited_s=waited) for waited in (0.0, 0.026, 0.05)] == [512, 1024, 2048]


def test_a_queue_is_not_computed_in_one_step_however_long_it_has_waited() -> None:
    assert [budget(costs(), 8, backlog=n, waited_s=1.0) for n in (0, 1000, 2000, 6000)] == [512, 512, 1024, 2048]


def test_a_pause_is_a_few_targets_however_long_a_prompt_has_waited() -> None:
    slow = StepCosts([(256, 0.015), (512, 0.05), (1024, 0.1)], 0.0, 0.0, padded_to=1024)
    assert budget(slow, 8, backlog=3000, waited_s=10.0) == 512


def test_a_long_queue_makes_steps_larger_whatever_the_target() -> None:
    slow = StepCosts([(256, 0.015), (512, 0.05), (1024, 0.1)], 0.0, 0.0, padded_to=1024)
    assert budget(slow, 8, backlog=50_000) == 1024
    assert budget(costs(), 900, backlog=10_000) == 2048


def test_what_is_left_of_a_queue_beside_many_streams_needs_no_larger_size_of_the_table() -> None:
    assert budget(costs(), 1000, backlog=2400) == 1300


def test_steps_beyond_the_padded_ones_cost_what_lies_between_those_of_the_table() -> None:
    assert costs().seconds(1536) == pytest.approx(0.037)
    assert costs().seconds(4096) == pytest.approx(0.098)
    assert costs().seconds(700) == pytest.approx(0.025)


def test_prompts_go_on_when_decode_alone_takes_longer_than_the_target() -> None:
    assert budget(costs(per_key=1e-6), 100, keys=40_000, backlog=100) == 512
    assert budget(costs(), 3000, backlog=100) == 3001


def test_finished_steps_correct_the_table() -> None:
    model = costs()
    for _ in range(100):
        model.learn(model.seconds(512), 0.0195)
    assert model.seconds(512) == pytest.approx(0.0195, rel=0.01)
    assert budget(model, 8) == 256
    model.learn(model.seconds(512), 60.0)
    assert model.seconds(512) < 0.0217  # one step that stalled is not the rule


def test_only_running_streams_make_prompts_wait() -> None:
    bench = Bench(num_blocks=1000, budget=4096, target_itl_ms=15.0, costs=costs())
    bench.prefill(1, list(range(3000)), max_tokens=20)
    plan = bench.launch()
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [2048]
    bench.finish()
    assert [row.num_tokens for row in bench.launch().rows] == [952]  # type: ignore[union-attr]
    bench.finish()
    bench.prefill(2, list(range(5000, 6000)), max_tokens=20)
    chunks = []
    while len(chunks) < 3:
        plan = bench.launch()
        assert plan is not None
        chunks.append([row.num_tokens for row in plan.rows])
        bench.finish()
    assert chunks == [[1, 511], [1, 489], [1, 1]]


def test_one_long_prompt_keeps_to_the_target() -> None:
    bench = Bench(num_blocks=1000, budget=4096, target_itl_ms=15.0, costs=costs())
    bench.prefill(1, [1, 2, 3], max_tokens=20)
    bench.step()
    bench.prefill(2, list(range(4000)), max_tokens=20)
    plan = bench.launch()
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1, 511]
    bench.prefill(3, list(range(1500)), max_tokens=20)
    bench.prefill(4, list(range(1, 1501)), max_tokens=20)
    bench.finish(after_s=0.03)
    plan = bench.launch()
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1, 1023]


def test_without_running_streams_prompts_are_computed_in_order_and_no_more_at_once_than_fill_the_device() -> None:
    bench = Bench(num_blocks=1000, budget=4096, target_itl_ms=15.0, costs=costs())
    for n, length in enumerate((600, 600, 600, 3000, 100)):
        bench.prefill(n, list(range(10_000 * n, 10_000 * n + length)), max_tokens=1)
    steps = []
    while plan := bench.launch():
        steps.append([row.num_tokens for row in plan.rows])
        bench.finish()
    assert steps == [[600, 600], [600, 1448], [1552], [100]]


def test_a_step_is_full_when_a_larger_one_computes_hardly_more_a_second() -> None:
    assert (costs().full_tokens, costs().best_tokens) == (1024, 2048)


def test_a_prompt_about_to_be_handed_over_is_no_stream_that_waits_for_its_next_token() -> None:
    bench = Bench(num_blocks=1000, budget=4096, target_itl_ms=15.0, costs=costs(), depth=2)
    bench.prefill(1, list(range(1000)), hand_over=True)
    bench.prefill(2, list(range(5000, 6000)), max_tokens=1)
    bench.prefill(3, list(range(8000, 10_000)), hand_over=True)
    assert [row.num_tokens for row in bench.launch().rows] == [1000, 1000]  # type: ignore[union-attr]
    assert [row.num_tokens for row in bench.launch().rows] == [2000]  # type: ignore[union-attr]
