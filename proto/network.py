"""A process's ZeroMQ: where it listens beyond its host, and what it demands from whoever comes from there.

Inside one host sockets are files of a 0700 directory. Beyond it they are TCP, encrypted and open to holders of the
cluster's key alone; a TCP endpoint beyond loopback without a key is refused here, whatever was let through before.
"""

import logging
import time

import zmq
from zmq.utils.monitor import parse_monitor_message, recv_monitor_message

from baton.proto.address import is_loopback, reachable, tcp_endpoint, tcp_host
from baton.proto.config import NetworkConfig
from baton.proto.curve import ClusterKey, admit, load_key
from baton.proto.errors import UserError

log = logging.getLogger(__name__)

PING_MS = 2000
SILENT_MS = 6000
"""A TCP connection whose other end does not answer pings for so long is over: its host may have gone without a word."""
CONNECT_MS = 5000
REPEAT_S = 10.0
"""The same refusal is told again after so long."""

FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_WITHOUT_KEY = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH


class Network:
    """A context and the rules for its sockets. `close` ends the context; its sockets must have been closed."""

    def __init__(self, host: str = "", key: ClusterKey | None = None, io_threads: int = 1) -> None:
        """`host` and `key` as in NetworkConfig."""
        self.context = zmq.Context(io_threads)
        self._host = host
        self._key = key
        self._door = admit(self.context, key) if key is not None else None

    def beside(self, io_threads: int) -> "Network":
        """Another context under the same rules, with so many threads that move bytes."""
        return Network(self._host, self._key, io_threads)

    @property
    def spans_hosts(self) -> bool:
        """Whether sockets are to be reached from other hosts."""
        return bool(self._host)

    @property
    def guarded(self) -> bool:
        """Whether there is a key, so that peers may be refused."""
        return self._key is not None

    def everywhere(self, endpoint: str) -> str:
        """The address of a socket with this endpoint on its host, and one beyond where there is to be one."""
        return f"{endpoint} {self.anywhere()}".rstrip()

    def anywhere(self) -> str:
        """A free port of this host's address; empty when nobody listens beyond this host."""
        return tcp_endpoint(self._host, "*") if self.spans_hosts else ""

    def bind(self, socket: zmq.Socket, address: str) -> str:
        """Bind all endpoints of an address; the address by which peers know it, with ports instead of '*'."""
        bound = []
        # What is set for the endpoints beyond this host applies to those that are bound after it.
        for endpoint in sorted(address.split(), key=lambda each: each.startswith("tcp://")):
            if endpoint.startswith("tcp://"):
                self._check(endpoint)
                self._set_tcp(socket, endpoint)
                if self._key is not None:
                    self._key.serve(socket)
            socket.bind(endpoint)
            bound.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        return " ".join(bound)

    def connect(self, socket: zmq.Socket, address: str) -> str:
        """Connect to the endpoint of an address that can be reached from here; that endpoint."""
        endpoint = reachable(address)
        if endpoint.startswith("tcp://"):
            self._check(endpoint)
            self._set_tcp(socket, endpoint)
            socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
            if self._key is not None:
                self._key.use(socket)
        socket.connect(endpoint)
        return endpoint

    def close(self, linger_ms: int = 0) -> None:
        """End the context; what has not been sent gets linger_ms. Waits until no frame is in use any more."""
        self.context.destroy(linger_ms)
        if self._door is not None:
            self._door.join()

    def _check(self, endpoint: str) -> None:
        if self._key is None and not is_loopback(tcp_host(endpoint)):
            raise UserError(f"{endpoint}: beyond loopback a key is needed: --key-file, made by `baton keys new DIR`")

    @staticmethod
    def _set_tcp(socket: zmq.Socket, endpoint: str) -> None:
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)


def open_network(config: NetworkConfig) -> Network:
    """As configured. Raises UserError when the key file is not usable."""
    return Network(config.host, load_key(config.key_file) if config.key_file else None)


class Refusals:
    """Handshakes that fail at a socket, for the log. Used in the socket's thread; close it before the socket."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._monitor = _watch(socket)
        self._told: dict[str, float] = {}

    def tell(self) -> None:
        """Log what has failed since the last time."""
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            text = f"{event['endpoint'].decode()}: {_why(event['event'], event['value'])}"
            now = time.monotonic()
            if now - self._told.get(text, float("-inf")) >= REPEAT_S:
                self._told[text] = now
                log.warning("a connection was refused at %s", text)

    def close(self) -> None:
        """Watch no longer."""
        self._socket.disable_monitor()
        self._monitor.close(0)


def _watch(socket: zmq.Socket) -> zmq.Socket:
    """As get_monitor_socket, without its bound: ZeroMQ's thread waits where it is full, and all sockets with it."""
    monitor = socket.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    address = f"inproc://refusals-{int(socket.getsockopt(zmq.FD))}"
    socket.monitor(address, FAILURES)
    monitor.connect(address)
    return monitor


def _why(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return "the other side broke it off; it may have another key, or none"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _WITHOUT_KEY:
        return "one of the two sides has no key"
    return "the other side has another key"


def refusal(network: Network, endpoint: str, timeout_s: float) -> str:
    """Why a connection to 'tcp://…' can't be had, in words that follow its name; empty when it can."""
    with network.context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        monitor = socket.get_monitor_socket(FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            network.connect(socket, endpoint)
            if not monitor.poll(round(timeout_s * 1000)):
                return f"nobody answers within {timeout_s:.0f} s"
            if recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return ""
            if not network.guarded:
                return "it refused the connection: it wants a key, give the --key-file that it was started with"
            return "it refused the key: both sides need the same --key-file"
        finally:
            socket.disable_monitor()
            monitor.close(0)
