"""A step's size follows the pace that running streams are owed."""

from baton.worker.step_budget import SMALLEST_CHUNK, StepBudget


def learned(target_s: float) -> StepBudget:
    """A device on which 32 decode rows cost 8 ms and a prompt token 20 µs."""
    budget = StepBudget(8192, target_s)
    for _ in range(20):
        budget.observe(32, 0, 0.008)
        budget.observe(32, 500, 0.018)
    return budget


def test_without_running_streams_a_step_takes_its_whole_budget() -> None:
    assert learned(0.015).tokens(0) == 8192


def test_without_a_target_so_does_every_step() -> None:
    assert learned(0.0).tokens(32) == 8192


def test_beside_running_streams_the_rest_of_the_target_is_spent_on_prompts() -> None:
    assert abs(learned(0.018).tokens(32) - (32 + 500)) <= 2


def test_prompts_go_on_when_decoding_alone_takes_the_target() -> None:
    assert learned(0.005).tokens(32) == 32 + SMALLEST_CHUNK


def test_before_anything_is_learned_the_first_chunks_are_small() -> None:
    assert StepBudget(8192, 0.015).tokens(1) < 1024
    assert StepBudget(256, 0.015).tokens(1) == 256


def test_a_slower_device_is_noticed() -> None:
    budget = learned(0.018)
    before = budget.tokens(32)
    for _ in range(20):
        budget.observe(32, 500, 0.038)
    assert budget.tokens(32) < before / 2
