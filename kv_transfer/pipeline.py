"""The pulls from one peer, some blocks at a time, whatever they belong to.

    waiting pulls ─► pieces: small, larger … smaller ─► begin ─► link.window under way ─► end ─► pulls that are whole

What is asked for meanwhile goes behind what is under way, as soon as a piece has ended, and each pull is answered with
its last piece.
"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from baton.kv_transfer.contract import Link, Pull, TransferError, blocks_per_piece


class Pipeline:
    """For one link, and one thread."""

    def __init__(self, link: Link, block_bytes: int, num_blocks: int) -> None:
        """To an owner that has so many blocks."""
        self._link = link
        self._num_blocks = num_blocks
        self._most = blocks_per_piece(block_bytes, link.piece_bytes)
        self._edge = blocks_per_piece(block_bytes, link.edge_bytes or link.piece_bytes)
        self._index = 0

    def copy(self, next_pull: Callable[[], Pull | None]) -> Iterator[Pull]:
        """Copy what `next_pull` returns, which is asked for no more than the next pieces need, until it returns None
        and all is done. Yields each pull when its last byte is in place. Raises TransferError or OSError."""
        blocks = _Blocks()
        under_way: deque[tuple[int, np.ndarray, list[Pull]]] = deque()
        size = 0
        while True:
            while blocks.left < 2 * self._most and (pull := next_pull()) is not None:
                blocks.put(pull)
            if blocks.left and len(under_way) < self._link.window:
                size = piece_size(blocks.left, size, self._edge, self._most)
                source, target, whole = blocks.take(size)
                if len(beyond := source[source.view(np.uint64) >= self._num_blocks]):  # negative ones too
                    raise TransferError(f"block {beyond[0]} is beyond the owner's pool of {self._num_blocks}")
                self._link.begin(self._index, source, target, last=not blocks.left)
                under_way.append((self._index, target, whole))
                self._index += 1
            elif under_way:
                index, target, whole = under_way.popleft()
                self._link.end(index, target)
                yield from whole
                if not under_way:
                    size = 0
            else:
                return


def piece_size(left: int, before: int, edge: int, most: int) -> int:
    """How many of the blocks that are left go next, after a piece of `before`, 0 when nothing is under way.

    What goes without a pause begins with `edge` and ends with about that or less. In between a piece is at most twice
    as large as the one before, and as all behind it: so none waits long until its blocks are gathered, and the end
    until they are scattered.
    """
    if 2 * left <= 3 * edge:
        return min(left, most)
    return min(max(2 * before, edge), max(edge, 2 * left // 3), most)


class _Blocks:
    """The blocks of pulls, in their order."""

    def __init__(self) -> None:
        self.left = 0
        self._pulls: deque[Pull] = deque()
        self._taken = 0  # of the first pull

    def put(self, pull: Pull) -> None:
        assert len(pull.source) == len(pull.target) > 0
        self._pulls.append(pull)
        self.left += len(pull.source)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray, list[Pull]]:
        """The next `count`: source and target, int64 [count] each; and the pulls of which nothing is left."""
        source: list[np.ndarray] = []
        target: list[np.ndarray] = []
        whole: list[Pull] = []
        self.left -= count
        while count:
            pull, first = self._pulls[0], self._taken
            self._taken = min(first + count, len(pull.source))
            source.append(pull.source[first : self._taken])
            target.append(pull.target[first : self._taken])
            count -= self._taken - first
            if self._taken == len(pull.source):
                whole.append(self._pulls.popleft())
                self._taken = 0
        return np.concatenate(source), np.concatenate(target), whole
