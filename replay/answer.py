"""What an OpenAI-compatible server answers, as far as a replay looks at it."""

from __future__ import annotations

import msgspec

from protos.core.record import Phases


class Timing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The gateway's own account of the request, asked for with `x-tidegate-timing: 1`."""

    request_id: str = ""
    trace_id: str = ""
    worker: str | None = None
    is_simulated: bool = False
    phases_ns: Phases = Phases()
    total_ns: int = 0
    unattributed_ns: int = 0
    preemptions: int = 0
    cached_tokens: int | None = None

    @property
    def is_partition(self) -> bool:
        return self.phases_ns.sum_ns() + self.unattributed_ns == self.total_ns


class Text(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """What vLLM called `reasoning` before, and other servers do still."""
    tool_calls: list[msgspec.Raw] | None = None


class Choice(msgspec.Struct, frozen=True):
    delta: Text | None = None
    message: Text | None = None
    text: str | None = None

    @property
    def has_content(self) -> bool:
        if self.text:
            return True
        part = self.delta or self.message
        return part is not None and bool(part.content or part.reasoning or part.reasoning_content or part.tool_calls)


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else None


class ErrorBody(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class Answer(msgspec.Struct, frozen=True):
    """One event of a stream, or the whole of an answer that is none."""

    choices: tuple[Choice, ...] = ()
    text: str | None = None
    usage: Usage | None = None
    error: ErrorBody | str | None = None
    tidegate: Timing | None = None

    @property
    def error_text(self) -> str | None:
        return self.error.message if isinstance(self.error, ErrorBody) else self.error

    @property
    def has_content(self) -> bool:
        return bool(self.text) or any(choice.has_content for choice in self.choices)


answer_decoder = msgspec.json.Decoder(Answer)
