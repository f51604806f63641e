"""What an owner makes of a reader's question for blocks."""

import numpy as np
import pytest

from baton.kv_transfer.contract import Pool, TransferError
from baton.kv_transfer.fetch import decode_fetch, encode_fetch

POOL = Pool(address=0, num_blocks=10_000, block_bytes=2**20)


def test_blocks_come_as_they_were_asked_for() -> None:
    asked = np.array([9_999, 0, 3, 3])
    assert decode_fetch(encode_fetch(asked), POOL, at_most=4).tolist() == asked.tolist()


@pytest.mark.parametrize("asked", [[10_000], [-1], [1, 2, 3, 4, 5]])
def test_other_blocks_than_the_pools_and_too_many_of_them_are_refused(asked: list[int]) -> None:
    with pytest.raises(TransferError, match=f"asks for {len(asked)} blocks"):
        decode_fetch(encode_fetch(np.array(asked, dtype=np.int64)), POOL, at_most=4)


@pytest.mark.parametrize("data", [b"", b"abc", b"\x00" * 9])
def test_what_is_no_question_is_refused(data: bytes) -> None:
    with pytest.raises(TransferError, match=f"{len(data)} bytes"):
        decode_fetch(data, POOL, at_most=4)
