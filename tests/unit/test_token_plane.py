"""Rows on real sockets: whoever reads them can tell whom they are for."""

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from baton.proto.channels import Router
from baton.proto.messages import Sid, ToFrontendTokens, TokenBatch
from baton.proto.network import Network
from baton.worker.clock import ClusterClock
from baton.worker.effects import Emit
from baton.worker.token_plane import BEAT_INTERVAL_S, FRONTEND_MEMORY, TokenPlane

DEADLINE_MS = 10_000


@contextmanager
def frontend(address: str = "tcp://127.0.0.1:*") -> Iterator[Router[TokenBatch]]:
    """One that is gone at the end, and its port free."""
    network = Network()
    router: Router[TokenBatch] = Router(network, address, ToFrontendTokens)
    yield router
    router.close()
    network.close()


def read(router: Router[TokenBatch]) -> TokenBatch:
    assert router.socket.poll(DEADLINE_MS)
    return next(iter(router.drain()))[1]


def row(endpoint: str, sid: Sid, token: int) -> Emit:
    return Emit(endpoint, sid, attempt=1, pos=0, tokens=(token,), logprobs=(), finish=None, ledger=None)


def test_rows_and_beats_name_the_incarnation_that_they_are_for_whoever_has_its_port_now() -> None:
    network = Network()
    plane = TokenPlane(network, zmq.Poller(), "decode-0", 1, ClusterClock("", same_host=True))
    with frontend() as first:
        plane.send([row(first.address, (7, 1), 10)], now=0.0)
        assert read(first).frontend == 7
    with frontend(first.address) as second:
        arrived = 0
        while not arrived:  # what is sent before the worker has noticed the first one's end is lost
            plane.send([row(first.address, (7, 1), 11)], now=0.0)
            arrived = second.socket.poll(100)
        plane.beat(BEAT_INTERVAL_S)
        batches = [batch for _sender, batch, _frames in second.drain()]
        while batches[-1].n:
            batches.append(read(second))
        assert {batch.frontend for batch in batches} == {7}
        plane.send([row(first.address, (7, 1), 12), row(first.address, (8, 1), 50)], now=1.0)
        assert [(batch.frontend, batch.tokens) for batch in (read(second), read(second))] == [(7, (12,)), (8, (50,))]
        plane.beat(1.0 + BEAT_INTERVAL_S)
        beat = read(second)
        assert (beat.frontend, beat.seq, beat.n) == (8, 1, ())
    plane.close()
    network.close()


def test_a_frontend_that_was_forgotten_among_a_thousand_others_gets_no_number_twice() -> None:
    """From a lower number than it has seen, a loss would not show."""
    network = Network()
    plane = TokenPlane(network, zmq.Poller(), "decode-0", 1, ClusterClock("", same_host=True))
    numbers: dict[int, list[int]] = {}
    with frontend() as router:
        for incarnation in [7, 7, 8, *(n for other in range(FRONTEND_MEMORY) for n in (100 + other, 8)), 7]:
            plane.send([row(router.address, (incarnation, 1), 10)], now=0.0)
            batch = read(router)
            numbers.setdefault(batch.frontend, []).append(batch.seq)
        plane.send([row(router.address, (9, 1), 10)], now=0.0)
        numbers[9] = [read(router).seq]
    plane.close()
    network.close()
    assert numbers[7] == [1, 2, 3]
    assert numbers[8] == list(range(1, FRONTEND_MEMORY + 2))  # in use all the time
    assert numbers[9] == [3]  # nothing is known of it: it may be one that was forgotten
