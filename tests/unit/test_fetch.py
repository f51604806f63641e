"""What an owner makes of a reader's question for blocks."""

import msgspec
import numpy as np
import pytest

from baton.kv_transfer.contract import Pool, TransferError
from baton.kv_transfer.fetch import (
    MAX_FETCH_BLOCKS,
    PACKET_BYTES,
    Fetch,
    blocks_per_fetch,
    decode_fetch,
    encode_fetch,
    fetch_sizes,
)

POOL = Pool(address=0, num_blocks=10_000, block_bytes=2**20)


def test_blocks_come_as_they_were_asked_for() -> None:
    asked = np.array([9_999, 0, 3, 3])
    assert decode_fetch(encode_fetch(asked), POOL, at_most=4).tolist() == asked.tolist()


@pytest.mark.parametrize("asked", [[10_000], [-1], [1, 2, 3, 4, 5], []])
def test_other_blocks_than_the_pools_and_too_many_of_them_are_refused(asked: list[int]) -> None:
    with pytest.raises(TransferError, match=f"asks for {len(asked)} blocks"):
        decode_fetch(encode_fetch(np.array(asked, dtype=np.int64)), POOL, at_most=4)


def test_what_is_no_question_is_refused() -> None:
    with pytest.raises(TransferError):
        decode_fetch(msgspec.msgpack.encode(Fetch(b"abc")), POOL, at_most=4)
    with pytest.raises(msgspec.DecodeError):
        decode_fetch(b"\xc1", POOL, at_most=4)


@pytest.mark.parametrize(
    ("count", "edge", "sizes"),
    [
        (20, 0, [6, 7, 7]),
        (1, 1, [1]),
        (2, 1, [2]),
        (3, 1, [1, 1, 1]),
        (4, 1, [1, 2, 1]),
        (20, 1, [1, 4, 5, 5, 4, 1]),
        (90, 1, [1, 4, *[8] * 10, 4, 1]),
    ],
)
def test_a_pull_begins_and_ends_with_small_fetches(count: int, edge: int, sizes: list[int]) -> None:
    assert fetch_sizes(count, 8, edge) == sizes


def test_a_fetch_is_bounded_in_bytes_and_fits_into_a_packet() -> None:
    assert blocks_per_fetch(POOL, 4 * 2**20) == 4
    assert blocks_per_fetch(POOL, 1) == 1
    most = blocks_per_fetch(Pool(0, 2**20, 64), 2**30)
    assert most == MAX_FETCH_BLOCKS
    assert len(encode_fetch(np.full(most, 2**20 - 1))) < PACKET_BYTES
