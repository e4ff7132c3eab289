"""The two HTTP applications: what clients reach, and what operators reach. They never share a listener."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from litestar import HttpMethod, Litestar, MediaType, Request, Response, route
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.handlers import ASGIRouteHandler, HTTPRouteHandler, asgi
from litestar.params import FromPath
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import CollectorRegistry

from gateway.admission import unknown_model
from gateway.answers import ChatAnswer, CompletionAnswer, GenerateAnswer, render_error
from gateway.calls import parse_chat, parse_completion, parse_generate
from gateway.fleet import Fleet
from gateway.identity import authorization, identify
from gateway.openapi import operator_document, public_document
from gateway.operator import worker_routes, worker_states
from gateway.pipeline import Endpoint, Pipeline
from gateway.recorder import Recorder
from gateway.scheduler import Scheduler
from gateway.settings import Limits
from gateway.tenants import Tenant
from gateway.terms import check_model
from protos.core.clock import SYSTEM_CLOCK
from protos.core.errors import InvalidRequest, RequestError

log = logging.getLogger("tidegate.gateway")

ENDPOINTS = (
    Endpoint("/v1/chat/completions", parse_chat, ChatAnswer),
    Endpoint("/v1/completions", parse_completion, CompletionAnswer),
    Endpoint("/generate", parse_generate, GenerateAnswer),
)


class NotHere(InvalidRequest):
    code = "not_found"
    http_status = 404


class WrongMethod(InvalidRequest):
    code = "method_not_allowed"
    http_status = 405


class Bug(RequestError):
    code = "internal_error"


def public_app(pipeline: Pipeline, fleet: Fleet, scheduler: Scheduler, limits: Limits) -> Litestar:
    """OpenAI's API, /generate, and the probes."""

    @_get("/v1/models")
    def models(request: Request[Any, Any, Any]) -> dict[str, Any]:
        tenant = _tenant(pipeline, request)
        entries = [entry for name, entry in _models(scheduler).items() if check_model(name, tenant) is None]
        return {"object": "list", "data": entries}

    @_get("/v1/models/{model:path}")
    def model(request: Request[Any, Any, Any], model: FromPath[str]) -> dict[str, Any]:
        tenant = _tenant(pipeline, request)
        name = model.removeprefix("/")
        entry = _models(scheduler).get(name)
        if entry is None:
            raise unknown_model(name)
        if refusal := check_model(name, tenant):
            raise refusal
        return entry

    def document() -> bytes:
        return public_document(limits, pipeline.tenants.bands)

    document()  # made before there is traffic that would wait for it
    inference = [_inference(pipeline, endpoint) for endpoint in ENDPOINTS]
    return _app([*inference, models, model, *_probes(pipeline, fleet), _published(document)])


def operator_app(
    pipeline: Pipeline, fleet: Fleet, scheduler: Scheduler, recorder: Recorder, registry: CollectorRegistry
) -> Litestar:
    """Metrics, state, workers and the probes."""

    @_get("/metrics")
    def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        recorder.flush()
        # prometheus_client's own choose_encoder raises TypeError for versions that are none.
        encode: Callable[[CollectorRegistry], bytes] = generate_latest
        content_type = CONTENT_TYPE_LATEST
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            encode, content_type = openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST
        # Not as media_type, to which litestar adds a second charset: parsers may refuse what has two.
        return Response(encode(registry), headers={"content-type": content_type})

    @_get("/admin/state")
    def state() -> dict[str, Any]:
        return _state(pipeline, fleet, scheduler, recorder)

    workers = worker_routes(fleet, scheduler, SYSTEM_CLOCK)
    return _app([metrics, state, workers, *_probes(pipeline, fleet), _published(operator_document)])


def _app(handlers: list[Any]) -> Litestar:
    return Litestar(
        handlers,
        exception_handlers={HTTPException: _explain_http, Exception: _explain_bug},
        openapi_config=None,
        logging_config=None,
        debug=False,
    )


def _get(path: str) -> Callable[[Callable[..., Any]], HTTPRouteHandler]:
    """A route that answers HEAD as well, as probes of load balancers ask."""
    return route(path, http_method=[HttpMethod.GET, HttpMethod.HEAD], status_code=200, sync_to_thread=False)


def _published(document: Callable[[], bytes]) -> HTTPRouteHandler:
    @_get("/openapi.json")
    def openapi() -> Response[bytes]:
        return Response(document(), media_type=MediaType.JSON)

    return openapi


def _inference(pipeline: Pipeline, endpoint: Endpoint) -> ASGIRouteHandler:
    """A plain ASGI route: tokens go to the server's `send` without a response object in between."""

    @asgi(endpoint.path, copy_scope=False)
    async def handle(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowedException(headers={"allow": "POST"})
        await pipeline.handle(endpoint, scope, receive, send)

    return handle


def _probes(pipeline: Pipeline, fleet: Fleet) -> list[Any]:
    @_get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @_get("/ready")
    def ready() -> Response[dict[str, str]]:
        if pipeline.is_draining:
            return Response({"status": "draining"}, status_code=503)
        if not fleet.is_ready:
            return Response({"status": "no worker"}, status_code=503)
        return Response({"status": "ready"})

    return [health, ready]


def _tenant(pipeline: Pipeline, request: Request[Any, Any, Any]) -> Tenant:
    """Who asks; a refusal is raised."""
    headers = request.scope["headers"]
    name = pipeline.tenants.authenticate(authorization(headers), identify(headers).tenant)
    if isinstance(name, RequestError):
        raise name
    return pipeline.tenants.get(name)


def _models(scheduler: Scheduler) -> dict[str, dict[str, Any]]:
    """By name."""
    entries: dict[str, dict[str, Any]] = {}
    for worker in scheduler.workers:
        model = worker.model
        for name in model.names:
            entry = entries.setdefault(
                name,
                {
                    "id": name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "tidegate",
                    "parent": model.names[0] if name in model.adapters else None,
                    "max_model_len": model.context_tokens,
                    "tidegate": {
                        "backend": model.backend,
                        "simulated": model.simulated,
                        "context_tokens": model.context_tokens,
                        "workers": 0,
                    },
                },
            )
            entry["tidegate"]["workers"] += 1
    return entries


def _state(pipeline: Pipeline, fleet: Fleet, scheduler: Scheduler, recorder: Recorder) -> dict[str, Any]:
    recorder.flush()
    capture = recorder.capture_stats()
    exported, dropped = recorder.trace_counts()
    return {
        "is_draining": pipeline.is_draining,
        "active": pipeline.active,
        "queued": scheduler.queued,
        "queued_bytes": scheduler.queued_bytes,
        "leases": len(scheduler.ledger),
        "queue": scheduler.depths(),
        "tenants": pipeline.tenants_in_use(),
        "workers": worker_states(fleet, scheduler, SYSTEM_CLOCK),
        "capture": capture,
        "traces": {"exported": exported, "dropped": dropped},
    }


def _explain_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals, in OpenAI's words."""
    path = request.scope["path"]  # request.url is made from the Host header, which may be anything
    match error:
        case NotFoundException():
            return _refuse(NotHere(f"{path}: no such endpoint"))
        case MethodNotAllowedException():
            return _refuse(WrongMethod(f"{request.method} is not allowed on {path}"), headers=error.headers)
        case _:
            return _refuse(InvalidRequest(error.detail), status=error.status_code)


def _explain_bug(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    if isinstance(error, RequestError):
        return _refuse(error)
    log.error("bug while answering %s", request.scope["path"], exc_info=error)
    return _refuse(Bug("internal error"))


def _refuse(error: RequestError, status: int | None = None, headers: dict[str, str] | None = None) -> Response[bytes]:
    return Response(
        render_error(error), status_code=status or error.http_status, headers=headers, media_type=MediaType.JSON
    )
