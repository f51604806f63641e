"""The life of one incarnation of a worker: its sockets, its batcher, and the loop between them.

One iteration: wait for a socket, the device, a transfer or a timer; hand every event to the batcher; submit the next
steps; carry out what the batcher asked for. Nothing here decides anything.
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from baton.kv_transfer.contract import Pull
from baton.kv_transfer.greeting import Greeting
from baton.proto import PROTOCOL_VERSION
from baton.proto.address import is_local
from baton.proto.channels import Body, Dealer, Router, identity
from baton.proto.errors import UserError
from baton.proto.heartbeat import Heartbeat
from baton.proto.host import clock_space, pid_space
from baton.proto.lifecycle import Duty
from baton.proto.messages import (
    Beat,
    CancelCommand,
    ClockReply,
    ClockRequest,
    Configure,
    Fenced,
    Goodbye,
    NotAdmitted,
    Peer,
    Settings,
    StartDecode,
    StartPrefill,
    ToHolder,
    ToOwner,
    ToWorker,
    Welcome,
    WhoAreYou,
    WorkerHello,
)
from baton.proto.network import Network
from baton.proto.supervision import Supervised, set_log_level
from baton.worker import effects
from baton.worker.backend import Backend
from baton.worker.clock import CHECK_INTERVAL_S, ClusterClock
from baton.worker.device import Device
from baton.worker.token_plane import TokenPlane

log = logging.getLogger(__name__)

LOAD_INTERVAL_S = 0.05
HOLDINGS_INTERVAL_S = 1.0
OWNER_IDLE_S = 60.0
"""A socket to a worker whose leases this one wants no more is closed: by then they have run out."""
HELLO_INTERVAL_S = 1.0
"""An unanswered hello is sent again this often: the scheduler may not be there yet."""
SILENT_S = 3 * CHECK_INTERVAL_S
"""So long without a word from the scheduler is worth one of the log's."""


class Session:
    """Everything that carries this incarnation's name."""

    def __init__(self, backend: Backend, device: Device, network: Network, supervised: Supervised) -> None:
        config = backend.config
        self._backend = backend
        self._device = device
        self._network = network
        self._supervised = supervised
        self._incarnation = int.from_bytes(os.urandom(7), "big")
        stem = Path(config.run_dir) / f"{config.name}-{self._incarnation:014x}"
        self._poller = zmq.Poller()
        self._arrived: set[Any] = set()
        """What was readable at the turn's begin."""
        self._me_bytes = identity(config.name, self._incarnation)
        greeting = Greeting(backend.layout, config.name, self._incarnation, backend.pool_blocks)
        self._source, self._sink = backend.open_transport(stem.with_suffix(".kv"), greeting, network)
        self._peers: Router[ToOwner] = Router(network, network.everywhere(f"ipc://{stem}.peer"), ToOwner)
        self._peer_path = stem.with_suffix(".peer")
        pool = backend.blocks.shared_pool
        self._me = Peer(config.name, self._incarnation, self._peers.address, self._source.address, pool)
        self._scheduler: Dealer[ToWorker] = Dealer(network, config.scheduler, self._me_bytes, ToWorker)
        self._distant = not is_local(self._scheduler.endpoint)
        self._clock = ClusterClock(clock_space(), same_host=not self._distant)
        # worker -> its incarnation, the socket to it, and when that was wanted last
        self._owners: dict[str, tuple[int, Dealer[ToHolder], float]] = {}
        self._tokens = TokenPlane(network, self._poller, config.name, self._incarnation, self._clock)
        self._batcher = backend.new_batcher(self._me)
        backend.grammars.release_all()  # whose requests were the incarnation's before
        self._settings = Settings(role=config.role)
        self._fenced = False
        self._welcome = self._turned_away = False
        self._heard_at = time.monotonic()
        self._silent = False
        self._hello_at = -HELLO_INTERVAL_S
        self._load_at = 0.0
        self._holdings_at = 0.0
        self._load_due = True
        loop_sources = (device, self._sink, backend.grammars, supervised.stop_fd, *backend.blocks.sources)
        for source in (self._peers.socket, self._scheduler.socket, *loop_sources):
            self._poller.register(source, zmq.POLLIN)
        self._beats = Heartbeat(network, config.scheduler, self._beat)
        self._dispatch: dict[type, Callable[[Any, Body], None]] = {
            StartPrefill: self._to_batcher,
            StartDecode: self._on_start_decode,
            CancelCommand: self._to_batcher,
            Configure: self._on_configure,
            Welcome: self._on_welcome,
            WhoAreYou: self._on_who_are_you,
            Fenced: self._on_fenced,
            NotAdmitted: self._on_not_admitted,
            ClockReply: self._on_clock,
        }

    def run(self) -> bool:
        """Serve until stopped or told to leave (False) or fenced (True: go on with a new incarnation)."""
        while not (self._supervised.stopping or self._fenced or self._settings.duty == Duty.LEAVING):
            self._arrived = {source for source, _ in self._poller.poll(self._timeout_ms())}
            self._receive()
            self._compute()
            self._report(time.monotonic())
        if not self._fenced:
            self._scheduler.send(Goodbye(self._backend.config.name, self._incarnation))
        return self._fenced

    def close(self) -> None:
        """Leave no socket, file or thread; the device and the sink finish what they are doing first."""
        self._device.finish()
        self._beats.close()
        self._sink.close()
        self._source.close()
        self._tokens.close()
        for _incarnation, owner, _used in self._owners.values():
            owner.close(0)
        self._scheduler.close()
        self._peers.close(0)
        self._peer_path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------------ one turn

    def _timeout_ms(self) -> int:
        now = time.monotonic()
        at = min(self._batcher.next_deadline(), self._tokens.next_beat(), self._holdings_at + HOLDINGS_INTERVAL_S)
        if not self._welcome:
            at = min(at, self._hello_at + HELLO_INTERVAL_S)
        else:
            at = min(at, self._clock.next_question())
        if self._load_due:
            at = min(at, self._load_at + LOAD_INTERVAL_S)
        return max(0, int((at - now) * 1000) + 1)

    def _receive(self) -> None:
        now = time.monotonic()
        for message, frames in self._scheduler.drain(self._arrived):
            if self._silent:
                log.info("the scheduler is there again")
            self._heard_at, self._silent = now, False
            self._dispatch[type(message)](message, frames)
        for _peer, lease_message, _frames in self._peers.drain(self._arrived):
            self._batcher.handle(lease_message, (), now)
            self._load_due = True
        for _incarnation, owner, _used in self._owners.values():
            for answer, _frames in owner.drain(self._arrived):
                self._batcher.handle(answer, (), now)
        for said in self._backend.blocks.drain(self._arrived):
            self._batcher.handle(said, (), now)
        for cancel in self._tokens.cancels(self._arrived):
            self._batcher.handle(cancel, (), now)
        for done in self._sink.completed():
            if not done.ok:
                log.warning("transfer %d failed: %s", done.transfer, done.reason)
            self._batcher.handle(done, (), now)
        for compiled in self._backend.grammars.completed():
            self._batcher.handle(compiled, (), now)

    def _compute(self) -> None:
        for result in self._device.results():
            self._batcher.complete(result, time.monotonic())
            self._load_due = True
        now = time.monotonic()
        self._carry_out(now)  # tokens do not wait until the next step is launched
        if self._batcher.next_deadline() <= now:
            self._batcher.tick(now)
        while (plan := self._batcher.schedule(now)) is not None:
            self._device.submit(plan)
            self._load_due = True
        self._carry_out(now)

    def _carry_out(self, now: float) -> None:
        rows: list[effects.Emit] = []
        for effect in self._batcher.outbox:
            match effect:
                case effects.Emit():
                    rows.append(effect)
                case effects.ToScheduler():
                    self._scheduler.send(effect.message)
                case effects.ToOwner():
                    self._owner(effect.owner).send(effect.message)
                case effects.ToHolder():
                    # A holder that is gone asks again, or its lease expires.
                    self._peers.send(identity(effect.holder.worker, effect.holder.incarnation), effect.message)
                case effects.ToKeeper():
                    self._backend.blocks.send(effect.message)
                case Pull():
                    self._sink.start(effect)
                case effects.Compile():
                    self._backend.grammars.request(effect.grammar)
                case effects.Release():
                    self._backend.grammars.release(effect.grammar)
        self._batcher.outbox.clear()
        self._tokens.send(rows, now)
        self._tokens.beat(now)

    def _owner(self, owner: Peer) -> Dealer[ToHolder]:
        incarnation, dealer, _ = self._owners.get(owner.worker, (0, None, 0.0))
        if dealer is not None and incarnation != owner.incarnation:
            self._forget_owner(owner.worker)  # an earlier one: nobody listens there any more
            dealer = None
        if dealer is None:
            dealer = Dealer(self._network, owner.endpoint, self._me_bytes, ToHolder)
            self._poller.register(dealer.socket, zmq.POLLIN)
        self._owners[owner.worker] = owner.incarnation, dealer, time.monotonic()
        return dealer

    def _forget_owner(self, name: str) -> None:
        _incarnation, dealer, _used = self._owners.pop(name)
        self._poller.unregister(dealer.socket)
        dealer.close(0)

    def _report(self, now: float) -> None:
        if now - self._heard_at > SILENT_S and not self._silent:
            self._silent = True
            log.warning("no word from the scheduler at %s for %.0f s", self._scheduler.endpoint, SILENT_S)
        if not self._welcome:
            if now - self._hello_at >= HELLO_INTERVAL_S:
                self._hello(now)
            return
        with_holdings = now - self._holdings_at >= HOLDINGS_INTERVAL_S
        if with_holdings or (self._load_due and now - self._load_at >= LOAD_INTERVAL_S):
            load = self._batcher.load(with_holdings)
            if with_holdings:
                load = msgspec.structs.replace(
                    load, settings=self._settings, links=(*self._sink.links(), *self._batcher.links())
                )
            self._scheduler.send(load)
            self._load_at, self._load_due = now, False
            if with_holdings:
                self._holdings_at = now
                idle = [name for name, (_, _, used) in self._owners.items() if now - used > OWNER_IDLE_S]
                for name in idle:
                    self._forget_owner(name)
        if now >= self._clock.next_question():
            self._scheduler.send(ClockRequest(now))
            self._clock.asked(now)

    # ------------------------------------------------------------------------------------------- scheduler's messages

    def _to_batcher(self, message: StartPrefill | StartDecode | CancelCommand, frames: Body) -> None:
        if message.epoch < self._batcher.epoch:
            self._hello(time.monotonic())  # which says so, if it is the present scheduler's
        self._batcher.handle(message, frames, time.monotonic())
        self._load_due = True

    def _on_start_decode(self, message: StartDecode, frames: Body) -> None:
        self._to_batcher(msgspec.structs.replace(message, reported_at=self._clock.local(message.reported_at)), frames)

    def _on_clock(self, message: ClockReply, _frames: Body) -> None:
        self._clock.take(message, time.monotonic())

    def _on_welcome(self, message: Welcome, _frames: Body) -> None:
        if not self._welcome:
            log.info("registered with the scheduler")
            self._supervised.ready()
        self._welcome = True
        self._batcher.handle(message, (), time.monotonic())

    def _on_configure(self, message: Configure, _frames: Body) -> None:
        if message.epoch < self._batcher.epoch:
            return
        before, self._settings = self._settings, message.settings
        if before.cache_flushes != self._settings.cache_flushes:
            self._batcher.pool.clear_cache()
        if before.log_level != self._settings.log_level:
            set_log_level(self._settings.log_level)
        if self._settings.duty == Duty.LEAVING:
            self._supervised.leaving()
        if (before.role, before.duty) != (self._settings.role, self._settings.duty):
            log.info("now %s, %s", self._settings.role, self._settings.duty)
        self._holdings_at = 0.0  # the next report, which is due, says how it is now

    def _on_who_are_you(self, _message: WhoAreYou, _frames: Body) -> None:
        self._hello(time.monotonic())

    def _on_fenced(self, message: Fenced, _frames: Body) -> None:
        if message.incarnation == self._incarnation:
            log.warning("fenced by the scheduler (%s): starting over as a new incarnation", message.reason)
            self._fenced = True

    def _on_not_admitted(self, message: NotAdmitted, _frames: Body) -> None:
        if message.incarnation != self._incarnation:
            return
        if message.final:
            raise UserError(message.reason)
        if not self._turned_away:
            log.warning("the scheduler does not admit this worker: %s", message.reason)
            self._turned_away = True

    def _hello(self, now: float) -> None:
        config = self._backend.config
        self._hello_at = now
        hello = WorkerHello(
            worker=config.name,
            incarnation=self._incarnation,
            role=config.role,
            pid=os.getpid(),
            protocol=PROTOCOL_VERSION,
            peer=self._me,
            layout=self._backend.layout,
            num_blocks=self._backend.num_blocks,
            block_size=config.cache.block_size,
            max_model_len=self._backend.max_model_len,
            max_num_seqs=config.batch.max_num_seqs,
            max_num_batched_tokens=config.batch.max_num_batched_tokens,
            holdings=self._batcher.holdings(),
            settings=self._settings,
            host=socket.gethostname(),
            pid_space=pid_space(),
            distant=self._distant,
            epoch=self._batcher.epoch,
        )
        self._scheduler.send(hello)
        self._batcher.resend_ready()

    def _beat(self) -> Beat:
        step, started, expected_s = self._device.running or (0, 0.0, 0.0)
        running_s = time.monotonic() - started if step else 0.0
        return Beat(self._backend.config.name, self._incarnation, step, running_s, expected_s)
