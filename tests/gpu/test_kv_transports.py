"""Blocks between pools of two processes on one GPU, held to the same suite as every other transport."""

import time
from typing import Any

import pytest
import torch
from support.kv_side import DEADLINE_S, LAYOUT, NUM_BLOCKS
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


class TestCudaIpc(GpuSuite):
    kind = "cuda cuda_ipc"

    def test_memory_of_killed_owners_comes_back(self, reader: Any, child: Any) -> None:
        """20 owners' pools, 12 MiB each, are opened and their owners killed. Nothing else may use the GPU meanwhile."""
        assert reader.pull(child("prefill-0", 100).peer, [0], [0]).ok
        free, _ = torch.cuda.mem_get_info()
        for i in range(20):
            owner = child("prefill-1", 101 + i)
            assert reader.pull(owner.peer, [NUM_BLOCKS - 1], [0]).ok
            owner.kill()
            assert not reader.pull(owner.peer, [0], [0]).ok  # by now its memory has been let go of
        deadline = time.monotonic() + DEADLINE_S
        while (now := torch.cuda.mem_get_info()[0]) < free - 60 * 2**20:  # the driver takes its time over the last
            assert time.monotonic() < deadline, f"{(free - now) / 2**20:.0f} MiB have not come back"


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
