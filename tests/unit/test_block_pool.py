"""Block ownership, fences and the prefix cache."""

import random

import pytest

from baton.worker.block_pool import BlockPool


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(range(4))
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.num_used == 4


def test_a_released_published_block_is_found_until_it_is_needed() -> None:
    pool = BlockPool(range(2))
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    pool.release(blocks)
    assert pool.num_free == 2
    assert pool.match([b"a", b"b"]) == [blocks[0]]
    pool.release([blocks[0]])
    assert pool.allocate(2) is not None
    assert pool.match([b"a"]) == []


def test_a_match_shares_the_block_and_keeps_it_from_eviction() -> None:
    pool = BlockPool(range(2))
    (block,) = pool.allocate(1) or []
    pool.publish(block, b"a")
    assert pool.match([b"a"]) == [block]
    pool.release([block])
    assert pool.num_used == 1
    assert pool.allocate(2) is None
    pool.release([block])
    assert pool.num_used == 0


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(range(3))
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([b"a", b"b", b"c"]) == blocks[:2]


def test_a_fenced_block_serves_steps_at_once_and_pulls_after_the_step() -> None:
    pool = BlockPool(range(1))
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks, fence=7)
    assert pool.allocate(1, for_pull=True) is None
    pool.step_completed(6)
    assert pool.num_free_for_pull == 0
    assert pool.num_free == 1
    pool.step_completed(7)
    assert pool.allocate(1, for_pull=True) == blocks


def test_a_second_release_is_an_error() -> None:
    pool = BlockPool(range(2))
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(range(1), enable_prefix_caching=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    pool.release(blocks)
    assert pool.match([b"a"]) == []


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_hands_a_block_out_twice_or_loses_one(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(range(12))
    held: list[tuple[list[int], bool]] = []  # (blocks, whether they are shared by a match)
    names = [bytes([i]) for i in range(8)]
    step = 0
    for _ in range(500):
        action = rng.randrange(4)
        if action == 0 and (blocks := pool.allocate(rng.randrange(1, 4), for_pull=rng.random() < 0.3)):
            exclusive = {b for group, _ in held for b in group}
            assert exclusive.isdisjoint(blocks)
            if rng.random() < 0.5:
                pool.publish(blocks[0], rng.choice(names))
            held.append((blocks, False))
        elif action == 1 and held:
            pool.release(held.pop(rng.randrange(len(held)))[0], fence=rng.choice([0, step + 1]))
        elif action == 2:
            held.append((pool.match([rng.choice(names)]), True))
        else:
            step += 1
            pool.step_completed(step)
        assert pool.num_used == len({b for group, _ in held for b in group})
    for blocks, _ in held:
        pool.release(blocks)
    pool.step_completed(step + 1)
    assert pool.num_free == pool.num_free_for_pull == 12
