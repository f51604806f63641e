"""Questions to the scheduler's loop and events out of it, with the loop's turns made by hand."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator

import pytest

from baton.proto.config import SchedulerConfig
from baton.scheduler_proc.cluster import Cluster
from baton.scheduler_proc.desk import EVENT_BACKLOG, Desk, Subscription
from baton.scheduler_proc.instructions import EventKind, Happened
from baton.scheduler_proc.operations import Operator, RefusedError

OPERATOR = Cluster(SchedulerConfig(endpoint=""), epoch=1).operator


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


async def asked(question: Coroutine[None, None, float]) -> "asyncio.Task[float]":
    """A question that lies on the desk."""
    task = asyncio.create_task(question)
    await asyncio.sleep(0)
    return task


def clock(_operator: Operator, now: float) -> float:
    return now


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(test())


def test_a_question_is_answered_at_the_next_turn(desk: Desk) -> None:
    async def test() -> None:
        question = await asked(desk.ask(clock))
        desk.clear()  # the descriptor was readable
        desk.serve(OPERATOR, 1.0)
        assert await question == 1.0

    run(test)


def test_a_question_may_wait_for_its_answer(desk: Desk) -> None:
    async def test() -> None:
        question = await asked(desk.ask(clock, until=lambda now: now > 1.0))
        desk.serve(OPERATOR, 1.0)
        await asyncio.sleep(0)
        assert not question.done()
        desk.serve(OPERATOR, 2.0)
        assert await question == 2.0

    run(test)


@pytest.mark.parametrize("error", [RefusedError, KeyError])
def test_what_goes_wrong_is_the_askers(desk: Desk, error: type[Exception]) -> None:
    def ask(operator: Operator, _now: float) -> float:
        if error is RefusedError:
            operator.worker("nobody")
        raise KeyError

    async def test() -> None:
        question = await asked(desk.ask(ask))
        desk.serve(OPERATOR, 1.0)
        with pytest.raises(error):
            await question

    run(test)


def test_nobody_is_asked_for_a_caller_that_has_left(desk: Desk) -> None:
    async def test() -> None:
        calls: list[float] = []
        question = await asked(desk.ask(lambda _, now: calls.append(now) or now, until=lambda _: False))
        desk.serve(OPERATOR, 1.0)
        question.cancel()
        await asyncio.wait({question})
        desk.serve(OPERATOR, 2.0)
        assert calls == [1.0]

    run(test)


def test_events_reach_those_who_watch_until_they_fall_behind(desk: Desk) -> None:
    event = Happened(EventKind.READY, "", "")

    async def test() -> None:
        desk.publish(event)
        with Subscription(desk) as quick, Subscription(desk) as slow:
            for _ in range(EVENT_BACKLOG + 1):
                desk.publish(event)
                assert await quick.next() is event
            with pytest.raises(OverflowError):
                await slow.next()
        assert desk.subscriptions == []

    run(test)
