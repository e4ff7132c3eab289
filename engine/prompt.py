"""The client's own JSON of a chat prompt, read as far as any backend needs it."""

from __future__ import annotations

from typing import Any

import msgspec

from protos.core.contract import ChatPrompt
from protos.core.errors import InvalidRequest

WORKERS_OWN = frozenset(
    (
        "chat_template",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    )
)
"""Arguments of transformers' `apply_chat_template` that are no variables of a template.

A client's own template is a program: its loops would hold a thread of the worker for ever, its strings take all of the
memory. (vLLM's own server takes none without --trust-request-chat-template, but checks it in front of its renderer.)
"""


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


_shape = msgspec.json.Decoder(list[_Message])
_messages = msgspec.json.Decoder(list[dict[str, Any]])
_kwargs = msgspec.json.Decoder(dict[str, Any])


def read_messages(prompt: ChatPrompt) -> list[dict[str, Any]]:
    """The messages with all their fields; each has a role, and a content of text, parts or nothing.

    Raises InvalidRequest.
    """
    try:
        shapes = _shape.decode(prompt.messages_json)
        messages = _messages.decode(prompt.messages_json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"messages: {error}", param="messages") from None
    if not shapes:
        raise InvalidRequest("messages is empty", param="messages")
    return messages


def read_template_kwargs(prompt: ChatPrompt) -> dict[str, Any]:
    """Variables for the chat template. Raises InvalidRequest."""
    if not prompt.template_kwargs_json:
        return {}
    try:
        kwargs = _kwargs.decode(prompt.template_kwargs_json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
    if taken := WORKERS_OWN & kwargs.keys():
        message = f"chat_template_kwargs: {min(taken)} is the worker's own, not a variable of the template"
        raise InvalidRequest(message, param="chat_template_kwargs")
    return kwargs


def message_text(message: dict[str, Any]) -> str:
    """All text of a message's content."""
    content = message.get("content")
    texts = [part.get("text") for part in content] if isinstance(content, list) else [content]
    return "".join(text for text in texts if isinstance(text, str))
