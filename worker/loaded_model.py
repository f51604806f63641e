"""A model with its weights on a device, and what the rest of the worker needs to know of it."""

import logging
import time
from pathlib import Path

import torch

from baton.kernels import vector_math
from baton.proto.config import WorkerConfig
from baton.worker.attention import choose_ops
from baton.worker.attention.model import Model
from baton.worker.kv_layout import kv_layout
from baton.worker.models.registry import find_model
from baton.worker.weights import loader, placement
from baton.worker.weights.placement import SharedMemory

log = logging.getLogger(__name__)


class LoadedModel:
    """Reads, builds and fills the model of `config`. Raises ValueError when it can't be served.

    Attributes: model, ops, dtype, layout (KVLayout), max_model_len, vocab_size, hidden_size, num_heads, num_kv_heads
    and windows (the distinct ones of its layers; see LlamaConfig).
    """

    def __init__(self, config: WorkerConfig, device: torch.device, shared: SharedMemory | None = None) -> None:
        """With `shared` the weights lie there, where another process may have loaded them."""
        vector_math.settle()
        directory = Path(config.model.path)
        model_json = loader.read_config(directory)
        model_class, config_class = find_model(model_json)
        try:
            shape = config_class.from_json(model_json)
        except KeyError as error:
            raise ValueError(f"{directory / 'config.json'} lacks {error}") from error
        self.dtype = loader.choose_dtype(config.model.dtype, model_json, config.device)
        self.vocab_size: int = shape.vocab_size
        self.hidden_size: int = shape.hidden_size
        self.num_heads: int = shape.num_heads
        self.num_kv_heads: int = shape.num_kv_heads
        self.windows: tuple[int, ...] = tuple(sorted(set(shape.windows)))
        self.max_model_len: int = config.model.max_model_len or shape.max_position_embeddings
        load_format, seed = config.model.load_format, config.model.seed
        fingerprint = loader.fingerprint(model_json, directory, self.dtype, load_format, seed)
        self.layout = kv_layout(
            shape.num_kv_heads, shape.num_layers, shape.head_dim, config.cache.block_size, self.dtype, fingerprint
        )
        started = time.monotonic()
        attention = Model(
            self.dtype,
            shape.head_dim,
            soft_cap=shape.soft_cap > 0,
            batch_invariant=config.model.batch_invariant,
        )
        self.ops = choose_ops(config.device, attention, config.attention_backend)
        with device:
            self.model = model_class(shape, self.max_model_len, self.ops, self.dtype)
        if shared is None:
            placement.place(self.model, device)
            self._fill(config, directory, device)
        else:
            key = placement.arena_key(self.model, fingerprint)
            arena, ready = shared.open(key, placement.arena_bytes(self.model))
            placement.place_in(self.model, arena)
            if ready:
                log.info("found the weights in the keeper's memory")
            else:
                self._fill(config, directory, device)
                shared.filled(key)
        self.model.pack()
        log.info("loaded %s in %.1f s", directory.name, time.monotonic() - started)

    def _fill(self, config: WorkerConfig, directory: Path, device: torch.device) -> None:
        if config.model.load_format == "dummy":
            loader.fill_dummy(self.model, config.model.seed)
        elif device.type == "cuda":
            from baton.worker.weights.stream import load_checkpoint_to_gpu

            load_checkpoint_to_gpu(self.model, directory)
        else:
            loader.load_checkpoint(self.model, directory)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # others may read as soon as it is said to be filled

    def check_pool(self, pool: torch.Tensor) -> None:
        """Raises ValueError unless pool is [num_blocks, *layout.groups[0].shape] of the layout's dtype."""
        group = self.layout.groups[0]
        if tuple(pool.shape[1:]) != tuple(group.shape) or str(pool.dtype) != f"torch.{group.dtype}":
            raise ValueError(
                f"pool {list(pool.shape)} {pool.dtype} does not fit the layout {group.shape} {group.dtype}"
            )
