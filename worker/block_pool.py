"""Who holds each KV block, and which blocks hold what: allocation, references, fences and the prefix cache.

    FREE(fence) ─► OWNED (references > 0) ─► published: content-addressed by its hash
         ▲                   │                          │ last reference dropped
         └───────────────────┘                          ▼
         └───────────── evicted, least recently used ─ CACHED

A freed block carries a fence: the last step that may still write it. Steps run in order on one device, so a later step
may take a fenced block; a pull, which runs beside the steps, may not. A published block is full and settled: no step
writes it any more, so it needs no fence.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence


class BlockPool:
    """Bookkeeping for the blocks with these ids; knows nothing of their bytes.

    Ids may have gaps, and come and go by `exchange`, where workers share one memory. Their number stays.
    """

    def __init__(self, blocks: Sequence[int], enable_prefix_caching: bool = True) -> None:
        if not blocks:
            raise ValueError("a block pool needs at least one block")
        self.num_blocks = len(blocks)
        self.caching = enable_prefix_caching
        self._references = dict.fromkeys(blocks, 0)
        self._hash: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        self._free = list(reversed(blocks))  # last freed is taken first: its bytes are still in the cache
        self._fenced: deque[tuple[int, int]] = deque()  # (step, block), oldest first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks a step may take now: free, fenced or merely cached."""
        return len(self._free) + len(self._cached) + len(self._fenced)

    @property
    def num_free_for_pull(self) -> int:
        """Blocks a pull may take now: those that no step in flight can write."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks held by requests or leases."""
        return self.num_blocks - self.num_free

    def allocate(self, count: int, for_pull: bool = False) -> list[int] | None:
        """`count` blocks with one reference each, or None (and no change) when there are fewer."""
        if count > (self.num_free_for_pull if for_pull else self.num_free):
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            return block
        return self._fenced.popleft()[1]

    def _forget(self, block: int) -> None:
        del self._by_hash[self._hash.pop(block)]

    def match(self, hashes: list[bytes]) -> list[int]:
        """The longest run of cached blocks for this chain (one hash per block), one reference taken on each."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            self._references[block] += 1
            if self._references[block] == 1:
                del self._cached[block]
            blocks.append(block)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more reference on each block of somebody's, which whoever asks does not write."""
        for block in blocks:
            self._references[block] += 1

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make a full, settled block findable. The first block with a given content wins."""
        if self.caching and block not in self._hash and block_hash not in self._by_hash:
            self._hash[block] = block_hash
            self._by_hash[block_hash] = block

    def release(self, blocks: list[int], fence: int = 0) -> None:
        """Drop one reference on each block of a sequence, given first to last.

        `fence` is the last step that may write them, 0 when none is in flight. Released last block first, so that
        under pressure the cache loses the ends of sequences before their beginnings.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if self._references[block] < 0:
                raise AssertionError(f"block {block} was released twice")
            if block in self._hash:
                self._cached[block] = None
            elif fence:
                self._fenced.append((fence, block))
            else:
                self._free.append(block)

    def exchange(self, give: Sequence[int], take: Sequence[int]) -> None:
        """Blocks change owner: the caller's only reference on each of `give` ends, and it has one on each of `take`."""
        for block in give:
            if self._references.pop(block) != 1 or block in self._hash:
                raise AssertionError(f"block {block} is given away but still needed here")
        for block in take:
            if block in self._references:
                raise AssertionError(f"block {block} was taken but is here already")
            self._references[block] = 1

    def step_completed(self, step: int) -> None:
        """Fences up to `step` have passed."""
        while self._fenced and self._fenced[0][0] <= step:
            self._free.append(self._fenced.popleft()[1])

    def clear_cache(self) -> None:
        """Forget every cached content; blocks in use stay usable but can no longer be found."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._by_hash.clear()
        self._hash.clear()
