"""Which beginnings of prompts each worker has in its prefix cache, as far as the gateway's own requests tell.

A prompt is cut into blocks that grow with their distance from its start: 256 bytes at first, a 32nd of what precedes
them later. So a prompt of any length has at most 213 blocks, and a match is known to 3% of its length. Each block is
known by a hash of itself and all before it: two prompts share a block only if they are equal up to its end.

Python's own hash is keyed anew in each process: nobody can make two prompts collide, and it costs 2.5 us for 4 kB,
0.2 ms for 1 MB.
"""

from __future__ import annotations

import bisect
import collections

FIRST_BLOCK_BYTES = 256
GROWTH = 32
LONGEST_BYTES = 2 * 1024 * 1024
"""What comes later in a prompt is not looked at: it is longer than any context."""
MOST_BLOCKS = 65_536
"""Of one worker, whatever its cache holds: about 10 MB here."""
LEARNING = 0.05


def _block_ends() -> tuple[int, ...]:
    ends = [FIRST_BLOCK_BYTES]
    while ends[-1] < LONGEST_BYTES:
        ends.append(ends[-1] + max(FIRST_BLOCK_BYTES, ends[-1] // GROWTH))
    return tuple(ends)


BLOCK_ENDS = _block_ends()
BLOCK_BYTES = tuple(end - start for start, end in zip((0, *BLOCK_ENDS), BLOCK_ENDS, strict=False))
"""Size of a block by its number."""

Blocks = tuple[int, ...]
"""Hashes of a prompt's full blocks, from its start."""


def cut(prompt: bytes, *separators: object) -> Blocks:
    """The blocks of a prompt. `separators` are what else makes caches differ: model, adapter, template arguments."""
    known = hash(separators)
    start, length = 0, len(prompt)
    blocks = []
    for end in BLOCK_ENDS:
        if end > length:
            break
        known = hash((known, prompt[start:end]))
        blocks.append(known)
        start = end
    return tuple(blocks)


class PrefixIndex:
    """One worker's cache: the blocks of prompts sent to it, the least recently used forgotten first.

    Holds with every block all those before it: a prompt is used from its end to its start, so its start is forgotten
    last, as in the engines' own caches.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._blocks: collections.OrderedDict[int, int] = collections.OrderedDict()
        """Bytes by hash, in order of use."""
        self._held_bytes = 0
        self.trust = 1.0
        """How much of what is expected the worker really has: it caches less, or nothing, or others use it too."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def matched_bytes(self, blocks: Blocks) -> int:
        """How much of a prompt's start is here."""
        count = self._matched(blocks)
        return BLOCK_ENDS[count - 1] if count else 0

    def use(self, blocks: Blocks) -> None:
        """The prompt is sent to the worker, which computes and keeps what it did not have."""
        known = self._blocks
        for number in range(len(blocks) - 1, -1, -1):
            block = blocks[number]
            if block in known:
                known.move_to_end(block)
            else:
                known[block] = BLOCK_BYTES[number]
                self._held_bytes += BLOCK_BYTES[number]
        while self._held_bytes > self._capacity_bytes or len(known) > MOST_BLOCKS:
            self._held_bytes -= known.popitem(last=False)[1]

    def learn(self, expected_share: float, actual_share: float) -> None:
        """The worker has said how much of a prompt it had, where `expected_share` of it was in the index."""
        self.trust += LEARNING * (min(1.0, actual_share / expected_share) - self.trust)

    def _matched(self, blocks: Blocks) -> int:
        known = self._blocks
        if not blocks or blocks[0] not in known:
            return 0
        if blocks[-1] in known:
            return len(blocks)
        return bisect.bisect_left(range(len(blocks)), True, key=lambda number: blocks[number] not in known)
