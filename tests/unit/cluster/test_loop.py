"""The scheduler's loop over real sockets and processes, turn by turn."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import Dealer, Router, identity
from baton.proto.config import SchedulerConfig
from baton.proto.host import pid_space
from baton.proto.layout import KVLayout
from baton.proto.messages import (
    ClockReply,
    ClockRequest,
    Message,
    NotAdmitted,
    Peer,
    ToScheduler,
    ToWorker,
    Welcome,
    WhoAreYou,
    WorkerHello,
)
from baton.proto.network import Network
from baton.scheduler_proc.desk import Desk
from baton.scheduler_proc.main import Scheduler

DEADLINE_MS = 10_000


class Turns:
    """A scheduler that is told to stop, so that each run() is one turn."""

    def __init__(self, endpoint: str) -> None:
        self.network = Network()
        self._router: Router = Router(self.network, endpoint, ToScheduler)
        self._desk = Desk()
        self._stop_fd = os.eventfd(1)
        self._scheduler = Scheduler(SchedulerConfig(endpoint), self._router, self._desk, self._stop_fd)

    def turn(self) -> None:
        """Take in what has arrived, of which there must be something."""
        assert self._router.socket.poll(DEADLINE_MS)
        self._scheduler.run()

    def close(self) -> None:
        self._scheduler.close()
        self._desk.close()
        os.close(self._stop_fd)
        self.network.close()


class Worker:
    """One incarnation of decode-0, in a process that does nothing."""

    def __init__(self, turns: Turns, endpoint: str, incarnation: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self._turns = turns
        me = identity("decode-0", incarnation)
        self._dealer: Dealer[Message] = Dealer(turns.network, endpoint, me, ToWorker)
        peer, layout = Peer("decode-0", incarnation, "ipc:///peer", "unix:/kv"), KVLayout("model", ())
        self._hello = WorkerHello(
            *("decode-0", incarnation, "decode", self.process.pid, PROTOCOL_VERSION, peer, layout, 100, 16, 2048),
            max_num_seqs=8,
            max_num_batched_tokens=256,
            pid_space=pid_space(),
        )
        self.greet()

    def greet(self) -> None:
        self._dealer.send(self._hello)

    def heard(self) -> list[type[Message]]:
        """Everything up to the answer to a question that is asked now."""
        self._dealer.send(ClockRequest(0.0))
        self._turns.turn()
        kinds: list[type[Message]] = []
        while ClockReply not in kinds:
            assert self._dealer.socket.poll(DEADLINE_MS)
            kinds += [type(message) for message, _ in self._dealer.drain()]
        return kinds

    def die(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        self.die()
        self._dealer.close(0)


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/scheduler"


@pytest.fixture
def turns(endpoint: str) -> Iterator[Turns]:
    turns = Turns(endpoint)
    yield turns
    turns.close()


def test_a_death_that_is_seen_together_with_the_successors_hello_is_not_the_successors(
    turns: Turns, endpoint: str
) -> None:
    """The successor's pidfd gets the number of the one that was just closed."""
    first = Worker(turns, endpoint, incarnation=1)
    turns.turn()
    first.die()
    second = Worker(turns, endpoint, incarnation=2)
    turns.turn()
    # Taken for another of that name, until the death is seen.
    assert second.heard() == [NotAdmitted, WhoAreYou, ClockReply]
    second.greet()
    turns.turn()
    assert second.heard() == [Welcome, ClockReply]
    for worker in (first, second):
        worker.close()
