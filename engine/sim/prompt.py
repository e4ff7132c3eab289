"""A prompt for an engine without a tokenizer: every four bytes make a token.

Texts count by their UTF-8 bytes, each filled up to whole tokens; a chat's messages begin with a token for their role,
and a last such token asks for the answer. The engine's own words have four bytes too (`engine.sim.text`), so that the
next turn of a chat begins with the very tokens of the prompt and the answer before it.
"""

from __future__ import annotations

from array import array
from typing import Any

from engine.prompt import message_text, read_messages, read_template_kwargs
from protos.core.contract import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from protos.core.errors import InvalidRequest

TOKEN_BYTES = 4


def read_tokens(prompt: Prompt) -> bytes:
    """The tokens of a prompt, four bytes each, at least one. Raises InvalidRequest where there is nothing to read."""
    match prompt:
        case ChatPrompt():
            read_template_kwargs(prompt)  # it has no template, and takes what one may be given
            tokens = b"".join(map(_message, read_messages(prompt))) + _role("assistant")
        case TokenPrompt(token_ids):
            tokens = pack_ids(token_ids)
        case TextPrompt(text):
            tokens = _fill(text)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def pack_ids(token_ids: tuple[int, ...]) -> bytes:
    return array("I", token_ids).tobytes()


def hash_blocks(tokens: bytes, block_tokens: int, adapter: str = "") -> list[int]:
    """A number of 0 and more for each full block, which stands for its tokens, all before them, and the adapter."""
    size = block_tokens * TOKEN_BYTES
    hashes: list[int] = []
    before = hash(adapter)
    for start in range(0, len(tokens) - size + 1, size):
        before = hash((before, tokens[start : start + size])) & 0x7FFF_FFFF_FFFF_FFFF
        hashes.append(before)
    return hashes


def _message(message: dict[str, Any]) -> bytes:
    text = message_text(message)
    # An answer begins without the space of its first word.
    return _role(message["role"]) + (_fill(f" {text}") if text else b"")


def _role(role: str) -> bytes:
    return role.encode(errors="surrogatepass")[:TOKEN_BYTES].ljust(TOKEN_BYTES, b"\0")


def _fill(text: str) -> bytes:
    data = text.encode(errors="surrogatepass")
    return data.ljust(-(-len(data) // TOKEN_BYTES) * TOKEN_BYTES, b"\0")
