"""What gateway and engine say to each other, as plain Python values.

The field meanings are those of `protos/engine.proto`; `protos.core.wire` turns these into bytes and back, and no other
module touches protobuf. All `*_ns` values are nanoseconds of the *sender's* monotonic clock, and 0 means "did not
happen".
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

PROTOCOL = 2
"""Version of the Session protocol. Both ends must have the same: see `protos.core.errors.ProtocolMismatch`."""


# ---------------------------------------------------------------- gateway -> worker


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    token_ids: tuple[int, ...]


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Chat messages as the client's own JSON bytes: the worker applies the template, the gateway never does."""

    messages_json: bytes
    template_kwargs_json: bytes = b""


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters with vLLM's names. None means the engine's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    """Alternatives per token; 0 gives only the sampled token's own logprob, None gives none."""
    logit_bias: dict[int, float] = {}
    include_stop_in_output: bool = False
    skip_special_tokens: bool | None = None


class Hello(msgspec.Struct, frozen=True):
    protocol: int
    gateway: str
    version: str


SIT_OUT_STEPS = 4
"""In a row at most: prompts that make way have the next step."""


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    request_id: str
    prompt: Prompt
    sampling: Sampling
    model: str
    priority: int = 0
    step_tokens: int = 0
    """Above 0 it makes way: prompts like it are computed so many tokens in a step, and sit out steps of others."""
    traceparent: str = ""
    resumed_token_ids: Sequence[int] = ()
    """Output tokens that another worker made before it was lost: the worker goes on after them."""


class GatewayFrame(msgspec.Struct, frozen=True, kw_only=True):
    hello: Hello | None = None
    submits: Sequence[Submit] = ()
    cancels: Sequence[int] = ()
    ping_sent_ns: int = 0
    drain: bool = False


# ---------------------------------------------------------------- worker -> gateway


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    names: tuple[str, ...]
    backend: str
    backend_version: str
    simulated: bool
    context_tokens: int
    max_sequences: int
    max_batch_tokens: int
    kv_blocks: int
    kv_block_tokens: int
    has_chat_template: bool
    device: str
    dtype: str
    quantization: str = ""
    tensor_parallel: int = 1
    profile: str = ""
    adapters: tuple[str, ...] = ()
    """Those of `names` that are LoRA adapters of the first."""
    makes_way: bool = True
    """It heeds `Submit.step_tokens`."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    protocol: int
    worker: str
    boot_id: str
    version: str
    model: ModelInfo


class Stamps(msgspec.Struct, frozen=True):
    """Where a request was inside the worker, in ns of the worker's monotonic clock."""

    received_ns: int = 0
    queued_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


NO_STAMPS = Stamps()


class Accepted(msgspec.Struct, frozen=True):
    slot: int
    received_ns: int


class Started(msgspec.Struct, frozen=True):
    slot: int
    prompt_tokens: int
    cached_tokens: int
    stamps: Stamps


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    reasons: tuple[str, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    """Made by this worker, all choices together."""
    preemptions: int = 0
    stamps: Stamps = NO_STAMPS


class FailureKind(enum.IntEnum):
    """Why a worker could not run a request; the numbers are the wire's."""

    INTERNAL = 0
    INVALID = 1
    CONTEXT_EXCEEDED = 2
    UNKNOWN_MODEL = 3
    UNAVAILABLE = 4


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    slot: int
    kind: FailureKind
    message: str
    param: str = ""
    stamps: Stamps = NO_STAMPS


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    token_bytes: bytes
    top: tuple[TokenLogprob, ...] = ()


class Gpu(msgspec.Struct, frozen=True):
    index: int
    utilization_percent: float
    memory_used_bytes: int
    memory_total_bytes: int


class Host(msgspec.Struct, frozen=True):
    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    gpus: tuple[Gpu, ...] = ()


class Load(msgspec.Struct, frozen=True, kw_only=True):
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preemptions: int = 0
    step_ns: int = 0
    queued_prefill_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    host: Host | None = None


class Deltas(msgspec.Struct, kw_only=True):
    """The tokens of one engine step, by columns: row i is slots[i], texts[i], token_counts[i].

    `token_ids` holds the rows' ids one after another (sum(token_counts) of them, or none at all when the backend gives
    none). `choices` is empty when every row is choice 0. `logprobs` maps a row to one TokenLogprob per token.
    """

    slots: list[int] = []
    texts: list[str] = []
    token_counts: list[int] = []
    token_ids: list[int] = []
    choices: list[int] = []
    logprobs: dict[int, tuple[TokenLogprob, ...]] = {}


class EngineFrame(msgspec.Struct, kw_only=True):
    """One engine step for all sequences of a session."""

    welcome: Welcome | None = None
    step: int = 0
    accepted: list[Accepted] = []
    started: list[Started] = []
    deltas: Deltas | None = None
    finished: list[Finished] = []
    failed: list[Failed] = []
    load: Load | None = None
    pong: tuple[int, int] | None = None
    """(the ping's sent_ns in the gateway's clock, when the worker read it in its own clock)"""
    draining: bool = False
    sent_ns: int = 0
