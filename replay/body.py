"""The JSON body of a request: the recorded one, or one made of recorded shapes."""

from __future__ import annotations

from typing import Any

import msgspec

from protos.core.contract import Sampling
from replay.text import prompt_text
from replay.workload import FullBody, SyntheticBody, WorkloadRequest

CHAT = "/v1/chat/completions"
GENERATE = "/generate"

_encoder = msgspec.json.Encoder()
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')


def encode_body(request: WorkloadRequest, model: str, *, is_length_pinned: bool = True, salt: str = "") -> bytes:
    """`is_length_pinned` makes the answer as long as the recorded one, whatever the model would say.

    Made-up text of one salt shares what its blocks share, and nothing with that of another one.
    """
    match request.body:
        case FullBody(json):
            return _edited(request, json, model, is_length_pinned)
        case SyntheticBody() as body:
            return _encoder.encode(_synthetic(request, body, model, is_length_pinned, salt))


def _edited(request: WorkloadRequest, json: msgspec.Raw, model: str, is_length_pinned: bool) -> bytes:
    fields = _fields_decoder.decode(json)
    if request.endpoint == GENERATE:
        if is_length_pinned and request.output_tokens:
            fields["max_tokens"] = _raw(request.output_tokens)
        return _encoder.encode(fields)
    fields["model"] = _raw(model)
    if request.is_stream:
        fields["stream_options"] = _INCLUDE_USAGE
    if is_length_pinned and request.output_tokens:
        fields.pop("max_completion_tokens", None)
        tokens = _tokens_per_choice(fields, request.output_tokens)
        fields |= {"max_tokens": _raw(tokens), "min_tokens": _raw(tokens), "ignore_eos": _raw(True)}
    return _encoder.encode(fields)


def _tokens_per_choice(fields: dict[str, msgspec.Raw], output_tokens: int) -> int:
    try:
        choices = msgspec.json.decode(fields.get("n", b"1"), type=int | None) or 1
    except msgspec.MsgspecError:
        choices = 1
    return max(1, round(output_tokens / max(1, choices)))


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(value))


def _synthetic(
    request: WorkloadRequest, body: SyntheticBody, model: str, is_length_pinned: bool, salt: str
) -> dict[str, Any]:
    text = prompt_text([salt + name for name in body.blocks], body.block_tokens, body.prompt_tokens)
    if request.endpoint == GENERATE:
        return {"prompt": text, "max_tokens": request.output_tokens or 16, "temperature": 0}
    fields: dict[str, Any] = {"model": model}
    fields |= {"messages": [{"role": "user", "content": text}]} if request.endpoint == CHAT else {"prompt": text}
    fields |= _sampling_fields(body.sampling, request.endpoint)
    if request.is_stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.output_tokens and is_length_pinned:
        tokens = max(1, round(request.output_tokens / body.sampling.n))
        fields |= {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    elif request.output_tokens and request.recorded is None:
        fields["max_tokens"] = request.output_tokens  # a trace of lengths knows of no other limit
    return fields


def _sampling_fields(sampling: Sampling, endpoint: str) -> dict[str, Any]:
    """Greedy, because the text is not the client's; what costs the engine work is kept."""
    fields: dict[str, Any] = {"temperature": 0}
    if sampling.max_tokens is not None:
        fields["max_tokens"] = sampling.max_tokens
    if sampling.n > 1:
        # Greedy sampling gives one choice only.
        fields |= {"n": sampling.n, "temperature": 1.0, "seed": sampling.seed or 0}
    if sampling.logprobs is not None:
        fields |= (
            {"logprobs": True, "top_logprobs": sampling.logprobs}
            if endpoint == CHAT
            else {"logprobs": sampling.logprobs}
        )
    return fields
