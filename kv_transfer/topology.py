"""Which transport serves a pair of workers, judged when they meet."""

from collections.abc import Sequence

from baton.kv_transfer.contract import TransferError, Transport
from baton.kv_transfer.greeting import Greeting


def choose(transports: Sequence[Transport], owner: Greeting) -> tuple[Transport, str]:
    """The first of `transports` that works with this owner, and why no better one does; empty when it is the best.

    Raises TransferError when none does.
    """
    obstacles: list[str] = []
    for transport in transports:
        offer = owner.offers.get(transport.name)
        obstacle = f"{owner.name} does not offer it" if offer is None else transport.obstacle(offer)
        if not obstacle:
            return transport, "; ".join(obstacles)
        obstacles.append(f"{transport.name} can't be used: {obstacle}")
    raise TransferError(f"no way to read {owner.name}'s KV blocks: {'; '.join(obstacles)}")
