"""How many prompt tokens a step takes while streams wait for their next token."""

import pytest
from support.worker_bench import Bench

from baton.worker.step_costs import StepCosts

TABLE = [(64, 0.005), (128, 0.006), (256, 0.008), (512, 0.013), (1024, 0.025), (2048, 0.049)]
"""Tokens and seconds, near those of an 8B model on one GPU."""


def costs(per_key: float = 0.0, per_pair: float = 0.0) -> StepCosts:
    return StepCosts(TABLE, per_key, per_pair, padded_to=1024)


@pytest.mark.parametrize(("target_ms", "expected"), [(7, 128), (15, 512), (30, 1024), (1000, 2048)])
def test_a_step_is_the_largest_within_the_target(target_ms: int, expected: int) -> None:
    assert costs().budget(rows=8, keys=0, start=0, backlog=0, target_s=target_ms / 1000) == expected


def test_cached_keys_and_a_chunk_deep_in_its_prompt_make_steps_smaller() -> None:
    assert costs(per_key=1e-8).budget(rows=32, keys=600_000, start=0, backlog=100, target_s=0.015) == 256
    assert costs(per_pair=1e-9).budget(rows=32, keys=0, start=0, backlog=100, target_s=0.015) == 512
    assert costs(per_pair=1e-9).budget(rows=32, keys=0, start=30_000, backlog=100, target_s=0.015) == 256


def test_a_long_queue_makes_steps_larger() -> None:
    sizes = [costs().budget(rows=8, keys=0, start=0, backlog=n, target_s=0.015) for n in (1000, 4000, 50_000)]
    assert sizes == [512, 1024, 2048]


def test_a_short_queue_lets_steps_take_a_little_longer() -> None:
    backlogs = (0, 2000, 50_000)
    sizes = [costs().budget(rows=200, keys=100_000, start=0, backlog=n, target_s=0.011) for n in backlogs]
    assert sizes == [256, 512, 2048]


def test_a_queue_beside_many_streams_is_cleared_too() -> None:
    assert costs().budget(rows=900, keys=0, start=0, backlog=10_000, target_s=0.015) == 2048


def test_what_is_left_of_a_queue_beside_many_streams_needs_no_larger_size_of_the_table() -> None:
    assert costs().budget(rows=1000, keys=0, start=0, backlog=3000, target_s=0.015) == 1375


def test_prompts_go_on_when_decode_alone_takes_longer_than_the_target() -> None:
    assert costs(per_key=1e-6).budget(rows=100, keys=40_000, start=0, backlog=100, target_s=0.015) == 512
    assert costs().budget(rows=3000, keys=0, start=0, backlog=100, target_s=0.015) == 3001


def test_finished_steps_correct_the_table() -> None:
    model = costs()
    for _ in range(100):
        model.learn(model.seconds(512), 0.0195)
    assert model.seconds(512) == pytest.approx(0.0195, rel=0.01)
    assert model.budget(rows=8, keys=0, start=0, backlog=0, target_s=0.015) == 256
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
    bench.finish()
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
