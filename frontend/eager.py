"""Run a coroutine now, in the middle of plain code, and make a task of it only if it has to wait."""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


def run_eagerly(coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None] | None":
    """Run up to the first wait. None when it has ended, else the task that does the rest. Raises what it raises.

    Until it waits it must not ask for the current task. (Python 3.12 has this as eager tasks.)
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return asyncio.create_task(_rest(coroutine, waits_for))


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """What is left of a coroutine that was started by hand and waits for `waits_for`."""
    while True:
        failure: BaseException | None = None
        try:
            yield waits_for
        except BaseException as error:
            failure = error
        try:
            waits_for = coroutine.send(None) if failure is None else coroutine.throw(failure)
        except StopIteration:
            return
