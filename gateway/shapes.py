"""What answers look like, as types: the published document is made from them, and tests hold real answers to them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from protos.core.contract import Load, ModelInfo


class ErrorDetail(msgspec.Struct):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field or header at fault, in the client's terms."""
    code: str


class Error(msgspec.Struct):
    """OpenAI's error body. Also the last event of a stream that fails after its start."""

    error: ErrorDetail


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenForecast(msgspec.Struct):
    """When the first token was to come, told at the request's arrival: in all likelihood, and at the latest."""

    expected: int
    safe: int


class Timing(msgspec.Struct):
    """Where the request's time went, when `x-tidegate-timing: 1` asked for it."""

    request_id: str
    trace_id: str
    worker: str | None
    is_simulated: bool
    phases_ns: dict[str, int]
    """They partition the total, but for `unattributed_ns`."""
    total_ns: int
    unattributed_ns: int
    first_token_at_ns: int | None
    forecast_ns: TokenForecast | None
    preemptions: int
    cached_tokens: int
    expected_cached_tokens: int
    """What the router counted on when it chose the worker."""


class Alternative(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None


class AssistantMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    tidegate: Timing | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a stream. The last one has no choices, but what was asked for of `usage` and `tidegate`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    tidegate: Timing | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The best ones, and the sampled one."""
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, kw_only=True):
    """A whole answer, and each event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    tidegate: Timing | UnsetType = UNSET


class Generated(msgspec.Struct, kw_only=True):
    text: str
    usage: Usage
    tidegate: Timing | UnsetType = UNSET


class ModelFacts(msgspec.Struct):
    backend: str
    simulated: bool
    context_tokens: int
    workers: int
    """How many workers serve it now."""


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """The model that an adapter belongs to."""
    max_model_len: int
    tidegate: ModelFacts


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class WorkerState(msgspec.Struct, kw_only=True):
    """One worker, as the gateway sees it."""

    address: str
    sources: list[str]
    """Who names it: the configuration, a name in DNS, the operator."""
    state: Literal["connecting", "ready", "refused"]
    is_leaving: bool
    """It is removed when its running requests have ended."""
    is_drained: bool
    """The operator keeps requests from it."""
    name: str | None
    boot_id: str | None
    model: ModelInfo | None
    last_error: str
    leases: int
    sequence_limit: int | None
    """How many sequences it gets at once, at present."""
    handover_ns: int | None
    """How long before a step ends a prompt has to be sent to be in the next one, as learned."""
    load: Load
    breaker: Literal["closed", "open", "half-open"] | None
    weight: float | None
    """Below 1 while it warms up."""
    prefix_bytes: int | None
    """Of prompts that it is thought to have cached."""
    prefix_trust: float | None
    """How much of what was expected it had."""


class Health(msgspec.Struct):
    status: Literal["ok"]


class Readiness(msgspec.Struct):
    status: Literal["ready", "no worker", "draining"]


class Document(msgspec.Struct):
    """An OpenAPI document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
