"""Which transport a pair of workers gets, and what is said about it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from baton.kv_transfer.contract import Pool, TransferError, Transport
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.shm import ShmTransport
from baton.kv_transfer.tcp import TcpTransport
from baton.kv_transfer.topology import choose
from baton.proto.layout import KVLayout
from baton.proto.network import Network

POOL = Pool(address=0, num_blocks=1, block_bytes=64)
SHM = ShmTransport(POOL)


@pytest.fixture
def tcp() -> Iterator[Transport]:
    network = Network()
    transport = TcpTransport(POOL, Path(), network)
    yield transport
    transport.close()
    network.close()


def owner(*names: str) -> Greeting:
    return Greeting(KVLayout("model", ()), "prefill-0", 1, 1, {name: msgspec.Raw(b"\x80") for name in names})


def test_the_first_that_both_have_is_taken_without_a_word(tcp: Transport) -> None:
    assert choose([SHM, tcp], owner("tcp", "shm", "a later one")) == (SHM, "")


def test_a_lesser_one_is_taken_with_the_reason(tcp: Transport) -> None:
    transport, why = choose([SHM, tcp], owner("tcp"))
    assert transport is tcp
    assert why == "shm can't be used: prefill-0 does not offer it"


def test_a_pair_without_a_common_transport_is_refused_with_all_reasons(tcp: Transport) -> None:
    with pytest.raises(TransferError, match=r"no way to read prefill-0's KV blocks: shm .*; tcp .*"):
        choose([SHM, tcp], owner("cuda_ipc"))


def test_only_a_transport_that_crosses_hosts_reaches_another_host(tcp: Transport) -> None:
    transport, why = choose([SHM, tcp], owner("shm", "tcp"), distant=True)
    assert transport is tcp
    assert why == "shm can't be used: prefill-0 is on another host"
    with pytest.raises(TransferError, match="shm can't be used: prefill-0 is on another host"):
        choose([SHM], owner("shm"), distant=True)
