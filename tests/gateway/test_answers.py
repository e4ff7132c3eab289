"""What clients read, parsed with the types of OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.answers import (
    ChatAnswer,
    Choice,
    CompletionAnswer,
    GenerateAnswer,
    Usage,
    error_event,
    render_error,
)
from protos.core.contract import TokenLogprob
from protos.core.errors import InvalidRequest

USAGE = Usage(5, 3, 2)
LOGPROBS = (TokenLogprob("he", -0.25, b"he", (TokenLogprob("ho", -1.5, b"ho"),)),)


def events(stream: bytes) -> list[Any]:
    *parts, rest = stream.split(b"\n\n")
    assert rest == b""
    assert parts[-1] == b"data: [DONE]"
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part[len(b"data: ") :]) for part in parts[:-1]]


def chat_stream(answer: ChatAnswer, *texts: str, usage: Usage | None = None) -> list[ChatCompletionChunk]:
    body = answer.head(1) + b"".join(answer.chunk(0, text, None) for text in texts) + answer.tail(["stop"], usage, None)
    return [ChatCompletionChunk.model_validate(event, strict=True) for event in events(body)]


def test_chat_stream_is_exactly_openais() -> None:
    answer = ChatAnswer("r1", "tide-1", 1700, wants_usage=True)
    stream = answer.head(1) + answer.chunk(0, 'a"\n', None) + answer.tail(["stop"], USAGE, None)
    start = b'data: {"id":"chatcmpl-r1","created":1700,"model":"tide-1","object":"chat.completion.chunk","choices":'
    choice = b'[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
    usage = (
        b'[],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,'
        b'"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
    )
    assert stream == b"".join(
        (
            start + choice % (b'{"role":"assistant","content":""}', b"null"),
            start + choice % (b'{"content":"a\\"\\n"}', b"null"),
            start + choice % (b"{}", b'"stop"'),
            start + usage,
            b"data: [DONE]\n\n",
        )
    )


def test_chat_stream_has_role_text_reason_and_usage_in_order() -> None:
    role, first, second, reason, usage = chat_stream(
        ChatAnswer("r1", "m", 1, wants_usage=True), "Hel", "lo", usage=USAGE
    )
    assert (role.choices[0].delta.role, role.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in (first, second)] == ["Hel", "lo"]
    assert (reason.choices[0].finish_reason, reason.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens, usage.usage.total_tokens) == (5, 3, 8)
    assert {chunk.id for chunk in (role, first, reason, usage)} == {"chatcmpl-r1"}


def test_stream_without_usage_has_no_usage_chunk() -> None:
    chunks = chat_stream(ChatAnswer("r1", "m", 1), "x")
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_each_choice_has_its_role_and_its_reason() -> None:
    answer = ChatAnswer("r", "m", 1)
    stream = (
        answer.head(2)
        + answer.chunk(1, "b", None)
        + answer.chunk(0, "a", None)
        + answer.tail(["stop", "length"], None, None)
    )
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events(stream)]
    assert [chunk.choices[0].index for chunk in chunks] == [0, 1, 1, 0, 0, 1]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == ["stop", "length"]


def test_chat_logprobs_are_openais() -> None:
    answer = ChatAnswer("r", "m", 1)
    event = events(answer.chunk(0, "he", LOGPROBS) + answer.tail([], None, None))[0]
    logprobs = ChatCompletionChunk.model_validate(event, strict=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    (token,) = logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("he", -0.25, [104, 101])
    assert [other.token for other in token.top_logprobs] == ["ho"]


def test_completion_stream_and_its_offsets() -> None:
    answer = CompletionAnswer("r", "m", 1, wants_usage=True)
    stream = (
        answer.head(1)
        + answer.chunk(0, "he", LOGPROBS)
        + answer.chunk(0, "he", LOGPROBS)
        + answer.tail(["length"], USAGE, None)
    )
    first, second, reason, usage = [Completion.construct(**event) for event in events(stream)]
    assert first.id == "cmpl-r"
    assert first.choices[0].logprobs is not None
    assert second.choices[0].logprobs is not None
    assert (first.choices[0].logprobs.text_offset, second.choices[0].logprobs.text_offset) == ([0], [2])
    assert first.choices[0].logprobs.top_logprobs == [{"he": -0.25, "ho": -1.5}]
    assert reason.choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.total_tokens == 8


def test_whole_chat_answer() -> None:
    choices = [Choice(["Hel", "lo"], list(LOGPROBS), "stop"), Choice(["Bye"], [], "length")]
    answer = ChatCompletion.model_validate_json(ChatAnswer("r", "m", 1).whole(choices, USAGE, None), strict=True)
    assert [choice.message.content for choice in answer.choices] == ["Hello", "Bye"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[1].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_whole_completion_answer() -> None:
    whole = CompletionAnswer("r", "m", 1).whole([Choice(["Hi"], list(LOGPROBS), "stop")], USAGE, None)
    answer = Completion.model_validate_json(whole)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "Hi"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["he"]


def test_completion_logprobs_without_alternatives_have_the_sampled_token() -> None:
    alone = [TokenLogprob("he", -0.25, b"he", ())]
    whole = CompletionAnswer("r", "m", 1).whole([Choice(["he"], alone, "stop")], USAGE, None)
    logprobs = Completion.model_validate_json(whole, strict=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs == [{"he": -0.25}]


def test_generate_answers_text_and_usage() -> None:
    body = json.loads(GenerateAnswer("r", "m", 1).whole([Choice(["Hi"], [], "stop")], USAGE, None))
    assert body == {"text": "Hi", "usage": USAGE.to_openai()}


def test_timing_is_in_the_usage_chunk_or_in_one_of_its_own() -> None:
    timing = {"total_ns": 5}
    with_usage = events(ChatAnswer("r", "m", 1).tail(["stop"], USAGE, timing))
    assert with_usage[-1]["tidegate"] == timing
    assert with_usage[-1]["usage"]["total_tokens"] == 8
    alone = events(ChatAnswer("r", "m", 1).tail(["stop"], None, timing))
    assert alone[-1]["tidegate"] == timing
    assert alone[-1]["choices"] == []
    ChatCompletionChunk.model_validate(alone[-1])
    assert json.loads(ChatAnswer("r", "m", 1).whole([Choice(["x"], [], "stop")], USAGE, timing))["tidegate"] == timing


def test_error_body_and_event_are_openais() -> None:
    error = InvalidRequest("n: must be positive", param="n")
    body = json.loads(render_error(error))
    assert body == {
        "error": {
            "message": "n: must be positive",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    }
    assert error_event(error) == b"data: " + render_error(error) + b"\n\n"


@given(st.text(max_size=50))
def test_any_text_survives_its_event(text: str) -> None:
    chunks = chat_stream(ChatAnswer("r", "m", 1), text)
    assert chunks[1].choices[0].delta.content == text
