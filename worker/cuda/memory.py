"""How much of a GPU the KV pool may take: measured with a step of the largest size, not guessed."""

import logging
from collections.abc import Sequence

import torch

from baton.kv_transfer.contract import Pool
from baton.kv_transfer.cuda_memory import OUT_OF_MEMORY, CudaError, ExportedMemory, MappedMemory
from baton.proto.config import WorkerConfig
from baton.proto.errors import UserError
from baton.proto.layout import KVLayout
from baton.proto.lifecycle import Pooling
from baton.proto.messages import SamplingParams
from baton.worker.cuda.runner import CudaRunner
from baton.worker.cuda.sampler import ROWS as SAMPLER_ROWS
from baton.worker.cuda.shared import device_tensor
from baton.worker.kv_pool import DTYPES
from baton.worker.plan import Row, SlotInit, StepPlan

log = logging.getLogger(__name__)

_SPARE_BYTES = 64 * 2**20
"""Left with torch's allocator beside what the largest steps took: smaller ones cut its memory into other pieces."""
PROCESS_BYTES = 800 * 2**20
"""What a process takes on a GPU beside torch's allocations: the CUDA context and loaded kernels."""


class GpuPool:
    """The KV blocks on a GPU, in memory that peers can map: `tensor` [num_blocks, *layout.groups[0].shape].

    Its own memory, zeroed; or that of a keeper, where it has given its `handle`.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, handle: bytes = b"") -> None:
        (group,) = layout.groups
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = group.block_bytes
        size = num_blocks * group.block_bytes
        self._memory = MappedMemory(handle) if handle else self._allocate(size, device)
        self._handle = handle
        tensor = device_tensor(self._memory.address, size, device)
        self.tensor = tensor.view(DTYPES[group.dtype]).view(num_blocks, *group.shape)
        self._gpu = device.index

    def _allocate(self, size: int, device: torch.device) -> ExportedMemory:
        try:
            return ExportedMemory(size)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            raise UserError(
                f"the KV pool of {self.num_blocks} blocks ({size / 2**30:.1f} GiB) does not fit on {device}; "
                "lower --num-blocks, --kv-cache-memory-bytes or --gpu-memory-utilization"
            ) from error

    @property
    def blocks(self) -> Pool:
        """For transports."""
        return Pool(self._memory.address, self.num_blocks, self.block_bytes, gpu=self._gpu, handle=self._handle)

    def close(self) -> None:
        """Let go of the memory, once every step has ended."""
        del self.tensor
        self._memory.close()


def open_gpu(index: int) -> torch.device:
    """The GPU, made current. Raises UserError when there is none or it can't be used."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no NVIDIA driver or GPU here")
    if index >= torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise UserError(f"GPU {index} is not there, {visible} visible; --gpus 0 puts all workers on the first")
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise UserError(f"GPU {index} can't be used: {str(error).splitlines()[0]}") from error
    # float32 means float32, also where the environment has switched TF32 products on.
    torch.set_float32_matmul_precision("highest")
    return device


def measure_pool_blocks(runner: CudaRunner, config: WorkerConfig) -> int:
    """KV blocks that fit beside weights, activations and graphs of all workers. Raises UserError when none does.

    The other workers of a keeper come later and are taken to need what this one does; the weights are there once.
    """
    device, block_bytes, cache = runner.device, runner.layout.groups[0].block_bytes, config.cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    in_use, workers = total - free, config.keeper_workers
    each = torch.cuda.memory_reserved(device) + PROCESS_BYTES
    loaded = in_use + (workers - 1) * each
    scratch = GpuPool(runner.layout, _rows(runner) * _blocks_per_row(runner), device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    runner.attach_pool(scratch.tensor)
    run_largest_steps(runner, range(scratch.num_blocks))
    activations = torch.cuda.max_memory_reserved(device) - before
    graphs = runner.measure_graphs()
    scratch.close()
    runner.detach_pool()
    torch.cuda.empty_cache()
    room = int(total * cache.gpu_memory_utilization) - loaded - workers * (activations + graphs)
    log.info(
        "GPU memory: %.2f GiB; %.2f in use once weights and what %d workers have beside them are there; each %.2f for "
        "activations, %.2f for graphs; %.2f for KV blocks",
        total / 2**30,
        loaded / 2**30,
        workers,
        *(value / 2**30 for value in (activations, graphs, max(room, 0))),
    )
    if room < block_bytes:
        raise UserError(
            f"no room for a KV pool: of {total / 2**30:.1f} GiB {loaded / 2**30:.1f} are in use after loading, a step "
            f"takes {(activations + graphs) / 2**30:.1f} in each of {workers} workers; raise --gpu-memory-utilization "
            f"{cache.gpu_memory_utilization}, or lower --max-num-batched-tokens or --max-num-seqs"
        )
    return room // block_bytes


def run_largest_steps(runner: CudaRunner, own: Sequence[int]) -> None:
    """The steps that need the most memory outside of graphs; they overwrite these blocks of the pool attached.

    Once everything is there they also leave that memory with torch's allocator. A step that took it from the driver
    would wait for the device to be idle, and hold up every stream (150 ms seen).
    """
    rows, blocks_per_row = _rows(runner), _blocks_per_row(runner)
    for pooled in (True, False):  # at the end nobody's slot is one that pools
        runner.execute(_largest_step(rows, _tokens_per_row(runner), blocks_per_row, own, pooled))
    runner.execute(_mixed_step(max(1, min(rows - 1, SAMPLER_ROWS)), list(own[:blocks_per_row])))
    torch.empty(_SPARE_BYTES, dtype=torch.uint8, device=runner.device)


def _rows(runner: CudaRunner) -> int:
    return min(runner.max_seqs, runner.max_tokens)


def _tokens_per_row(runner: CudaRunner) -> int:
    return min(runner.max_tokens // _rows(runner), runner.max_model_len - 1)


def _blocks_per_row(runner: CudaRunner) -> int:
    return -(-_tokens_per_row(runner) // runner.block_size)


def _mixed_step(num_rows: int, blocks: list[int]) -> StepPlan:
    """A prompt and decode rows that ask the sampler for all it has, and a copy of a block, here onto itself: compiles
    what such steps need beside the graphs."""
    params = SamplingParams(
        max_tokens=2,
        temperature=1.0,
        top_k=2,
        top_p=0.5,
        min_p=0.1,
        logprobs=20,
        presence_penalty=1.0,
        logit_bias={0: 1.0},
        min_tokens=1,
        stop_token_ids=(0,),
    )
    inits = [SlotInit(slot, (0, slot), 0, params, 2, [0, 0], blocks) for slot in range(num_rows)]
    prompt = Row(0, 0, 2, [0, 0], False, [], True, 0)
    rows = [prompt] + [Row(slot, 1, 1, [0], False, [], True, 0) for slot in range(1, num_rows)]
    return StepPlan(0, rows, inits, [(blocks[0], blocks[0])])


def _largest_step(num_rows: int, per_row: int, blocks_per_row: int, own: Sequence[int], pooled: bool) -> StepPlan:
    """Prompts whose log-probabilities are wanted too, or whose hidden states are all pooled instead."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    if pooled:
        params = SamplingParams(max_tokens=0, temperature=0.0, pooling=Pooling.MEAN)
    prompt = [0] * per_row
    rows, inits = [], []
    for slot in range(num_rows):
        blocks = [own[i % len(own)] for i in range(slot * blocks_per_row, (slot + 1) * blocks_per_row)]
        inits.append(SlotInit(slot, (0, slot), 0, params, per_row, prompt, blocks))
        row = Row(slot, 0, per_row, prompt, False, [], not pooled, 0)
        if pooled:
            row.pools = row.mean_of = per_row
        else:
            row.targets = prompt[1:]
        rows.append(row)
    return StepPlan(0, rows, inits)
