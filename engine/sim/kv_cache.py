"""The KV blocks of an engine with a prefix cache, by count: no block has a number.

A block in use is private to a sequence, or known by its hash and shared by all that hold it. What a sequence releases
stays cached while nobody needs its room: blocks with no full content go first, then those released longest ago. That is
the order of vLLM's BlockPool (v1/core/block_pool.py), except that it keeps a second block of the same content until
that is evicted by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class KvCache:
    """Owned by the simulator. `free` blocks can be allocated, cached or not."""

    __slots__ = ("_held", "_idle", "_idle_blocks", "free")

    def __init__(self, blocks: int) -> None:
        self.free = blocks
        self._held: dict[int, int] = {}
        """Known blocks in use: how many sequences hold each."""
        self._idle: OrderedDict[int, int] = OrderedDict()
        """Cached and held by nobody, the first to be evicted first: known blocks by hash, one each, and by the negative
        number of its sequence a run of blocks that only this sequence can use again."""
        self._idle_blocks = 0

    def find(self, hashes: Iterable[int]) -> list[int]:
        """The leading ones of these that are cached."""
        found: list[int] = []
        for block in hashes:
            if block not in self._held and block not in self._idle:
                break
            found.append(block)
        return found

    def count_idle(self, hashes: Iterable[int]) -> int:
        """How many of these cached blocks count as free until they are held."""
        return sum(block in self._idle for block in hashes)

    def count_run(self, number: int) -> int:
        """Blocks that are left of a sequence's run."""
        return self._idle.get(-number, 0)

    def hold(self, hashes: Iterable[int]) -> None:
        """Share cached blocks."""
        for block in hashes:
            if block in self._held:
                self._held[block] += 1
            else:
                self._forget(block)
                self._held[block] = 1
                self.free -= 1

    def resume(self, number: int, blocks: int) -> None:
        """Make the first blocks of a sequence's run private again."""
        self._forget(-number)
        self.free -= blocks

    def allocate(self, blocks: int) -> None:
        """Take private blocks, evicting cached ones where there are no others. There must be as many free."""
        self.free -= blocks
        while (excess := self._idle_blocks - self.free) > 0:
            key, cached = self._idle.popitem(last=False)
            if cached > excess:
                self._idle[key] = cached - excess
                self._idle.move_to_end(key, last=False)
            self._idle_blocks -= min(cached, excess)

    def publish(self, block: int) -> bool:
        """Make a private block known; False where another one is held by that hash, and this one stays private."""
        if block in self._held:
            return False
        self._forget(block)
        self._held[block] = 1
        return True

    def release(self, hashes: Sequence[int], number: int, run: int, blocks: int) -> None:
        """Give back what one sequence holds: known blocks, a run that is cached for itself, and other private ones.

        Its last blocks are evicted first: without them the others still serve.
        """
        self.free += run + blocks
        if run:
            self._idle[-number] = run
            self._idle_blocks += run
        for block in reversed(hashes):
            holders = self._held[block] - 1
            if holders:
                self._held[block] = holders
            else:
                del self._held[block]
                self._idle[block] = 1
                self._idle_blocks += 1
                self.free += 1

    def _forget(self, key: int) -> None:
        self._idle_blocks -= self._idle.pop(key, 0)
