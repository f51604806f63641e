"""How many new requests one turn of the event loop takes."""

import asyncio
from itertools import pairwise

import pytest

from baton.frontend.turns import PER_TURN, Turns


@pytest.mark.parametrize("count", [1, PER_TURN, 5 * PER_TURN + 1])
def test_a_burst_is_spread_over_turns_in_order(count: int) -> None:
    async def scenario() -> None:
        turns, loop = Turns(), asyncio.get_running_loop()
        turn, began = 0, []

        def next_turn() -> None:
            nonlocal turn
            turn += 1
            if len(began) < count:
                loop.call_soon(next_turn)

        async def request(index: int) -> None:
            await turns.take()
            began.append((turn, index))

        loop.call_soon(next_turn)
        await asyncio.gather(*map(request, range(count)))
        assert [index for _, index in began] == list(range(count))
        for (first, _), (last, _) in zip(began, began[PER_TURN:], strict=False):
            assert first < last
        assert all(earlier[0] <= later[0] for earlier, later in pairwise(began))

    asyncio.run(scenario())


def test_a_place_that_nobody_wants_any_more_is_not_lost() -> None:
    async def scenario() -> None:
        turns = Turns()
        first = [asyncio.create_task(turns.take()) for _ in range(PER_TURN)]
        gone = [asyncio.create_task(turns.take()) for _ in range(PER_TURN)]
        later = asyncio.create_task(turns.take())
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*first, later), 5)

    asyncio.run(scenario())
