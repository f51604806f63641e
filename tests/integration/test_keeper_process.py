"""A keeper's process, and workers' connections to it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.proto import config as config_tree
from baton.proto.config import CacheConfig, KeeperConfig, ModelConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.messages import Swap, Swapped, Withdraw
from baton.worker.blocks import SharedBlocks

BLOCK_BYTES, NUM_BLOCKS = 4096, 16
Connect = Callable[[str], SharedBlocks]


def bound_memory() -> None:
    """Whatever a test asks for, the machine keeps the rest."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/keeper-0"


@pytest.fixture
def process(tmp_path: Path, endpoint: str) -> Iterator[subprocess.Popen]:
    """Alone, without a launcher."""
    file = tmp_path / "keeper-0.json"
    file.write_bytes(config_tree.encode(KeeperConfig("keeper-0", endpoint, {"prefill-0": 0.25, "decode-0": 0.75})))
    command = [sys.executable, "-P", "-m", "baton.keeper.main", "--config", str(file)]
    process = subprocess.Popen(command, preexec_fn=bound_memory)
    yield process
    process.terminate()
    assert process.wait() in (0, -signal.SIGKILL)


@pytest.fixture
def connect(endpoint: str, process: subprocess.Popen) -> Iterator[Connect]:
    """A worker's connection, closed after the test. Each stands for a process of its own, whose pid is this one's."""
    opened: list[SharedBlocks] = []

    def connect(name: str) -> SharedBlocks:
        cache = CacheConfig(enable_prefix_caching=False)
        opened.append(SharedBlocks(WorkerConfig(name, "decode", ModelConfig("m", ("m",)), cache, keeper=endpoint)))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def wait(blocks: SharedBlocks) -> Swapped:
    """The keeper's next word."""
    while True:
        if swapped := blocks.drain():
            return swapped[0]


def test_two_workers_find_one_pool_and_swap_blocks_in_it(connect: Connect) -> None:
    prefill, decode = connect("prefill-0"), connect("decode-0")
    with prefill.turn():
        first = prefill.pool(BLOCK_BYTES, lambda: NUM_BLOCKS)
        assert prefill.join(11) == [0, 1, 2, 3]
    with decode.turn():
        assert decode.pool(BLOCK_BYTES, lambda: 1) == first
        assert decode.join(22) == list(range(4, 16))
    assert prefill.shared_pool == decode.shared_pool != ""
    assert Path(os.fsdecode(first.handle)).stat().st_size == NUM_BLOCKS * BLOCK_BYTES
    prefill.send(Swap(11, 1, 22, give=(0, 1), take=(15, 4)))
    assert wait(prefill) == Swapped(11, 1, True, (15, 4))
    assert wait(decode) == Swapped(11, 1, True, (0, 1))
    decode.send(Withdraw(11, 2))
    assert wait(decode) == Swapped(11, 2, False)
    assert prefill.join(12) == [2, 3, 4, 15]


def test_the_second_waits_for_its_turn(connect: Connect) -> None:
    prefill, decode = connect("prefill-0"), connect("decode-0")
    order: list[str] = []

    def load() -> None:
        with decode.turn():
            order.append("decode")
            assert decode.note("costs") == b"7 ms"

    with ThreadPoolExecutor(1) as pool:
        with prefill.turn():
            second = pool.submit(load)
            prefill.take_note("costs", b"7 ms")
            order.append("prefill")
        second.result()
    assert order == ["prefill", "decode"]


def test_memory_that_does_not_fit_is_an_error_that_says_what_to_do(connect: Connect) -> None:
    prefill = connect("prefill-0")
    with prefill.turn(), pytest.raises(UserError, match=r"do not fit: .* are free; lower --num-blocks"):
        prefill.pool(2**40, lambda: 2**10)


def test_who_waits_for_a_keeper_that_dies_hears_of_it(connect: Connect, process: subprocess.Popen) -> None:
    prefill = connect("prefill-0")
    with prefill.turn():
        prefill.pool(BLOCK_BYTES, lambda: NUM_BLOCKS)
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prefill.join, 11)
        process.kill()
        with pytest.raises(RuntimeError, match="the keeper has ended"):
            waiting.result()
    with pytest.raises(RuntimeError, match="the keeper has ended"):
        prefill.drain()
