"""The keeper's process: one socket, the pidfds of its workers, and what state.py decides carried out.

It knows no model. Its memory lasts as long as the process; when it ends, so do its workers, which begin anew with the
next one.
"""

import logging
import os
from contextlib import nullcontext

import zmq

from baton.keeper.mps_daemon import MpsDaemon
from baton.keeper.state import Allocator, Instruction, Keeper, Send, Watch
from baton.proto.channels import LINGER_MS, Router
from baton.proto.config import KeeperConfig
from baton.proto.messages import ToKeeper
from baton.proto.network import Network
from baton.proto.supervision import Supervised, run_child

log = logging.getLogger(__name__)

LOOK_UP_MS = 500
"""A signal that comes just before the poll begins is handled only once it has ended."""


class Loop:
    """Owns the socket and the pidfds; close() frees them."""

    def __init__(self, keeper: Keeper, router: Router, stop_fd: int) -> None:
        self._keeper = keeper
        self._router = router
        self._stop_fd = stop_fd
        self._pidfds: dict[int, bytes] = {}
        self._poller = zmq.Poller()
        self._poller.register(router.socket, zmq.POLLIN)
        self._poller.register(stop_fd, zmq.POLLIN)

    def run(self) -> None:
        """Until stop_fd is readable."""
        while self._stop_fd not in (ready := dict(self._poller.poll(LOOK_UP_MS))):
            for sender, message, _frames in self._router.drain():
                self._carry_out(self._keeper.handle(sender, message))
            for fd in [fd for fd in ready if fd in self._pidfds]:
                peer = self._pidfds.pop(fd)
                self._poller.unregister(fd)
                os.close(fd)
                self._carry_out(self._keeper.gone(peer))

    def close(self) -> None:
        """Free descriptors and the socket."""
        for fd in self._pidfds:
            os.close(fd)
        self._router.close()

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    # To a worker that has died, or it would be read.
                    self._router.send(instruction.peer, instruction.message, *instruction.frames)
                case Watch():
                    self._watch(instruction)

    def _watch(self, watch: Watch) -> None:
        try:
            fd = os.pidfd_open(watch.pid)
        except ProcessLookupError:
            self._carry_out(self._keeper.gone(watch.peer))
            return
        self._pidfds[fd] = watch.peer
        self._poller.register(fd, zmq.POLLIN)


def main(config: KeeperConfig, supervised: Supervised) -> int:
    """The whole life of the process."""
    with MpsDaemon(config.mps_dir) if config.mps_dir else nullcontext():
        allocator = _allocator(config)
        network = Network()  # this host only
        router: Router = Router(network, config.endpoint, ToKeeper)
        loop = Loop(Keeper(allocator, config.parts), router, supervised.stop_fd)
        try:
            supervised.ready()
            loop.run()
        finally:
            loop.close()
            network.close(LINGER_MS)
    return 0


def _allocator(config: KeeperConfig) -> Allocator:
    if config.device == "cuda":
        from baton.keeper.cuda_memory import CudaAllocator

        return CudaAllocator(config.gpu)
    from baton.keeper.host_memory import HostAllocator

    return HostAllocator()


if __name__ == "__main__":
    run_child(main, KeeperConfig)
