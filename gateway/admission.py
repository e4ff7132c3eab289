"""May this request wait for a worker? Pure decisions; a refusal is a value."""

from __future__ import annotations

from gateway.calls import Call
from gateway.scheduler import Scheduler
from gateway.settings import Limits
from protos.core.errors import InvalidRequest, Overloaded, RequestError, Unavailable, UnknownModel


def resolve_model(call: Call, scheduler: Scheduler) -> str | RequestError:
    """The model to run, or why there is none."""
    model = call.model or scheduler.default_model
    if model is None:
        if not scheduler.workers:
            return no_worker()
        return InvalidRequest("model: is required, several models are served", param="model")
    if scheduler.is_served(model):
        return model
    if scheduler.was_served(model) or not scheduler.workers:
        return no_worker()
    return UnknownModel(f"model: '{model}' is not served here; see /v1/models", param="model")


def check_lengths(call: Call, model: str, scheduler: Scheduler, limits: Limits) -> RequestError | None:
    """What can be known about lengths before anybody has tokenized the prompt."""
    sampling = call.sampling
    if sampling.max_tokens is None:
        return None
    if sampling.max_tokens * sampling.n > limits.max_tokens:
        return InvalidRequest(
            f"max_tokens: {sampling.max_tokens * sampling.n} exceeds this gateway's limit of {limits.max_tokens}",
            param="max_tokens",
        )
    context = scheduler.context_tokens(model)
    if context is not None and sampling.max_tokens >= context:
        return InvalidRequest(
            f"max_tokens: {sampling.max_tokens} leaves no room for a prompt in the model's context of {context} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return None


def check_queue(size_bytes: int, scheduler: Scheduler, limits: Limits) -> RequestError | None:
    """Is there room to wait?"""
    if scheduler.queued >= limits.queue_requests or scheduler.queued_bytes + size_bytes > limits.queue_bytes:
        return queue_full()
    return None


def queue_full() -> RequestError:
    return Overloaded("the queue is full; retry later", reason="queue_full", retry_after_s=1.0)


def no_worker() -> RequestError:
    return Unavailable("no worker is ready; retry later", reason="no_worker", retry_after_s=2.0)


def draining() -> RequestError:
    return Unavailable("this gateway is shutting down; retry on another", reason="draining", retry_after_s=1.0)
