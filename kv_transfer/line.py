"""A ZeroMQ connection to one owner that notices when the owner is gone. For one thread."""

from collections.abc import Sequence

import zmq

from baton.kv_transfer.contract import TransferError
from baton.proto.network import FAILURES, Network

_ENDS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | FAILURES


class Line:
    """Connected once: it ends with its first failure, and is not built up again."""

    def __init__(self, network: Network, address: str) -> None:
        """Raises TransferError when no connection is possible, not when nobody answers."""
        self._socket = network.context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(_ENDS)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            self.endpoint = network.connect(self._socket, address)
        except zmq.ZMQError as error:
            self.close()
            raise TransferError(f"no connection to {address}: {error}") from error

    def fileno(self) -> int:
        """Readable when `over` may have changed. ZeroMQ tells of a change once: ask `over` before each wait."""
        return int(self._monitor.getsockopt(zmq.FD))

    def over(self) -> bool:
        """Whether the owner is gone, or never was there."""
        return bool(int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def send(self, data: bytes) -> None:
        """Leave a message to the connection. Raises TransferError when there is none any more."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransferError("the owner has gone") from error

    def receive(self, timeout_s: float) -> Sequence[zmq.Frame]:
        """The next message's frames. Raises TransferError when the owner is gone or stays silent for timeout_s."""
        ready = dict(self._poller.poll(round(timeout_s * 1000)))
        if self._socket in ready:
            return self._socket.recv_multipart(copy=False)
        if self._monitor in ready:
            raise TransferError("the owner has gone")
        raise TransferError(f"the owner has sent nothing for {timeout_s:.0f} s")

    def close(self) -> None:
        """Let go of it."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
