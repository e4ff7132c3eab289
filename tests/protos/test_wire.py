"""What goes through the wire comes out as it went in."""

from __future__ import annotations

from typing import Any

import msgspec
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.core import wire
from protos.core.contract import (
    Accepted,
    ChatPrompt,
    Deltas,
    EngineFrame,
    Failed,
    FailureKind,
    Finished,
    GatewayFrame,
    Gpu,
    Hello,
    Host,
    Load,
    ModelInfo,
    Sampling,
    Stamps,
    Started,
    Submit,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Welcome,
)

u32 = st.integers(0, 2**32 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=12)
floats = st.floats(-1e6, 1e6, width=32)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def tuples_of(strategy: st.SearchStrategy[Any], size: int = 4) -> st.SearchStrategy[Any]:
    return st.lists(strategy, max_size=size).map(tuple)


def lists_of(strategy: st.SearchStrategy[Any], size: int = 4) -> st.SearchStrategy[Any]:
    return st.lists(strategy, max_size=size)


samplings = st.builds(
    Sampling,
    max_tokens=optional(u32),
    temperature=optional(floats),
    top_p=optional(floats),
    top_k=optional(i32),
    min_p=optional(floats),
    presence_penalty=optional(floats),
    frequency_penalty=optional(floats),
    repetition_penalty=optional(floats),
    stop=tuples_of(text),
    stop_token_ids=tuples_of(u32),
    seed=optional(i64),
    min_tokens=optional(u32),
    ignore_eos=st.booleans(),
    n=st.integers(1, 128),
    logprobs=optional(u32),
    logit_bias=st.dictionaries(u32, floats, max_size=3),
    include_stop_in_output=st.booleans(),
    skip_special_tokens=optional(st.booleans()),
)
prompts = (
    st.builds(TextPrompt, text)
    | st.builds(TokenPrompt, tuples_of(u32, 50))
    | st.builds(ChatPrompt, st.binary(max_size=30), st.binary(max_size=30))
)
submits = st.builds(
    Submit,
    slot=u32,
    request_id=text,
    prompt=prompts,
    sampling=samplings,
    model=text,
    priority=i32,
    step_tokens=u32,
    traceparent=text,
    resumed_token_ids=tuples_of(u32, 50),
)
gateway_frames = st.builds(
    GatewayFrame,
    hello=optional(st.builds(Hello, u32, text, text)),
    submits=lists_of(submits),
    cancels=lists_of(u32),
    ping_sent_ns=i64,
    drain=st.booleans(),
)

stamps = st.builds(Stamps, i64, i64, i64, i64, i64)
leaf_logprobs = st.builds(TokenLogprob, text, floats, st.binary(max_size=4))
logprobs = st.builds(TokenLogprob, text, floats, st.binary(max_size=4), tuples_of(leaf_logprobs))
gpus = st.builds(Gpu, u32, floats, u64, u64)
hosts = st.builds(Host, floats, u64, u64, tuples_of(gpus))
loads = st.builds(
    Load,
    running=u32,
    waiting=u32,
    kv_blocks_used=u32,
    kv_blocks_total=u32,
    preemptions=u64,
    step_ns=i64,
    queued_prefill_tokens=u64,
    prefix_queries=u64,
    prefix_hits=u64,
    host=optional(hosts),
)
models = st.builds(
    ModelInfo,
    names=tuples_of(text),
    backend=text,
    backend_version=text,
    simulated=st.booleans(),
    context_tokens=u32,
    max_sequences=u32,
    max_batch_tokens=u32,
    kv_blocks=u32,
    kv_block_tokens=u32,
    has_chat_template=st.booleans(),
    device=text,
    dtype=text,
    quantization=text,
    tensor_parallel=u32,
    profile=text,
    adapters=tuples_of(text),
    makes_way=st.booleans(),
)
deltas = st.builds(
    Deltas,
    slots=lists_of(u32),
    texts=lists_of(text),
    token_counts=lists_of(u32),
    token_ids=lists_of(u32),
    choices=lists_of(u32),
    logprobs=st.dictionaries(u32, tuples_of(logprobs), max_size=2),
)
engine_frames = st.builds(
    EngineFrame,
    welcome=optional(st.builds(Welcome, protocol=u32, worker=text, boot_id=text, version=text, model=models)),
    step=u64,
    accepted=lists_of(st.builds(Accepted, u32, i64)),
    started=lists_of(st.builds(Started, u32, u32, u32, stamps)),
    deltas=optional(deltas),
    finished=lists_of(
        st.builds(
            Finished,
            slot=u32,
            reasons=tuples_of(text),
            prompt_tokens=u32,
            cached_tokens=u32,
            output_tokens=u32,
            preemptions=u32,
            stamps=stamps,
        )
    ),
    failed=lists_of(
        st.builds(Failed, slot=u32, kind=st.sampled_from(FailureKind), message=text, param=text, stamps=stamps)
    ),
    load=optional(loads),
    pong=optional(st.tuples(i64, i64)),
    draining=st.booleans(),
    sent_ns=i64,
)


@given(gateway_frames)
def test_gateway_frame_comes_back(frame: GatewayFrame) -> None:
    assert wire.decode_gateway_frame(wire.encode_gateway_frame(frame)) == frame


@given(engine_frames)
def test_engine_frame_comes_back(frame: EngineFrame) -> None:
    assert wire.decode_engine_frame(wire.encode_engine_frame(frame)) == frame


@given(models)
def test_model_info_comes_back(model: ModelInfo) -> None:
    assert wire.decode_model_info(wire.encode_model_info(model)) == model


def test_unset_sampling_is_not_zero() -> None:
    """An engine's default and a client's zero are two things."""
    for name in ("max_tokens", "temperature", "top_k", "seed", "logprobs", "min_tokens"):
        for value in (None, 0):
            sampling = Sampling(**{name: value})
            submit = Submit(slot=1, request_id="r", prompt=TextPrompt(""), sampling=sampling, model="m")
            (found,) = wire.decode_gateway_frame(wire.encode_gateway_frame(GatewayFrame(submits=[submit]))).submits
            assert getattr(found.sampling, name) == value


def test_kind_of_failure_from_a_newer_worker_is_internal() -> None:
    failed = Failed(slot=7, kind=FailureKind.INVALID, message="m")
    data = wire.encode_engine_frame(EngineFrame(failed=[failed]))
    known, unknown = bytes([0x10, FailureKind.INVALID]), bytes([0x10, 99])
    assert data.count(known) == 1
    (found,) = wire.decode_engine_frame(data.replace(known, unknown)).failed
    assert found == msgspec.structs.replace(failed, kind=FailureKind.INTERNAL)


@given(st.binary(max_size=80))
def test_bytes_that_are_no_frame_raise_one_error(data: bytes) -> None:
    for decode in (wire.decode_gateway_frame, wire.decode_engine_frame, wire.decode_model_info):
        try:
            decode(data)
        except DecodeError:
            pass


def test_request_without_fields_decodes_to_something() -> None:
    """grpcio takes None from a deserializer for a failure."""
    assert wire.decode_empty(wire.encode_empty(None)) is not None


def test_float_keeps_what_the_client_sent() -> None:
    sampling = Sampling(temperature=0.7)
    submit = Submit(slot=1, request_id="r", prompt=TextPrompt(""), sampling=sampling, model="m")
    (found,) = wire.decode_gateway_frame(wire.encode_gateway_frame(GatewayFrame(submits=[submit]))).submits
    assert found.sampling.temperature == 0.7
