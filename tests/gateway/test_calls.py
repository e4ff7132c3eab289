from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.calls import Call, parse_chat, parse_completion, parse_generate
from protos.core.contract import ChatPrompt, TextPrompt, TokenPrompt
from protos.core.errors import InvalidRequest

PARSERS = {"chat": parse_chat, "completion": parse_completion, "generate": parse_generate}
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hi", **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"model": 5}, "model"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"model": "m" * 1025}, "model"),
        ({"priority": "b" * 65}, "priority"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"echo": True}, "echo"),
    ],
)
def test_bad_chat_field_is_named(fields: dict[str, Any], param: str) -> None:
    refusal = parse_chat(chat(**fields))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.http_status == 400
    assert refusal.param is not None
    assert refusal.param.startswith(param)
    assert refusal.message.startswith(param)
    assert "\n" not in refusal.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "b"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [True, False]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "[ab]"}, "guided_regex"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
def test_bad_completion_field_is_named(fields: dict[str, Any], param: str) -> None:
    refusal = parse_completion(completion(**fields))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param is not None
    assert refusal.param.startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": ""}', "prompt"),
        (b"{}", "prompt"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
        (b'{"prompt": "a", "temperature": 9}', "temperature"),
        (b'{"prompt": "a", "stream": true}', "stream"),
        (b'{"prompt": "a", "n": 2}', "n"),
        (b'{"prompt": "a", "stop": ""}', "stop"),
        (b'{"prompt": "a", "logprobs": 1}', "logprobs"),
        (b'{"prompt": "a", "structured_outputs": {"json": {}}}', "structured_outputs"),
    ],
)
def test_bad_generate_field_is_named(body: bytes, param: str) -> None:
    refusal = parse_generate(body)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == param


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"messages": [}',
        b'{"prompt": "a", "temperature": NaN, "messages": []}',
        b'{"prompt": "a", "temperature": Infinity, "messages": []}',
        b'{"prompt": "\xff\xfe", "messages": [{"role": "user", "content": "\xff"}]}',
        b"\xff\xfe\x00",
        b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]} trailing',
        b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "deep": '
        + b"[" * 100_000
        + b"]" * 100_000
        + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json_is_refused(parse: Any, body: bytes) -> None:
    refusal = parse(body)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.http_status == 400
    assert "\n" not in refusal.message


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"text"'])
def test_body_that_is_no_object_is_refused(parse: Any, body: bytes) -> None:
    refusal = parse(body)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.message.startswith("the body: ")


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
@pytest.mark.parametrize(
    "extra",
    [
        b'"unknown": "\xff\xfe"',
        b'"\xff": 1',
        b'"messages": [{"role": "user", "content": "hi", "name": "\xff"}]',
        b'"messages": [{"role": "user", "content": "hi", "\xff": 1}]',
        b'"chat_template_kwargs": {"a": "\xff"}',
        b'"metadata": {"a": ["\xc3\x28"]}',
    ],
    ids=repr,
)
def test_non_utf8_is_refused_wherever_it_hides(parse: Any, extra: bytes) -> None:
    """Workers and captures read the same bytes later: they must never meet what is not JSON."""
    refusal = parse(b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], ' + extra + b"}")
    assert isinstance(refusal, InvalidRequest)
    assert refusal.code == "invalid_json"


def test_chat_carries_the_clients_own_bytes() -> None:
    messages = b'[ {"role":"user", "content":"h\\u00e9", "name":"x"} ]'
    call = parse_chat(b'{"messages": ' + messages + b', "chat_template_kwargs": {"a": 1}}')
    assert isinstance(call, Call)
    assert call.prompt == ChatPrompt(messages, b'{"a": 1}')
    assert call.prompt_bytes == messages


def test_chat_reads_every_sampling_parameter() -> None:
    call = parse_chat(
        chat(
            model="m",
            max_tokens=5,
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            top_k=-1,
            min_p=0.1,
            n=2,
            stop=["a", "b"],
            seed=-(2**63),
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            logit_bias={"50256": -100},
            logprobs=True,
            top_logprobs=3,
            min_tokens=2,
            ignore_eos=True,
            stop_token_ids=[1, 2],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert isinstance(call, Call)
    sampling = call.sampling
    assert (call.model, call.is_stream, call.wants_usage) == ("m", True, True)
    assert (sampling.max_tokens, sampling.n, sampling.seed, sampling.logprobs) == (7, 2, -(2**63), 3)
    assert (sampling.stop, sampling.stop_token_ids, sampling.logit_bias) == (("a", "b"), (1, 2), {50256: -100.0})
    assert (sampling.ignore_eos, sampling.include_stop_in_output, sampling.skip_special_tokens) == (True, True, False)
    assert (sampling.min_tokens, sampling.top_k, sampling.min_p) == (2, -1, 0.1)


def test_null_means_default() -> None:
    names = [field.name for field in msgspec.structs.fields(type_of_chat()) if field.name != "messages"]
    assert parse_chat(chat(**dict.fromkeys(names))) == parse_chat(chat())


def type_of_chat() -> Any:
    from gateway.calls import ChatBody

    return ChatBody


def test_unknown_fields_are_tolerated() -> None:
    assert isinstance(parse_chat(chat(store=True, metadata={"a": "b"}, service_tier="auto")), Call)


@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
def test_fields_that_are_not_supported_may_say_nothing(parse: Any) -> None:
    said = {"messages": MESSAGES, "prompt": "hi", "structured_outputs": None, "guided_choice": [], "bad_words": []}
    said |= {
        "echo": False,
        "response_format": {"type": "text"},
        "truncate_prompt_tokens": None,
        "use_beam_search": False,
    }
    assert isinstance(parse(json.dumps(said).encode()), Call)


def test_generate_takes_what_completions_take() -> None:
    call = parse_generate(b'{"prompt": "a", "stop": ["x"], "seed": 7, "n": 1, "stream": false, "priority": "batch"}')
    assert isinstance(call, Call)
    assert (call.sampling.stop, call.sampling.seed, call.priority) == (("x",), 7, "batch")
    assert not call.is_stream


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", TextPrompt("hi")),
        (["hi"], TextPrompt("hi")),
        ([1, 2], TokenPrompt((1, 2))),
        ([[1, 2]], TokenPrompt((1, 2))),
        ([0], TokenPrompt((0,))),
    ],
)
def test_completion_prompt_is_text_or_token_ids(prompt: Any, expected: Any) -> None:
    call = parse_completion(completion(prompt=prompt))
    assert isinstance(call, Call)
    assert call.prompt == expected
    assert call.sampling.max_tokens == 16


def test_one_logprob_without_alternatives() -> None:
    call = parse_chat(chat(logprobs=True))
    assert isinstance(call, Call)
    assert call.sampling.logprobs == 0


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "a"]) | st.text(max_size=4), inner, max_size=3
        )
    ),
    max_leaves=8,
)
field_names = st.sampled_from(
    [field.name for field in msgspec.structs.fields(type_of_chat())] + ["prompt", "echo", "best_of", "suffix", "x"]
)


@given(st.dictionaries(field_names, json_values, max_size=6))
@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
def test_no_json_makes_a_parser_raise(parse: Any, fields: dict[str, Any]) -> None:
    body = json.dumps({"messages": MESSAGES, "prompt": "hi", **fields}, ensure_ascii=True).encode()
    result = parse(body)
    assert isinstance(result, Call | InvalidRequest)
    if isinstance(result, Call):
        json.loads(body.decode("utf-8"))
        result.prompt_bytes.decode("utf-8")
        assert result.prompt_tokens is None or result.prompt_tokens >= 1


@given(st.binary(max_size=60), st.integers(0, 60))
@pytest.mark.parametrize("parse", PARSERS.values(), ids=PARSERS)
def test_no_bytes_make_a_parser_raise(parse: Any, noise: bytes, at: int) -> None:
    good = b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "n": 1}'
    assert isinstance(parse(noise), Call | InvalidRequest)
    spliced = parse(good[:at] + noise + good[at + len(noise) :])
    assert isinstance(spliced, Call | InvalidRequest)
    if isinstance(spliced, Call):
        json.loads((good[:at] + noise + good[at + len(noise) :]).decode("utf-8"))
