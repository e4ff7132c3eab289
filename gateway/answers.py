"""What clients read: OpenAI's JSON and server-sent events, byte for byte as its clients expect them.

An Answer belongs to one request and one endpoint. Everything that is the same for all its chunks is rendered once, so
that a token costs one JSON string and one join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from protos.core.contract import TokenLogprob
from protos.core.errors import RequestError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def to_openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice(msgspec.Struct):
    """One choice of an answer that is not streamed, as it grows."""

    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    finish_reason: str = ""

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer(Protocol):
    """How one endpoint renders. `timing` is the value of "tidegate", when the client asked for it."""

    def head(self, choices: int) -> bytes:
        """What a stream starts with."""

    def chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """One event of a stream."""

    def text_frame(self, choice: int) -> tuple[bytes, bytes]:
        """What is before and after the text, as JSON, in a chunk without logprobs."""

    def tail(self, reasons: Sequence[str], usage: Usage | None, timing: dict[str, Any] | None) -> bytes:
        """What a stream ends with; usage when the client asked for it."""

    def whole(self, choices: Sequence[Choice], usage: Usage, timing: dict[str, Any] | None) -> bytes:
        """A body that is not streamed."""


class ChatAnswer:
    """/v1/chat/completions."""

    def __init__(self, request_id: str, model: str, created_s: int, *, wants_usage: bool = False) -> None:
        self._facts = {"id": f"chatcmpl-{request_id}", "created": created_s, "model": model}
        self._frame = _Frame({**self._facts, "object": "chat.completion.chunk"}, wants_usage)

    def head(self, choices: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._frame.event(index, b'"delta":' + _encode(delta)) for index in range(choices))

    def chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        return self._frame.event(
            choice,
            b'"delta":{"content":' + _encode(text) + b"}",
            _encode(_chat_logprobs(logprobs)) if logprobs else b"",
        )

    def text_frame(self, choice: int) -> tuple[bytes, bytes]:
        return self._frame.around(choice, b'"delta":{"content":', b"}")

    def tail(self, reasons: Sequence[str], usage: Usage | None, timing: dict[str, Any] | None) -> bytes:
        return self._frame.tail(b'"delta":{}', reasons, usage, timing)

    def whole(self, choices: Sequence[Choice], usage: Usage, timing: dict[str, Any] | None) -> bytes:
        rendered = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _chat_logprobs(choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return _whole({**self._facts, "object": "chat.completion"}, rendered, usage, timing)


class CompletionAnswer:
    """/v1/completions."""

    def __init__(self, request_id: str, model: str, created_s: int, *, wants_usage: bool = False) -> None:
        self._facts = {"id": f"cmpl-{request_id}", "created": created_s, "model": model, "object": "text_completion"}
        self._frame = _Frame(self._facts, wants_usage)
        self._offsets: dict[int, int] = {}

    def head(self, choices: int) -> bytes:
        return b""

    def chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        rendered = b""
        if logprobs:
            offset = self._offsets.get(choice, 0)
            rendered = _encode(_completion_logprobs(logprobs, offset))
            self._offsets[choice] = offset + sum(len(token.token) for token in logprobs)
        return self._frame.event(choice, b'"text":' + _encode(text), rendered)

    def text_frame(self, choice: int) -> tuple[bytes, bytes]:
        return self._frame.around(choice, b'"text":', b"")

    def tail(self, reasons: Sequence[str], usage: Usage | None, timing: dict[str, Any] | None) -> bytes:
        return self._frame.tail(b'"text":""', reasons, usage, timing)

    def whole(self, choices: Sequence[Choice], usage: Usage, timing: dict[str, Any] | None) -> bytes:
        rendered = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _completion_logprobs(choice.logprobs, 0) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return _whole(self._facts, rendered, usage, timing)


class GenerateAnswer:
    """/generate: never streamed."""

    def __init__(self, request_id: str, model: str, created_s: int, *, wants_usage: bool = False) -> None:
        pass

    def head(self, choices: int) -> bytes:
        raise AssertionError("/generate does not stream")

    def chunk(self, choice: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        raise AssertionError("/generate does not stream")

    def text_frame(self, choice: int) -> tuple[bytes, bytes]:
        raise AssertionError("/generate does not stream")

    def tail(self, reasons: Sequence[str], usage: Usage | None, timing: dict[str, Any] | None) -> bytes:
        raise AssertionError("/generate does not stream")

    def whole(self, choices: Sequence[Choice], usage: Usage, timing: dict[str, Any] | None) -> bytes:
        body: dict[str, Any] = {"text": choices[0].text, "usage": usage.to_openai()}
        return _encode(body if timing is None else {**body, "tidegate": timing})


class _Frame:
    """The parts of a chunk that do not change within a stream."""

    def __init__(self, facts: dict[str, Any], wants_usage: bool) -> None:
        self._open = b"data: " + _encode(facts)[:-1]
        self._starts: dict[int, bytes] = {}
        self._usage = b',"usage":null' if wants_usage else b""
        self._end = b',"logprobs":null,"finish_reason":null}]' + self._usage + b"}\n\n"

    def around(self, choice: int, before: bytes, after: bytes) -> tuple[bytes, bytes]:
        """An event without logprobs, cut at what changes from token to token."""
        return self._start(choice) + before, after + self._end

    def _start(self, choice: int) -> bytes:
        start = self._starts.get(choice)
        if start is None:
            start = self._starts[choice] = self._open + b',"choices":[{"index":%d,' % choice
        return start

    def event(self, choice: int, content: bytes, logprobs: bytes = b"", reason: bytes = b"null") -> bytes:
        start = self._start(choice)
        if not logprobs and reason == b"null":
            return start + content + self._end
        finish = b',"logprobs":' + (logprobs or b"null") + b',"finish_reason":' + reason + b"}]"
        return start + content + finish + self._usage + b"}\n\n"

    def tail(self, content: bytes, reasons: Sequence[str], usage: Usage | None, timing: dict[str, Any] | None) -> bytes:
        events = [self.event(choice, content, reason=_encode(reason)) for choice, reason in enumerate(reasons)]
        if usage is not None or timing is not None:
            extra: dict[str, Any] = {"choices": []}
            if usage is not None:
                extra["usage"] = usage.to_openai()
            if timing is not None:
                extra["tidegate"] = timing
            events.append(self._open + b"," + _encode(extra)[1:] + b"\n\n")
        events.append(DONE)
        return b"".join(events)


def _whole(facts: dict[str, Any], choices: list[dict[str, Any]], usage: Usage, timing: dict[str, Any] | None) -> bytes:
    body = {**facts, "choices": choices, "usage": usage.to_openai()}
    if timing is not None:
        body["tidegate"] = timing
    return _encode(body)


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token_bytes)}


def _completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            # The sampled token is always there: OpenAI promises it, and clients look whether it was the best one.
            {token.token: token.logprob} | {other.token: other.logprob for other in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def render_error(error: RequestError) -> bytes:
    """OpenAI's error body."""
    return _encode({"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}})


def error_event(error: RequestError) -> bytes:
    """An error inside a started stream: OpenAI's clients raise on it."""
    return b"data: " + render_error(error) + b"\n\n"
