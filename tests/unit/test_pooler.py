"""Which tokens are pooled into which vectors, against the obvious loop."""

import random

import numpy as np
import torch

from baton.proto.messages import SamplingParams
from baton.worker.plan import Row, SlotInit
from baton.worker.pooler import PooledRows, Pooler, to_rows

HIDDEN = 8


def test_chunks_of_mixed_steps_become_the_right_means() -> None:
    rng = random.Random()
    pooler = Pooler(6, HIDDEN, torch.device("cpu"))
    prompts = [torch.randn(rng.randrange(1, 3000), HIDDEN) for _ in range(6)]
    last = [slot % 2 == 1 for slot in range(6)]  # of those slots only the last token counts
    done, made = [0] * 6, {}
    for slot in range(6):
        pooler.take_slot(SlotInit(slot, (0, slot), 1, SamplingParams(0, pooling="MEAN"), 1, [], []))
    while open_ := [slot for slot in range(6) if done[slot] < len(prompts[slot])]:
        rows, states = [], []
        for slot in rng.sample(open_, len(open_)):
            count = rng.randrange(1, len(prompts[slot]) - done[slot] + 1)
            end = done[slot] + count
            ends = end == len(prompts[slot])
            pools, mean_of = (int(ends), int(ends)) if last[slot] else (count, ends * end)
            rows.append(Row(slot, done[slot], count, [], False, [], False, 0, pools=pools, mean_of=mean_of))
            states.append(prompts[slot][done[slot] : end])
            done[slot] = end
        starts = np.concatenate([[0], np.cumsum([row.num_tokens for row in rows])])
        pooled = PooledRows.of(rows, starts)
        if pooled is None:
            continue
        vectors = to_rows(pooled, pooler.pool(pooled, torch.cat(states)[torch.from_numpy(pooled.tokens)]))
        made |= {rows[row].slot: np.frombuffer(vector, dtype="<f4") for row, vector in vectors.items()}
    for slot, prompt in enumerate(prompts):
        expected = prompt[-1] if last[slot] else prompt.double().mean(0).float()
        np.testing.assert_allclose(made[slot], expected.numpy(), rtol=1e-6, atol=1e-6)


def test_a_new_stream_in_a_slot_starts_from_zero() -> None:
    pooler = Pooler(1, HIDDEN, torch.device("cpu"))
    init = SlotInit(0, (0, 0), 1, SamplingParams(0, pooling="MEAN"), 1, [], [])
    for value in (3.0, 5.0):
        pooler.take_slot(init)
        pooled = PooledRows.of([Row(0, 0, 2, [], False, [], False, 0, pools=2, mean_of=2)], np.array([0, 2]))
        assert pooled is not None
        assert pooler.pool(pooled, torch.full((2, HIDDEN), value)).unique().tolist() == [value]


def test_steps_without_vectors_pool_nothing() -> None:
    assert PooledRows.of([Row(0, 0, 2, [1, 2], False, [], True, 0)], np.array([0, 2])) is None
