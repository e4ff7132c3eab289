"""What a client is told that cannot be served."""

from __future__ import annotations

from protos.core.contract import ChatPrompt, Failed, FailureKind, Stamps, Submit


def prompt_field(submit: Submit) -> str:
    """What the client calls its prompt."""
    return "messages" if isinstance(submit.prompt, ChatPrompt) else "prompt"


def failed(submit: Submit, received_ns: int, kind: FailureKind, message: str, param: str = "") -> Failed:
    return Failed(slot=submit.slot, kind=kind, message=message, param=param, stamps=Stamps(received_ns=received_ns))


def output_limit(context_tokens: int, prompt_tokens: int, max_tokens: int | None) -> int | None:
    """How many tokens may be generated: `max_tokens`, or all that is left; None where that does not fit."""
    left = context_tokens - prompt_tokens
    limit = left if max_tokens is None else max_tokens
    return limit if 1 <= limit <= left else None


def context_exceeded(submit: Submit, received_ns: int, context_tokens: int, prompt_tokens: int) -> Failed:
    prompt, max_tokens = prompt_field(submit), submit.sampling.max_tokens
    is_prompt_at_fault = prompt_tokens >= context_tokens or max_tokens is None
    wanted = "" if is_prompt_at_fault else f", and {max_tokens} more are asked for"
    message = f"the model's context is {context_tokens} tokens; the prompt has {prompt_tokens}{wanted}"
    param = prompt if is_prompt_at_fault else "max_tokens"
    return failed(submit, received_ns, FailureKind.CONTEXT_EXCEEDED, message, param)
