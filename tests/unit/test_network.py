"""Sockets beyond one host: who is let in, who is not, what is said about it, and which endpoint a peer takes."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from baton.proto.address import crosses_hosts, is_loopback, reachable, tcp_endpoint, tcp_host
from baton.proto.channels import Dealer, Router
from baton.proto.curve import ClusterKey, create_key, load_key
from baton.proto.errors import UserError
from baton.proto.messages import CloseAck
from baton.proto.network import Network, refusal

LOOPBACK = "127.0.0.1"
ANSWER_MS = 5000
numbers = itertools.count()


def new_key(folder: Path) -> ClusterKey:
    return load_key(str(create_key(folder)))


@pytest.fixture
def key(tmp_path: Path) -> ClusterKey:
    return new_key(tmp_path / "ours")


@pytest.fixture
def network(key: ClusterKey) -> Iterator[Network]:
    threads = threading.active_count()
    network = Network(LOOPBACK, key)
    yield network
    network.close()
    assert threading.active_count() == threads


def exchange(router: Router, network: Network, address: str) -> bool:
    """Whether a message of a new peer arrives."""
    dealer: Dealer = Dealer(network, address, f"peer:{next(numbers)}".encode(), CloseAck)
    try:
        dealer.send(CloseAck((1, 2)))
        if not router.socket.poll(ANSWER_MS):
            return False
        return [message for _, message, _ in router.drain()] == [CloseAck((1, 2))]
    finally:
        dealer.close(0)


def test_one_socket_is_a_file_on_its_host_and_wants_the_key_beyond(
    network: Network, key: ClusterKey, tmp_path: Path
) -> None:
    router: Router = Router(network, network.everywhere(f"ipc://{tmp_path}/socket"), CloseAck)
    local, far = router.address.split()
    assert local == f"ipc://{tmp_path}/socket"
    assert far.startswith(f"tcp://{LOOPBACK}:")
    here, there = Network(), Network("", key)
    try:
        assert exchange(router, here, local)
        assert exchange(router, there, far)
        assert exchange(router, there, router.address)
    finally:
        here.close()
        there.close()
        router.close()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("another", "it refused the key: both sides need the same --key-file"),
        ("only the public half", "it refused the key: both sides need the same --key-file"),
        ("none", "it wants a key, give the --key-file that it was started with"),
    ],
)
def test_whoever_has_not_the_key_is_refused_and_both_sides_say_so(
    keys: str, said: str, network: Network, key: ClusterKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    router: Router = Router(network, network.anywhere(), CloseAck)
    other = new_key(tmp_path / "theirs")
    theirs = {"another": other, "only the public half": Impostor(key.public, other), "none": None}[keys]
    stranger = Network("", theirs)  # type: ignore[arg-type]
    try:
        assert said in refusal(stranger, router.address, ANSWER_MS / 1000)
        deadline = time.monotonic() + ANSWER_MS / 1000
        while "was refused" not in caplog.text and time.monotonic() < deadline:
            assert not router.socket.poll(10)
            assert list(router.drain()) == []
    finally:
        stranger.close()
        router.close()
    (record,) = [record for record in caplog.records if "was refused" in record.message]
    assert record.message.startswith(f"a connection was refused at {router.address}: ")
    # Without a key either side may be the first to break it off.
    assert any(words in record.message for words in (("no key", "or none") if keys == "none" else ("another key",)))
    assert not any(half.decode() in caplog.text for half in (key.public, key.secret, other.public, other.secret))


class Impostor:
    """Knows the cluster's public half, and has a pair of its own."""

    def __init__(self, public: bytes, own: ClusterKey) -> None:
        self.public = own.public
        self._server, self._own = public, own

    def use(self, socket: zmq.Socket) -> None:
        self._own.use(socket)
        socket.curve_serverkey = self._server


def test_a_peer_that_comes_again_is_heard_although_its_old_connection_is_still_there(network: Network) -> None:
    """As when a cable was out for seconds, and one side has noticed before the other."""
    router: Router = Router(network, network.anywhere(), CloseAck)
    connections: list[Dealer] = []
    try:
        for number in range(2):
            connections.append(Dealer(network, router.address, b"decode-0:1", CloseAck))
            connections[-1].send(CloseAck((1, number)))
            assert router.socket.poll(ANSWER_MS)
            assert [message.sid for _, message, _ in router.drain()] == [(1, number)]
        assert router.send(b"decode-0:1", CloseAck((1, 2)))
        assert connections[-1].socket.poll(ANSWER_MS)
    finally:
        for connection in connections:
            connection.close(0)
        router.close(0)


def test_the_holder_of_the_key_is_told_nothing_against_it(network: Network, key: ClusterKey) -> None:
    router: Router = Router(network, network.anywhere(), CloseAck)
    there = Network("", key)
    try:
        assert refusal(there, router.address, ANSWER_MS / 1000) == ""
    finally:
        there.close()
        router.close()


def test_refusals_that_nobody_has_read_hold_up_no_message(network: Network) -> None:
    """ZeroMQ reports them from the thread that moves all bytes; a monitor has room for 2,000 by itself."""
    router: Router = Router(network, network.anywhere(), CloseAck)
    greeting_without_key = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(52, b"\0")
    try:
        for _ in range(2100):
            with socket.create_connection((LOOPBACK, int(router.address.rpartition(":")[2]))) as stranger:
                stranger.settimeout(ANSWER_MS / 1000)
                stranger.sendall(greeting_without_key)
                while stranger.recv(64):
                    pass
        assert exchange(router, network, router.address)
    finally:
        router.close()


UNREADABLE = {
    "no message": b"\xc1",
    "text that is no UTF-8": b"\x93\xa8CloseAck\xa2\xff\xfe\x01",
    "nested beyond all measure": b"\x93\xa8CloseAck\x92\x01\x02" + b"\x91" * 5000 + b"\x01",
}


@pytest.mark.parametrize("frame", UNREADABLE.values(), ids=UNREADABLE)
def test_what_can_not_be_read_is_counted_and_the_next_message_heard(frame: bytes, tmp_path: Path) -> None:
    network = Network()
    router: Router = Router(network, f"ipc://{tmp_path}/socket", CloseAck)
    dealer: Dealer = Dealer(network, router.address, b"peer:1", CloseAck)
    try:
        dealer.socket.send(frame)
        dealer.send(CloseAck((1, 2)))
        heard: list[CloseAck] = []
        while not heard:
            assert router.socket.poll(ANSWER_MS)
            heard = [message for _, message, _ in router.drain()]
        assert (heard, router.malformed) == ([CloseAck((1, 2))], 1)
        router.socket.send_multipart([b"peer:1", frame])
        assert dealer.socket.poll(ANSWER_MS)
        assert (list(dealer.drain()), dealer.malformed) == ([], 1)
    finally:
        dealer.close(0)
        router.close(0)
        network.close()


def test_beyond_loopback_nothing_listens_or_connects_without_a_key() -> None:
    network = Network("10.1.2.3")
    with pytest.raises(UserError, match=r"tcp://10\.1\.2\.3:\*: beyond loopback a key is needed"):
        Router(network, network.anywhere(), CloseAck)
    with pytest.raises(UserError, match=r"tcp://10\.1\.2\.4:5: beyond loopback a key is needed"):
        Dealer(network, "tcp://10.1.2.4:5", b"peer:1", CloseAck)
    network.close()


@pytest.mark.parametrize(("mode", "said"), [(0o644, "mode 0644"), (0o620, "mode 0620")])
def test_a_key_that_others_may_read_or_write_is_refused(mode: int, said: str, tmp_path: Path) -> None:
    file = create_key(tmp_path)
    file.chmod(mode)
    with pytest.raises(UserError, match=f"{said}.*chmod 600"):
        load_key(str(file))


@pytest.mark.parametrize("damage", ["empty", "half", "another's secret", "no text"])
def test_a_damaged_key_file_is_refused_without_showing_it(damage: str, tmp_path: Path) -> None:
    file, other = create_key(tmp_path), new_key(tmp_path / "other")
    text = file.read_text()
    secret = load_key(str(file)).secret.decode()
    damaged = {
        "empty": b"",
        "half": "\n".join(line for line in text.splitlines() if "secret-key" not in line).encode(),
        "another's secret": text.replace(secret, other.secret.decode()).encode(),
        "no text": bytes(range(256)),
    }[damage]
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="is not a whole key file") as caught:
        load_key(str(file))
    assert secret not in str(caught.value)


def test_a_key_does_not_show_itself(key: ClusterKey) -> None:
    assert key.secret.decode() not in repr(key)
    assert key.public.decode() not in repr(key)


def test_the_first_endpoint_that_is_there_is_taken(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(f"ipc://{tmp_path}/here")
        assert reachable(f"ipc://{tmp_path}/here tcp://10.0.0.5:1") == f"ipc://{tmp_path}/here"
    assert reachable(f"ipc://{tmp_path}/elsewhere tcp://10.0.0.5:1") == "tcp://10.0.0.5:1"
    assert reachable(f"ipc://{tmp_path}/not-yet") == f"ipc://{tmp_path}/not-yet"
    assert crosses_hosts("ipc:///a tcp://10.0.0.5:1")
    assert not crosses_hosts("unix:/a")


@pytest.mark.parametrize("host", ["10.0.0.5", "::1"])
def test_endpoints_have_hosts_of_both_families(host: str) -> None:
    assert tcp_host(tcp_endpoint(host, 5)) == host
    assert is_loopback(host) == (host == "::1")
