"""`truncation: auto`: a conversation that is too long for the context loses its oldest turns."""

from collections.abc import Awaitable, Callable
from typing import Any

Messages = list[dict[str, Any]]

_LEADING = ("system", "developer")


async def fitting(messages: Messages, fits: Callable[[Messages], Awaitable[bool]]) -> Messages:
    """The messages without as many of the oldest turns as it takes, at most all but the last.

    A turn begins where the user speaks; instructions before the first one stay. `fits` is asked a logarithmic number of
    times.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    head = next((index for index, message in enumerate(messages) if message["role"] not in _LEADING), 0)
    candidates = [messages[:head] + messages[start:] for start in turns if start > head]
    low, high = 0, len(candidates)
    if not candidates or await fits(messages):
        return messages
    while low < high - 1:
        middle = (low + high - 1) // 2
        if await fits(candidates[middle]):
            high = middle + 1
        else:
            low = middle + 1
    return candidates[low]
