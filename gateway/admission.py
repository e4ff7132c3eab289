"""May this request wait for a worker? Pure decisions; a refusal is a value."""

from __future__ import annotations

import random

from gateway.calls import Call
from gateway.forecast import Forecast
from gateway.scheduler import Scheduler
from gateway.settings import Limits
from gateway.tenants import Band
from gateway.terms import Terms
from protos.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, RequestError, Unavailable, UnknownModel

LONGEST_RETRY_S = 60.0


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
    return unknown_model(model)


def unknown_model(name: str) -> UnknownModel:
    return UnknownModel(f"model: '{name}' is not served here; see /v1/models", param="model")


def check_lengths(call: Call, model: str, scheduler: Scheduler, limits: Limits) -> RequestError | None:
    """What can be known about lengths before anybody has tokenized the prompt."""
    sampling, field = call.sampling, call.max_tokens_field
    if sampling.max_tokens is None:
        return None
    if sampling.max_tokens * sampling.n > limits.max_tokens:
        return InvalidRequest(
            f"{field}: {sampling.max_tokens * sampling.n} exceeds this gateway's limit of {limits.max_tokens}",
            param=field,
        )
    context = scheduler.context_tokens(model)
    if context is not None and sampling.max_tokens >= context:
        return InvalidRequest(
            f"{field}: {sampling.max_tokens} leaves no room for a prompt in the model's context of {context} tokens",
            param=field,
            code="context_length_exceeded",
        )
    return None


def check_queue(
    size_bytes: int, model: str, scheduler: Scheduler, limits: Limits, band_number: int, band: Band
) -> RequestError | None:
    """Is there room to wait?"""
    is_band_full = band.queue_requests is not None and scheduler.queued_in(band_number) >= band.queue_requests
    is_full = scheduler.queued >= limits.queue_requests or scheduler.queued_bytes + size_bytes > limits.queue_bytes
    if not (is_band_full or is_full):
        return None
    return Overloaded(
        "the queue is full; retry later", reason="queue_full", retry_after_s=retry_after_s(model, scheduler)
    )


def check_forecast(forecast: Forecast | None, model: str, terms: Terms, scheduler: Scheduler) -> RequestError | None:
    """Would the request be too late for its own deadline? Only sheddable requests that would wait are asked."""
    if not terms.is_sheddable or not is_hopeless(forecast, terms.first_token_ns):
        return None
    return too_late(terms, model, scheduler)


def is_hopeless(forecast: Forecast | None, first_token_ns: int) -> bool:
    """Too many requests like this would miss their deadline. Not where nobody waits: the placement sees to that."""
    return forecast is not None and forecast.is_queued and forecast.sure_ns > first_token_ns


def too_late(terms: Terms, model: str, scheduler: Scheduler) -> RequestError:
    """The first token would come too late: the request is refused before it has waited."""
    return Overloaded(
        f"no first token within {terms.first_token_ns / 1e9:g} s under the present load; retry later",
        reason="deadline",
        retry_after_s=retry_after_s(model, scheduler),
    )


def given_up(terms: Terms, model: str, scheduler: Scheduler) -> RequestError:
    """The request was admitted and has waited, and its first token has not come in time, or cannot any more."""
    return Overloaded(
        f"waited for a worker, and no first token within {terms.first_token_ns / 1e9:g} s; retry later",
        code=DeadlineExceeded.code,
        reason="deadline",
        retry_after_s=retry_after_s(model, scheduler),
    )


def retry_after_s(model: str, scheduler: Scheduler) -> float:
    """Until half of the model's queue has drained, with jitter, so that the refused do not come back together."""
    interval_ns = scheduler.drain_ns(model)
    drained_s = 1.0 if interval_ns is None else interval_ns * (scheduler.waiting(model) + 1) / 2e9
    return min(LONGEST_RETRY_S, max(1.0, drained_s)) * random.uniform(0.8, 1.2)


def no_worker() -> RequestError:
    return Unavailable("no worker is ready; retry later", reason="no_worker", retry_after_s=2.0)


def draining() -> RequestError:
    return Unavailable("this gateway is shutting down; retry on another", reason="draining", retry_after_s=1.0)
