"""Made-up prompt text: as many tokens as asked for, and the same text for the same block name.

Every word has three letters and is one token with its leading space in the byte-pair vocabularies in use, so a block of
n tokens is n words and 4 n bytes. A block starts with words that spell its name, so two blocks of different names
differ at once, and an engine's prefix cache sees the sharing that the source had, and no other.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence

_WORD_LIST = (
    "the and for are but not you all any can had her was one our out "
    "day get has him his how man new now old see two way who boy did "
    "its let put say she too use dad mom car dog cat sun sky sea red "
    "big end far few got hot job key law lot low may men off own pay"
)
WORDS = _WORD_LIST.split()
WORD_BYTES = 4
NAME_WORDS = 10
POOL_WORDS = 1 << 15


def prompt_text(blocks: Sequence[str], block_tokens: int, prompt_tokens: int) -> str:
    """Text of `prompt_tokens` tokens, at least one. The last block holds what the others leave."""
    parts = []
    left = max(1, prompt_tokens)
    for name in blocks[:-1]:
        parts.append(block_text(name, min(block_tokens, left)))
        left -= min(block_tokens, left)
    parts.append(block_text(blocks[-1], left))
    return "".join(parts)


def block_text(name: str, tokens: int) -> str:
    """The first `tokens` words of the block's endless text."""
    if tokens <= 0:
        return ""
    digest = hashlib.blake2b(name.encode(), digest_size=NAME_WORDS + 4).digest()
    spelled = "".join(" " + WORDS[byte & 63] for byte in digest[: min(tokens, NAME_WORDS)])
    return spelled + _from_pool(int.from_bytes(digest[NAME_WORDS:]) % POOL_WORDS, tokens - NAME_WORDS)


def _from_pool(start: int, words: int) -> str:
    if words <= 0:
        return ""
    pool = _pool()
    text = pool[start * WORD_BYTES : (start + words) * WORD_BYTES]
    while len(text) < words * WORD_BYTES:
        text += pool[: words * WORD_BYTES - len(text)]
    return text


@functools.cache
def _pool() -> str:
    return "".join(" " + word for word in random.Random(20240607).choices(WORDS, k=POOL_WORDS))
