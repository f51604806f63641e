"""The frontend's sockets around its streams: asyncio outside, ZeroMQ inside, no decision of its own.

Everything happens in the event loop's thread, except the heartbeat, which has a thread and a socket to itself. What has
arrived is read to the end before the readers that it concerns are woken, each once. Tokens that a client does not take
yet wait in its OutputReader; no worker is ever held up by a client.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from baton.frontend.instructions import Deliver, Finished, Instruction, SendToScheduler, SendToWorker
from baton.frontend.streams import Limits, Streams
from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import LINGER_MS, Dealer, Router, identity
from baton.proto.config import FrontendConfig
from baton.proto.heartbeat import Heartbeat
from baton.proto.keys import key_name
from baton.proto.lifecycle import Outcome
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import (
    Beat,
    ClusterStatus,
    FrontendHello,
    Goodbye,
    Ledger,
    MetricsReply,
    MetricsRequest,
    SamplingParams,
    Sid,
    ToFrontend,
    ToFrontendTokens,
    TokenBatch,
    TokenLogprobs,
)
from baton.proto.network import open_network
from baton.proto.supervision import set_log_level

log = logging.getLogger(__name__)

METRICS_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 10.0
"""A scheduler that has not told its status for so long is gone: nothing new can be served."""


class Output(msgspec.Struct, gc=False):
    """What came since the last time: tokens with their logprobs, and the end."""

    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    """One per token when asked for, else empty."""
    finished: Finished | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """With the first tokens when asked for."""


class OutputReader:
    """The streams of one client request, for one reader. Leaving the `with` block aborts what has not ended."""

    def __init__(
        self, client: "EngineClient", received_s: float, request: str | None = None, part: bool = False
    ) -> None:
        """`received_s`: when the request arrived, on CLOCK_MONOTONIC. `request`: what its client calls it. `part`:
        these are not all of its streams; see EngineClient.count."""
        self.on_output: Callable[[], None] = lambda: None
        """Called when something has come after everything was taken."""
        self._client = client
        self._received_s = received_s
        self._request = request or ""
        self._part = part
        self._sids: list[Sid] = []
        self._open: set[int] = set()
        self._pending: dict[int, Output] = {}

    def submit(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        prompt_hashes: bytes,
        priority: int = 0,
        timeout_s: float = 0.0,
        sibling: int | None = None,
    ) -> None:
        """Open one more stream, for `prompt` (int32 [prompt_len]); its index counts from 0. A timeout of 0 is none.
        `sibling` is the index of an earlier one with the same prompt."""
        index = len(self._sids)
        self._open.add(index)
        deliver = partial(self._put, index)
        self._sids.append(
            self._client.submit(
                prompt,
                params,
                prompt_hashes,
                deliver,
                priority=priority,
                timeout_s=timeout_s,
                received_s=self._received_s,
                sibling=None if sibling is None else self._sids[sibling],
                request=self._request,
                part=self._part,
            )
        )

    @property
    def num_open(self) -> int:
        """Streams whose end has not been taken."""
        return len(self._open)

    def take(self) -> dict[int, Output]:
        """Everything that has come, by stream index."""
        outputs, self._pending = self._pending, {}
        for index, output in outputs.items():
            if output.finished is not None:
                self._open.discard(index)
        return outputs

    async def next(self) -> dict[int, Output]:
        """As `take`, once something has come."""
        if not self._pending:
            come = asyncio.Event()
            self.on_output = come.set
            await come.wait()
        return self.take()

    def stop(self, index: int) -> Finished | None:
        """The reader found a stop string: ends the stream and drops its later tokens. None when it was over."""
        if index not in self._open:
            return None
        self._client.end(self._sids[index], Outcome.STOP)
        self._open.discard(index)
        return self._pending.pop(index).finished

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()

    def abort(self) -> None:
        """End what has not ended; nothing more is read."""
        self.on_output = lambda: None
        for index in self._open:
            self._client.abort(self._sids[index])

    def _put(self, index: int, instruction: Deliver | Finished) -> None:
        if not self._pending:
            self._client.wake(self)
        output = self._pending.get(index)
        if output is None:
            output = self._pending[index] = Output()
        if isinstance(instruction, Deliver):
            output.tokens += instruction.tokens
            output.logprobs += instruction.logprobs
            output.prompt_logprobs = output.prompt_logprobs or instruction.prompt_logprobs
        else:
            output.finished = instruction


class EngineClient:
    """This frontend's connection to the cluster. Owns its sockets, its timer and its heartbeat; close() frees them."""

    def __init__(self, config: FrontendConfig) -> None:
        """Binds and connects; needs a running event loop."""
        self._config = config
        self._incarnation = int.from_bytes(os.urandom(7), "big")
        # A path of its own: rows on their way to an earlier incarnation do not come here.
        self._token_path = Path(config.run_dir) / f"{config.name}-{self._incarnation:014x}.tokens"
        self._network = open_network(config.network)
        me = identity(config.name, self._incarnation)
        self._tokens: Router[TokenBatch] = Router(
            self._network, self._network.everywhere(f"ipc://{self._token_path}"), ToFrontendTokens
        )
        self._scheduler: Dealer[ToFrontend] = Dealer(self._network, config.scheduler, me, ToFrontend)
        limits = Limits(gap_timeout_s=config.gap_timeout_s, resend_interval_s=config.resend_interval_s)
        hello = FrontendHello(self._incarnation, config.name, self._tokens.address, os.getpid(), PROTOCOL_VERSION)
        self._streams = Streams(limits, hello)
        self._deliver: dict[Sid, Callable[[Deliver | Finished], None]] = {}
        self._metrics: dict[int, asyncio.Future[str]] = {}
        self._metrics_ids = itertools.count(1)
        self._on_status: list[Callable[[], None]] = []
        self.status: ClusterStatus | None = None
        """The cluster as the scheduler told it last."""
        self._status_at = 0.0
        self._stopping = ""
        self._ended: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._to_wake: list[OutputReader] = []
        self._drain_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._beats = Heartbeat(self._network, config.scheduler, lambda: Beat(config.name, self._incarnation))
        self._loop.add_reader(self._scheduler.fileno(), self._drain)
        self._loop.add_reader(self._tokens.fileno(), self._drain)
        self._carry_out([SendToScheduler(self._streams.hello())])

    @property
    def ready(self) -> bool:
        """Whether a request can be served."""
        return not self.unready_reason

    @property
    def unready_reason(self) -> str:
        """What is missing for a request to be served; empty when nothing is."""
        if self.status is None:
            return "the scheduler has not answered yet"
        silent_s = time.monotonic() - self._status_at
        if silent_s > STATUS_TIMEOUT_S:
            return f"the scheduler has been silent for {silent_s:.0f} s"
        return "" if self.status.ready else self.status.reason

    @property
    def num_streams(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def all_ended(self) -> None:
        """Wait until no stream is open."""
        while len(self._streams):
            self._ended = self._loop.create_future()
            await self._ended

    async def all_closed(self) -> None:
        """Wait until the scheduler has acknowledged the end of every stream."""
        while self._streams.closing:
            self._closed = self._loop.create_future()
            await self._closed

    def on_status(self, callback: Callable[[], None]) -> None:
        """Call this after every ClusterStatus."""
        self._on_status.append(callback)

    def submit(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        prompt_hashes: bytes,
        deliver: Callable[[Deliver | Finished], None],
        *,
        priority: int = 0,
        timeout_s: float = 0.0,
        received_s: float,
        sibling: Sid | None = None,
        request: str = "",
        part: bool = False,
    ) -> Sid:
        """Open a stream (see Streams.submit) whose tokens and end go to `deliver`."""
        sid, instructions = self._streams.submit(
            prompt,
            params,
            time.monotonic(),
            prompt_hashes=prompt_hashes,
            timeout_s=timeout_s,
            priority=priority,
            received_s=received_s,
            client=key_name.get(),
            sibling=sibling,
            request=request,
            part=part,
        )
        self._deliver[sid] = deliver
        self._carry_out(instructions)
        if self._stopping:
            self.abort(sid, self._stopping)
        return sid

    def count(self, outcome: Outcome, prompt_tokens: int, output_tokens: int, ledger: Ledger | None) -> None:
        """A request has ended whose streams were parts of it. `ledger`: what is to be told of it, if anything is."""
        ledger = ledger or Ledger(client=key_name.get())
        self._carry_out(self._streams.count(outcome, prompt_tokens, output_tokens, ledger, time.monotonic()))

    def end(self, sid: Sid, outcome: Outcome, message: str = "") -> None:
        """End a stream from this side."""
        self._carry_out(self._streams.end(sid, outcome, time.monotonic(), message))

    def abort(self, sid: Sid, message: str = "") -> None:
        """End a stream that nobody reads; without effect on one that has ended."""
        self.end(sid, Outcome.ABORTED, message)

    def abort_all(self, message: str) -> None:
        """End every stream, and those that are opened from now on, because the server stops."""
        self._stopping = message
        for sid in self._streams.open_sids():
            self.abort(sid, message)

    async def metrics(self) -> str:
        """The cluster's metrics as Prometheus text. Raises TimeoutError when the scheduler does not answer."""
        number = next(self._metrics_ids)
        future = self._metrics[number] = self._loop.create_future()
        self._scheduler.send(MetricsRequest(number))
        self._drain_soon()
        try:
            return await asyncio.wait_for(future, METRICS_TIMEOUT_S)
        finally:
            del self._metrics[number]

    def wake(self, reader: OutputReader) -> None:
        """Call its on_output once everything that has arrived is read."""
        if not self._to_wake:
            self._loop.call_soon(self._wake)
        self._to_wake.append(reader)

    def close(self) -> None:
        """Say goodbye and free everything. Streams should have been aborted before."""
        self._loop.remove_reader(self._scheduler.fileno())
        self._loop.remove_reader(self._tokens.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self._beats.close()
        self._scheduler.send(Goodbye(self._config.name, self._incarnation))
        self._scheduler.close()
        self._tokens.close()
        self._network.close(LINGER_MS)
        self._token_path.unlink(missing_ok=True)

    def _wake(self) -> None:
        readers, self._to_wake = self._to_wake, []
        for reader in readers:
            reader.on_output()

    def _drain_soon(self) -> None:
        """A send may swallow the edge that announces an arrival."""
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Read both sockets until they are empty: their descriptors tell only that something has changed."""
        self._drain_due = False
        if self._scheduler.socket.closed:
            return
        now = time.monotonic()
        for message, _frames in self._scheduler.drain():
            self._on_message(message)
            self._carry_out(self._streams.on_message(message, now))
        if self._closed is not None and not self._closed.done() and not self._streams.closing:
            self._closed.set_result(None)
        for sender, batch, frames in self._tokens.drain():
            try:
                self._carry_out(self._streams.on_token_batch(batch, now, frames))
            except ValueError as error:
                log.error("refused a batch from %s: %s", sender.decode(errors="replace"), error)

    def _on_message(self, message: ToFrontend) -> None:
        if isinstance(message, ClusterStatus):
            if message.log_level != (self.status.log_level if self.status else ""):
                set_log_level(message.log_level)
            self.status, self._status_at = message, time.monotonic()
            for callback in self._on_status:
                callback()
        elif isinstance(message, MetricsReply):
            future = self._metrics.get(message.request)
            if future is not None and not future.done():
                future.set_result(message.text)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        sent = False
        for instruction in instructions:
            match instruction:
                case Deliver():
                    self._deliver[instruction.sid](instruction)
                case Finished():
                    self._deliver.pop(instruction.sid)(instruction)
                case SendToScheduler():
                    self._scheduler.send(instruction.message, *instruction.frames)
                    sent = True
                case SendToWorker():
                    self._tokens.send(identity(*instruction.worker), instruction.message)
                    sent = True
        if self._ended is not None and not self._ended.done() and not len(self._streams):
            self._ended.set_result(None)
        if sent:
            self._drain_soon()
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._streams.next_deadline()
        if deadline >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(deadline - time.monotonic(), 0.0) + 1e-3, self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self._carry_out(self._streams.tick(time.monotonic()))
