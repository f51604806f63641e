"""Decode steps beside the prompts of another worker of the same device."""

import math

import pytest
from support.worker_bench import Bench

from baton.proto.messages import Message, Prompts
from baton.worker import effects
from baton.worker.device_share import (
    MOST_PAUSES,
    OLD,
    PATIENCE,
    PAUSE,
    SLOWER,
    STEPS_A_PAUSE,
    DeviceShare,
)
from baton.worker.step_costs import StepCosts

STEP_S, TARGET_S = 0.006, 0.015


def costs() -> StepCosts:
    return StepCosts([(16, STEP_S), (64, 2 * STEP_S)], 0.0, 0.0, padded_to=64)


def decoding() -> Bench:
    """A stream whose last token has just come; nothing is in flight."""
    bench = Bench(depth=2, target_itl_ms=1e3 * TARGET_S, costs=costs(), shares_device=True)
    bench.prefill(1, [1, 2, 3], max_tokens=40)
    assert bench.launch() is not None
    bench.finish(STEP_S)
    return bench


def told(out: list[effects.Effect]) -> list[Message]:
    return [effect.message for effect in out if isinstance(effect, effects.ToKeeper)]


def test_a_decode_step_beside_prompts_begins_as_late_as_it_may() -> None:
    bench = decoding()
    bench.handle(Prompts(bench.now))
    assert bench.launch() is None
    due = bench.batcher.next_deadline()
    assert due == pytest.approx(bench.now + PATIENCE * TARGET_S - SLOWER * STEP_S)
    bench.now = due
    assert bench.launch() is not None


def test_beside_an_old_prompt_it_pauses() -> None:
    bench = decoding()
    bench.handle(Prompts(bench.now - OLD * TARGET_S - 0.001))
    assert bench.launch() is None
    assert bench.batcher.next_deadline() == pytest.approx(bench.now + PAUSE * TARGET_S - SLOWER * STEP_S)


def test_pauses_are_few() -> None:
    device, now, late = DeviceShare(TARGET_S, shared=True), 0.0, 0
    device.prompts_since = -1.0
    steps = 20 * STEPS_A_PAUSE
    for _ in range(steps):
        device.step_ended(now)
        at = device.begins_at(STEP_S, now)
        assert device.begins_at(STEP_S, at) == at  # asked again once it is due
        late += at - now > PATIENCE * TARGET_S
        now = at + SLOWER * STEP_S
    assert late == pytest.approx(MOST_PAUSES + steps / STEPS_A_PAUSE, abs=1)


def test_once_the_prompts_are_gone_it_begins() -> None:
    bench = decoding()
    bench.handle(Prompts(bench.now))
    assert bench.launch() is None
    bench.handle(Prompts(None))
    assert bench.launch() is not None
    assert bench.batcher._steps.held_until == math.inf


def test_a_worker_without_streams_spends_no_pause() -> None:
    bench = Bench(depth=2, target_itl_ms=1e3 * TARGET_S, costs=costs(), shares_device=True)
    bench.handle(Prompts(bench.now - 1.0))
    assert bench.launch() is None
    assert bench.batcher._steps.held_until == math.inf
    assert bench.batcher._device._pauses == MOST_PAUSES


def test_a_prompt_without_room_does_not_end_giving_way() -> None:
    bench = Bench(depth=2, num_blocks=4, target_itl_ms=1e3 * TARGET_S, costs=costs(), shares_device=True)
    bench.prefill(1, list(range(40)), max_tokens=20)
    assert bench.launch() is not None
    bench.finish(STEP_S)
    bench.prefill(2, list(range(100, 130)))
    bench.handle(Prompts(bench.now))
    assert bench.launch() is None
    assert bench.now < bench.batcher._steps.held_until < math.inf


def test_beside_prompts_one_step_is_in_flight_and_its_end_is_waited_for() -> None:
    bench = decoding()
    assert bench.launch() is not None
    bench.handle(Prompts(bench.now))
    bench.now += STEP_S
    assert bench.launch() is None
    assert bench.batcher._steps.held_until == math.inf
    bench.finish(0.0)
    assert bench.launch() is None
    assert bench.batcher._steps.held_until > bench.now


def test_a_step_that_is_late_already_begins_at_once() -> None:
    bench = decoding()
    bench.handle(Prompts(bench.now))
    bench.now += TARGET_S
    assert bench.launch() is not None


def test_prompts_of_its_own_wait_for_nobody() -> None:
    bench = decoding()
    bench.handle(Prompts(bench.now))
    bench.prefill(2, list(range(20)))
    plan = bench.launch()
    assert plan is not None
    assert len(plan.rows) == 2


def test_without_a_target_or_costs_nobody_gives_way() -> None:
    bench = Bench(shares_device=True)
    bench.prefill(1, [1, 2, 3], max_tokens=40)
    bench.step()
    bench.handle(Prompts(bench.now))
    assert bench.launch() is not None


def test_others_hear_when_prompts_begin_and_end() -> None:
    bench = Bench(depth=2, budget=16, target_itl_ms=1e3 * TARGET_S, costs=costs(), shares_device=True)
    came = bench.now
    out = bench.prefill(1, list(range(24)), hand_over=True)
    bench.now += 0.5
    bench.prefill(2, list(range(100, 124)), hand_over=True)
    while bench.launch():
        pass
    out += bench.take()
    assert told(out) == [Prompts(came)]
    seen: list[Message] = []
    while bench.in_flight:
        out = bench.finish()
        while bench.launch():
            pass
        seen += told([*out, *bench.take()])
    assert seen == [Prompts(came + 0.5), Prompts(None)]


def test_who_has_the_device_alone_says_nothing() -> None:
    bench = Bench()
    bench.prefill(1, list(range(24)), hand_over=True)
    assert told(bench.run()) == []
