"""A Cluster on a virtual clock, and peers that speak to it in one line."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest

from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import identity
from baton.proto.config import PlacementConfig, SchedulerConfig
from baton.proto.layout import Group, KVLayout
from baton.proto.messages import (
    Claim,
    FrontendHello,
    Holding,
    Load,
    Message,
    Peer,
    SamplingParams,
    Settings,
    Sid,
    Submit,
    WorkerHello,
)
from baton.scheduler_proc.cluster import Cluster
from baton.scheduler_proc.instructions import Instruction, Observe, Send

M = TypeVar("M", bound=Message)

FRONTEND = 7
"""Incarnation of the frontend, the first half of its sids."""
IDLE = Load(0, 0, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Bench:
    """Records every instruction; `sent` hands out each message once."""

    def __init__(self, policy: str = "least_loaded", **config: float) -> None:
        self.config = SchedulerConfig(endpoint="", placement=PlacementConfig(policy), **config)
        self.cluster = Cluster(self.config, epoch=1)
        self.now = 100.0
        self.instructions: list[Instruction] = []
        self.cluster.tick(self.now)

    def tell(self, sender: bytes, message: Message, *frames: bytes) -> None:
        """A message arrives."""
        self.instructions += self.cluster.handle(sender, message, frames, self.now)

    def wait(self, seconds: float, *alive: bytes) -> None:
        """Time passes in sweeps; the peers named go on reporting."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.25, until)
            for peer in alive:
                self.tell(peer, IDLE)
            self.instructions += self.cluster.tick(self.now)

    def frontend(
        self,
        name: str = "frontend-0",
        incarnation: int = FRONTEND,
        claims: tuple[Claim, ...] = (),
        scheduler_log_level: str = "",
    ) -> bytes:
        """A frontend says hello."""
        me = identity(name, incarnation)
        hello = FrontendHello(
            incarnation, name, f"tokens:{name}", 11, PROTOCOL_VERSION, claims, "", scheduler_log_level
        )
        self.tell(me, hello)
        return me

    def worker(
        self,
        name: str,
        role: str = "",
        incarnation: int = 1,
        *,
        fingerprint: str = "model",
        groups: int = 0,
        pid: int = 12,
        num_blocks: int = 100,
        max_num_batched_tokens: int = 256,
        max_num_seqs: int = 8,
        holdings: tuple[Holding, ...] = (),
        protocol: int = PROTOCOL_VERSION,
        settings: Settings = Settings(),
        distant: bool = False,
        kv_endpoint: str = "unix:/kv",
        shared_pool: str = "",
        epoch: int = 0,
    ) -> bytes:
        """A worker says hello; its role is the first part of its name."""
        me = identity(name, incarnation)
        endpoint = "tcp://10.0.0.5:1" if distant else "ipc:///peer tcp://10.0.0.4:1"
        hello = WorkerHello(
            worker=name,
            incarnation=incarnation,
            role=role or name.split("-")[0],
            pid=pid,
            protocol=protocol,
            peer=Peer(name, incarnation, endpoint, kv_endpoint, shared_pool),
            layout=KVLayout(fingerprint, (Group("full", 1, 16, 64, ("words",), (16,), "float32"),) * groups),
            num_blocks=num_blocks,
            block_size=16,
            max_model_len=2048,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            holdings=holdings,
            settings=settings,
            pid_space="here",
            distant=distant,
            epoch=epoch,
        )
        self.tell(me, hello)
        return me

    def submit(
        self,
        n: int,
        *,
        attempt: int = 1,
        tokens: int = 64,
        priority: int = 0,
        timeout_s: float = 0.0,
        sibling: int = 0,
        pooling: str = "",
        prompt_logprobs: int = -1,
        request: str = "",
        output: int = 0,
    ) -> Sid:
        """The frontend submits a stream."""
        sid = (FRONTEND, n)
        params = SamplingParams(max_tokens=0 if pooling else 16, pooling=pooling, prompt_logprobs=prompt_logprobs)
        submit = Submit(sid, attempt, tokens - output, params, timeout_s, priority, sibling, request)
        self.tell(identity("frontend-0", FRONTEND), submit, np.zeros(tokens, np.int32).tobytes(), b"")
        return sid

    def sent(self, kind: type[M], to: bytes | None = None) -> list[M]:
        """Messages of this kind (to this peer) since the last call."""
        found = [
            i
            for i in self.instructions
            if isinstance(i, Send) and isinstance(i.message, kind) and (to is None or i.peer == to)
        ]
        self.instructions = [i for i in self.instructions if i not in found]
        return [i.message for i in found if isinstance(i.message, kind)]

    def recipients(self, kind: type[Message]) -> list[str]:
        """Names of the peers that messages of this kind went to, since the last call."""
        found = [i for i in self.instructions if isinstance(i, Send) and isinstance(i.message, kind)]
        self.instructions = [i for i in self.instructions if i not in found]
        return [i.peer.decode().split(":")[0] for i in found]

    def observed(self, kind: type[M]) -> list[M]:
        """Events for the metrics."""
        return [i.event for i in self.instructions if isinstance(i, Observe) and isinstance(i.event, kind)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    return Bench


@pytest.fixture
def idle() -> Load:
    return IDLE
