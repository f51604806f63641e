"""Which transport a pair of workers gets, and what is said about it."""

from pathlib import Path

import msgspec
import pytest

from baton.kv_transfer.contract import Pool, TransferError
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.shm import ShmTransport
from baton.kv_transfer.tcp import TcpTransport
from baton.kv_transfer.topology import choose
from baton.proto.layout import KVLayout
from baton.proto.network import Network

POOL = Pool(address=0, num_blocks=1, block_bytes=64)
SHM, TCP = ShmTransport(POOL), TcpTransport(POOL, Path(), Network())


def owner(*names: str) -> Greeting:
    return Greeting(KVLayout("model", ()), "prefill-0", 1, 1, {name: msgspec.Raw(b"\x80") for name in names})


def test_the_first_that_both_have_is_taken_without_a_word() -> None:
    assert choose([SHM, TCP], owner("tcp", "shm", "a later one")) == (SHM, "")


def test_a_lesser_one_is_taken_with_the_reason() -> None:
    transport, why = choose([SHM, TCP], owner("tcp"))
    assert transport is TCP
    assert why == "shm can't be used: prefill-0 does not offer it"


def test_a_pair_without_a_common_transport_is_refused_with_all_reasons() -> None:
    with pytest.raises(TransferError, match=r"no way to read prefill-0's KV blocks: shm .*; tcp .*"):
        choose([SHM, TCP], owner("cuda_ipc"))


def test_only_a_transport_that_crosses_hosts_reaches_another_host() -> None:
    transport, why = choose([SHM, TCP], owner("shm", "tcp"), distant=True)
    assert transport is TCP
    assert why == "shm can't be used: prefill-0 is on another host"
    with pytest.raises(TransferError, match="shm can't be used: prefill-0 is on another host"):
        choose([SHM], owner("shm"), distant=True)
