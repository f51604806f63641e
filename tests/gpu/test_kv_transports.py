"""Blocks between pools of two processes, on one GPU and on two, held to the same suite as every other transport."""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kv_side import DEADLINE_S, LAYOUT, NUM_BLOCKS, Child, Side
from support.transport_suite import TransportSuite, start_garbage_thread

pytest.importorskip("triton")

pytestmark = pytest.mark.gpu


class GpuSuite(TransportSuite):
    """Pools on the GPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, device: str) -> None:
        if device != "cuda":
            pytest.skip("no GPU")

    def warm_up(self) -> None:
        from baton.worker.cuda.memory import GpuPool, open_gpu

        GpuPool(LAYOUT, 1, open_gpu(0)).close()


class CudaIpcSuite(GpuSuite):
    def test_memory_of_killed_owners_comes_back(self, reader: Any, child: Any) -> None:
        """20 owners' pools, 12 MiB each, are opened and their owners killed. Nothing else may use the GPU meanwhile."""
        watcher = child("prefill-0", 100)
        assert reader.pull(watcher.peer, [0], [0]).ok
        free = watcher.free_memory()
        for i in range(20):
            owner = child("prefill-1", 101 + i)
            assert reader.pull(owner.peer, [NUM_BLOCKS - 1], [0]).ok
            owner.kill()
            assert not reader.pull(owner.peer, [0], [0]).ok  # by now its memory has been let go of
        deadline = time.monotonic() + DEADLINE_S
        while (now := watcher.free_memory()) < free - 60 * 2**20:  # the driver takes its time over the last
            assert time.monotonic() < deadline, f"{(free - now) / 2**20:.0f} MiB have not come back"


class TestCudaIpc(CudaIpcSuite):
    kind = "cuda cuda_ipc"


class TestCudaIpcInManyPieces(GpuSuite):
    """Rows of the list and events are used again and again within a pull."""

    kind = "small cuda cuda_ipc"


class TestTcp(GpuSuite):
    kind = "cuda tcp"

    def warm_up(self) -> None:
        super().warm_up()
        start_garbage_thread()


class TestFarTcp(TestTcp):
    """Between hosts."""

    kind = "far cuda tcp"


class TestGloo(GpuSuite):
    kind = "cuda gloo"


class BetweenGpusSuite(GpuSuite):
    """The reader on the first GPU, its peers on the second."""

    @pytest.fixture(autouse=True)
    def two_gpus(self, gpu: None) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip(f"needs two GPUs, {torch.cuda.device_count()} here")

    def warm_up(self) -> None:
        super().warm_up()
        meet(self.kind, self.peer_kind)


class TestCudaIpcBetweenGpus(BetweenGpusSuite, CudaIpcSuite):
    kind, peer_kind = "cuda:0 cuda_ipc", "cuda:1 cuda_ipc"


class TestNcclBetweenGpus(BetweenGpusSuite):
    kind, peer_kind = "cuda:0 nccl", "cuda:1 nccl"
    kept = frozenset({"socket:[#]"})  # ncclCommAbort leaves one, as of NCCL 2.28


class TestNcclInManyMessages(TestNcclBetweenGpus):
    kind, peer_kind = "small cuda:0 nccl", "small cuda:1 nccl"


@functools.cache
def meet(kind: str, peer_kind: str) -> None:
    """Once in this process: libraries keep what the first pair has opened."""
    with tempfile.TemporaryDirectory() as folder:
        reader = Side(kind, Path(folder), "decode-0", 22)
        owner = Child(peer_kind, Path(folder), "prefill-0", 11)
        try:
            assert reader.pull(owner.peer, [0], [0]).ok
        finally:
            reader.close()
            owner.close()
