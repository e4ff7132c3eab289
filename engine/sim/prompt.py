"""How long a prompt is for an engine without a tokenizer: four UTF-8 bytes make a token."""

from __future__ import annotations

from engine.prompt import read_messages, text_bytes
from protos.core.contract import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from protos.core.errors import InvalidRequest

BYTES_PER_TOKEN = 4


def count_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt, at least one. Raises InvalidRequest where there is nothing to read."""
    match prompt:
        case ChatPrompt():
            return max(1, _tokens_of(sum(map(text_bytes, read_messages(prompt)))))
        case TokenPrompt(token_ids):
            tokens = len(token_ids)
        case TextPrompt(text):
            tokens = _tokens_of(len(text.encode(errors="surrogatepass")))
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def _tokens_of(count_bytes: int) -> int:
    return -(-count_bytes // BYTES_PER_TOKEN)
