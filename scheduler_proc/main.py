"""The scheduler's process: one socket, one poll loop, and the cluster's instructions carried out.

python -m baton.scheduler_proc.main --config scheduler.json
"""

import logging
import math
import os
import time
from contextlib import AbstractContextManager, closing, nullcontext

import zmq
from prometheus_client import disable_created_metrics

from baton.proto.channels import LINGER_MS, Router
from baton.proto.config import SchedulerConfig
from baton.proto.errors import UserError
from baton.proto.host import clock_space, pid_space
from baton.proto.messages import ClockReply, ClockRequest, MetricsReply, MetricsRequest, ToScheduler
from baton.proto.network import open_network
from baton.proto.supervision import Supervised, run_child, set_log_level
from baton.scheduler_proc.activity import Activity
from baton.scheduler_proc.cluster import Cluster
from baton.scheduler_proc.desk import Desk
from baton.scheduler_proc.instructions import (
    Happened,
    Instruction,
    Log,
    Observe,
    Send,
    SetLogLevel,
    Unwatch,
    Watch,
)
from baton.scheduler_proc.metrics import Metrics

log = logging.getLogger(__name__)


class Scheduler:
    """Sockets and clocks around one Cluster. Owns the router and the pidfds; close() frees them."""

    def __init__(self, config: SchedulerConfig, router: Router, desk: Desk, stop_fd: int) -> None:
        self._cluster = Cluster(config, epoch=time.time_ns())
        self._metrics = Metrics()
        self._activity = Activity(self._cluster, config.log_interval_s)
        self._router = router
        self._desk = desk
        self._stop_fd = stop_fd
        self._pid_space, self._clock_space = pid_space(), clock_space()
        self._pidfds: dict[bytes, int] = {}
        self._peers: dict[int, bytes] = {}  # pidfd -> identity
        self._poller = zmq.Poller()
        self._poller.register(router.socket, zmq.POLLIN)
        self._poller.register(stop_fd, zmq.POLLIN)
        self._poller.register(desk.fd, zmq.POLLIN)

    def run(self) -> None:
        """Until stop_fd is readable. Frontends drain before; nothing here needs finishing."""
        while True:
            wait_s = max(self._cluster.next_deadline() - time.monotonic(), 0.0)
            ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
            died = [self._peers[fd] for fd in ready if fd in self._peers]  # a successor's pidfd may get the number
            # What a process said before it died comes before its death.
            self._drain()
            for peer in died:
                self._carry_out(self._cluster.peer_lost(peer, "its process has died", time.monotonic()))
                self._unwatch(peer)
            if self._desk.fd in ready:
                self._desk.clear()
            now = time.monotonic()
            self._desk.serve(self._cluster.operator, now)
            self._carry_out(self._cluster.tick(now))
            self._activity.tick(now)
            if self._stop_fd in ready:
                return

    def close(self) -> None:
        """Free descriptors and the socket."""
        for peer in list(self._pidfds):
            self._unwatch(peer)
        self._router.close()

    def _drain(self) -> None:
        scrapes: list[tuple[bytes, int]] = []
        for sender, message, frames in self._router.drain():
            match message:
                case MetricsRequest():
                    scrapes.append((sender, message.request))
                case ClockRequest():
                    self._router.send(sender, ClockReply(message.sent_s, time.monotonic(), self._clock_space))
                case _:
                    self._carry_out(self._cluster.handle(sender, message, frames, time.monotonic()))
        if scrapes:  # once for all: with many workers it takes as long as some hundred messages
            self._metrics.set_queued(len(self._cluster.queue))
            text = self._metrics.text()
            for sender, request in scrapes:
                self._router.send(sender, MetricsReply(request, text))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._router.send(instruction.peer, instruction.message, *instruction.frames)
                case Observe():
                    self._metrics.observe(instruction.event)
                case Log():
                    log.log(instruction.level, instruction.text)
                case Happened():
                    self._desk.publish(instruction)
                case SetLogLevel():
                    set_log_level(instruction.level)
                case Watch():
                    if instruction.pid_space in ("", self._pid_space):
                        self._watch(instruction.peer, instruction.pid)
                case Unwatch():
                    self._unwatch(instruction.peer)

    def _watch(self, peer: bytes, pid: int) -> None:
        self._unwatch(peer)
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            log.info("%s is not watched as process %d (%s); its beats say whether it lives", peer.decode(), pid, error)
            return
        self._pidfds[peer] = fd
        self._peers[fd] = peer
        self._poller.register(fd, zmq.POLLIN)

    def _unwatch(self, peer: bytes) -> None:
        fd = self._pidfds.pop(peer, None)
        if fd is None:
            return
        del self._peers[fd]
        self._poller.unregister(fd)
        os.close(fd)


def main(config: SchedulerConfig, supervised: Supervised) -> int:
    """The whole life of the process."""
    disable_created_metrics()  # a second series for each counter and histogram that nobody reads
    network = open_network(config.network)
    try:
        router: Router = Router(network, config.endpoint, ToScheduler)
    except zmq.ZMQError as error:
        raise UserError(f"the scheduler can't listen on {config.endpoint}: {error}") from error
    desk = Desk()
    scheduler = Scheduler(config, router, desk, supervised.stop_fd)
    try:
        with _admin(config, desk):
            supervised.ready()
            scheduler.run()
    finally:
        scheduler.close()
        desk.close()
        network.close(LINGER_MS)
    return 0


def _admin(config: SchedulerConfig, desk: Desk) -> AbstractContextManager[object]:
    """The Admin server, where one is wanted: the core installation has no gRPC."""
    if not config.admin.port:
        return nullcontext()
    from baton.scheduler_proc.admin_server import AdminServer

    return closing(AdminServer(config.admin, desk))


if __name__ == "__main__":
    run_child(main, SchedulerConfig)
