"""When the next step is planned while one is on the device."""

import pytest
from support.worker_bench import Bench, carry, to_scheduler

from baton.proto.messages import PrefillDone
from baton.worker.effects import Effect
from baton.worker.lead import ANSWERS_S, LAUNCH_S, Lead
from baton.worker.step_costs import StepCosts

STEP_S = 0.04


def running(max_tokens: int = 40, **options: object) -> Bench:
    """A stream that decodes, its first step after the prompt's just launched; two may be in flight."""
    costs = StepCosts([(64, STEP_S), (128, 2 * STEP_S)], 0.0, 0.0, padded_to=128)
    bench = Bench(depth=2, target_itl_ms=1e3 * STEP_S, costs=costs, **options)  # type: ignore[arg-type]
    bench.prefill(1, [1, 2, 3], max_tokens=max_tokens)
    assert bench.launch() is not None
    bench.finish(STEP_S)
    assert bench.launch() is not None
    return bench


def test_a_prompt_that_comes_while_a_step_runs_is_in_the_next_one() -> None:
    bench = running()
    assert bench.launch() is None
    due = bench.batcher.next_deadline()
    assert bench.now < due < bench.now + STEP_S
    bench.prefill(2, [7, 8, 9, 10])
    assert bench.launch() is None
    bench.now = due
    plan = bench.launch()
    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [1, 4]
    assert bench.batcher.next_deadline() > bench.now + 10 * STEP_S


def test_a_step_is_planned_at_once_when_the_one_before_has_ended_early() -> None:
    bench = running()
    assert bench.launch() is None
    bench.finish(STEP_S / 4)
    assert bench.launch() is not None


def test_when_nothing_can_be_planned_nobody_is_woken_for_it() -> None:
    bench = running(max_tokens=2)  # the step in flight brings its last token
    assert bench.launch() is None
    assert bench.batcher.next_deadline() > bench.now + 10 * STEP_S


def test_prompts_alone_and_offline_work_do_not_wait() -> None:
    costs = StepCosts([(4, STEP_S), (8, 2 * STEP_S)], 0.0, 0.0, padded_to=8)
    alone = Bench(depth=2, budget=4, target_itl_ms=15.0, costs=costs)
    alone.prefill(1, list(range(12)))
    assert alone.launch() is not None
    assert alone.launch() is not None
    offline = running(prompts_first=True)
    assert offline.launch() is not None


def two_prompts_for_others() -> tuple[Bench, Bench, list[Effect]]:
    """The first has just been computed, the second is on the device, a third waits."""
    costs = StepCosts([(4, STEP_S), (8, 2 * STEP_S)], 0.0, 0.0, padded_to=8)
    owner = Bench("prefill-0", 1, depth=2, budget=4, target_itl_ms=15.0, costs=costs)
    for n in (1, 2, 3):
        owner.prefill(n, list(range(4 * n, 4 * n + 4)), hand_over=True)
    assert owner.launch() is not None
    assert owner.launch() is not None
    return owner, Bench("decode-0", 2), owner.finish(STEP_S)


def test_whoever_reads_a_prompt_is_answered_before_the_next_launch() -> None:
    owner, reader, out = two_prompts_for_others()
    assert owner.launch() is None
    (done,) = to_scheduler(out, PrefillDone)
    assert isinstance(done, PrefillDone)
    carry(reader, owner, reader.decode(owner, done))  # to the Confirm
    assert owner.launch() is not None


def test_a_reader_that_takes_long_does_not_hold_up_the_device() -> None:
    owner, _reader, _out = two_prompts_for_others()
    assert owner.launch() is None
    due = owner.batcher.next_deadline()
    assert owner.now < due <= owner.now + ANSWERS_S
    owner.now = due
    assert owner.launch() is not None
    owner.finish(STEP_S)
    owner.finish(STEP_S)
    owner.prefill(4, [1, 2, 3, 4], hand_over=True)
    assert owner.launch() is not None  # nothing is on the device


def test_a_launch_does_not_wait_beyond_what_it_takes_itself() -> None:
    lead = Lead()
    lead.planned(10.0, LAUNCH_S + ANSWERS_S / 2)
    assert lead.answers_until(10.0) == pytest.approx(10.0 + ANSWERS_S / 2)
    lead.planned(10.0, 1.0)
    assert lead.answers_until(10.0) == pytest.approx(10.0 + ANSWERS_S)


def test_the_lead_grows_when_a_launch_was_late_and_shrinks_slowly() -> None:
    lead = Lead()
    first = lead.lead_s
    lead.ended(0.0, 1.0, followed=False, still_s=0.0)
    assert lead.lead_s == first
    lead.ended(0.9995, 2.0, followed=True, still_s=0.0)  # half a millisecond before the device needed it
    grown = lead.lead_s
    assert grown > first
    lead.ended(1.9, 3.0, followed=True, still_s=0.0)
    assert first < lead.lead_s < grown
    for end in range(4, 2000):
        lead.ended(end - 1.5, end, followed=True, still_s=0.0)
    least = lead.lead_s
    assert 0 < least < first
    for end in range(2000, 4000):
        lead.ended(end - 1.0, end, followed=True, still_s=0.0)
    assert first < lead.lead_s < 1


def test_a_step_is_due_before_the_end_of_all_that_are_in_flight() -> None:
    lead = Lead()
    lead.planned(10.0, 0.5)
    lead.planned(10.1, 0.5)
    assert lead.plan_at == pytest.approx(11.0 - lead.lead_s)
    lead.ended(10.0, 10.6, followed=False, still_s=0.5)
    assert lead.plan_at == pytest.approx(11.1 - lead.lead_s)
