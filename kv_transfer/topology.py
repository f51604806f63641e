"""Which transport serves a pair of workers, judged when they meet."""

from collections.abc import Sequence

from baton.kv_transfer.contract import TransferError, Transport
from baton.kv_transfer.greeting import Greeting


def choose(transports: Sequence[Transport], owner: Greeting, distant: bool = False) -> tuple[Transport, str]:
    """The first of `transports` that works with this owner, and why no better one does; empty when it is the best.

    `distant`: the owner is on another host. Raises TransferError when none does.
    """
    obstacles: list[str] = []
    for transport in transports:
        obstacle = _obstacle(transport, owner, distant)
        if not obstacle:
            return transport, "; ".join(obstacles)
        obstacles.append(f"{transport.name} can't be used: {obstacle}")
    raise TransferError(f"no way to read {owner.name}'s KV blocks: {'; '.join(obstacles)}")


def _obstacle(transport: Transport, owner: Greeting, distant: bool) -> str:
    if distant and not transport.across_hosts:
        return f"{owner.name} is on another host"
    offer = owner.offers.get(transport.name)
    return f"{owner.name} does not offer it" if offer is None else transport.obstacle(offer)
