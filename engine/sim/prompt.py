"""How long a prompt is for an engine without a tokenizer: four UTF-8 bytes make a token."""

from __future__ import annotations

from typing import Any

import msgspec

from protos.core.contract import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from protos.core.errors import InvalidRequest

BYTES_PER_TOKEN = 4


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


_messages_decoder = msgspec.json.Decoder(list[_Message])


def count_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt, at least one. Raises InvalidRequest where there is nothing to read."""
    match prompt:
        case TokenPrompt(token_ids):
            tokens = len(token_ids)
        case TextPrompt(text):
            tokens = _tokens_of(len(text.encode(errors="surrogatepass")))
        case ChatPrompt(messages_json):
            return max(1, _tokens_of(sum(_content_bytes(message) for message in _read_messages(messages_json))))
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def _tokens_of(count_bytes: int) -> int:
    return -(-count_bytes // BYTES_PER_TOKEN)


def _read_messages(messages_json: bytes) -> list[_Message]:
    try:
        messages = _messages_decoder.decode(messages_json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"messages: {error}", param="messages") from None
    if not messages:
        raise InvalidRequest("messages is empty", param="messages")
    return messages


def _content_bytes(message: _Message) -> int:
    if isinstance(message.content, list):
        texts = [part.get("text") for part in message.content]
        return sum(len(text.encode()) for text in texts if isinstance(text, str))
    return len((message.content or "").encode())
