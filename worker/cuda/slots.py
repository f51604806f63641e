"""Per-stream state on the device, by slot: block tables and the token sampled last."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from baton.worker.plan import Row, SlotInit


@triton.jit(do_not_specialize=["count"])
def _apply_updates(tables_ptr, updates_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    where = tl.load(updates_ptr + index * 2, mask=mask, other=0)
    tl.store(tables_ptr + where, tl.load(updates_ptr + index * 2 + 1, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _prepare(
    given_ptr,
    positions_ptr,
    token_slots_ptr,
    tables_ptr,
    last_tokens_ptr,
    token_ids_ptr,
    slot_mapping_ptr,
    count,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    slot = tl.load(token_slots_ptr + index, mask=mask, other=-1)
    live = mask & (slot >= 0)
    given = tl.load(given_ptr + index, mask=mask, other=0)
    last = tl.load(last_tokens_ptr + slot, mask=live & (given < 0), other=0)
    tl.store(token_ids_ptr + index, tl.where(given < 0, last, given.to(tl.int64)), mask=mask)
    position = tl.load(positions_ptr + index, mask=live, other=0)
    block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    mapped = tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mapping_ptr + index, mapped, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _store_sampled(tokens_ptr, slots_ptr, last_tokens_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    tokens = tl.load(tokens_ptr + index, mask=mask, other=0)
    tl.store(last_tokens_ptr + tl.load(slots_ptr + index, mask=mask, other=0), tokens, mask=mask)
    tl.store(out_ptr + index, tokens, mask=mask)


class DeviceSlots:
    """tables int32 [num_slots, max_blocks] and last_tokens int64 [num_slots + 1]; the last one takes padding's."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.padding = num_slots
        self.tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._block_size = block_size
        self._num_blocks = [0] * num_slots

    def updates(self, new_slots: Sequence[SlotInit], rows: Sequence[Row]) -> np.ndarray:
        """What a step changes in the tables: int32 [n, 2] of flat index and block, no index twice."""
        width = self.tables.shape[1]
        latest = {init.slot: init.block_table for init in new_slots}
        changes: list[tuple[int, int, list[int]]] = []
        for slot, blocks in latest.items():
            self._num_blocks[slot] = len(blocks)
            changes.append((slot, 0, blocks))
        for row in rows:
            if row.new_blocks:
                changes.append((row.slot, self._num_blocks[row.slot], row.new_blocks))
                self._num_blocks[row.slot] += len(row.new_blocks)
        flat = [slot * width + start + index for slot, start, blocks in changes for index in range(len(blocks))]
        values = [block for _, _, blocks in changes for block in blocks]
        return np.array([flat, values], dtype=np.int32).T

    def apply(self, updates: torch.Tensor) -> None:
        """Updates int32 [n, 2] on the device."""
        if len(updates):
            _apply_updates[(triton.cdiv(len(updates), 256),)](self.tables, updates, len(updates), 256)

    def prepare(
        self, given: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """token_ids and slot_mapping, int64 [n], of the int32 [n] inputs of a step; see StepInputs."""
        count = len(given)
        token_ids = torch.empty(count, dtype=torch.int64, device=given.device)
        slot_mapping = torch.empty_like(token_ids)
        _prepare[(triton.cdiv(count, 256),)](
            given,
            positions,
            token_slots,
            self.tables,
            self.last_tokens,
            token_ids,
            slot_mapping,
            count,
            self.tables.stride(0),
            self._block_size,
            256,
        )
        return token_ids, slot_mapping

    def store_sampled(self, tokens: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
        """tokens int64 [n] become the last of their slots int32 [n], and are written to out int64 [>= n]."""
        count = len(tokens)
        _store_sampled[(triton.cdiv(count, 256),)](tokens, slots, self.last_tokens, out, count, 256)
