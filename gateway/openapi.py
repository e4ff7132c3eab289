"""The published OpenAPI documents, made from the types and limits that requests are parsed with."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway import shapes
from gateway.calls import LATE_FIELDS, ChatBody, CompletionBody, GenerateBody
from gateway.operator import NewWorker, UnknownWorker
from gateway.settings import Limits
from gateway.tenants import NAME_PATTERN, Band
from gateway.terms import MILLISECONDS
from protos.core import telemetry
from protos.core.errors import (
    BodyTimeout,
    DeadlineExceeded,
    Forbidden,
    HeadersTooLarge,
    InvalidRequest,
    Overloaded,
    RequestError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

Json = dict[str, Any]
JSON, EVENTS = "application/json", "text/event-stream"
SCHEMAS = "#/components/schemas/{name}"
PATH_PARAMETER = re.compile(r"{(\w+)}")


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. `answers` are types by status, or None for what is no JSON."""

    method: str = "get"
    path: str
    summary: str
    answers: dict[int, Any]
    media_types: tuple[str, ...] = (JSON,)
    body: Any = None
    event: Any = None
    """Of the answer as a stream."""
    parameters: tuple[str, ...] = ()
    refusals: tuple[type[RequestError], ...] = ()


ERRORS: dict[type[RequestError], str] = {
    InvalidRequest: "The request is wrong; `param` names the field or header.",
    Unauthenticated: "An API key is required, or nobody has the one that was sent.",
    Forbidden: "The tenant, or a web page, may not do this.",
    UnknownModel: "No worker serves the model.",
    BodyTimeout: "The body did not arrive in time.",
    TooLarge: "The body is too large.",
    HeadersTooLarge: "The headers are too large or too many.",
    Overloaded: "Capacity is contended or a limit was hit: wait, and retry.",
    Unavailable: "No worker is ready, workers failed, or the gateway is shutting down: wait, and retry.",
    DeadlineExceeded: "No first token, or no end, before the deadline.",
}
REASONS: dict[type[RequestError], tuple[str, ...]] = {
    Overloaded: ("queue_full", "deadline", "tenant_concurrency", "tenant_rate", "tenant_tokens"),
    Unavailable: ("no_worker", "draining", "worker_lost", "worker_failed"),
    DeadlineExceeded: ("deadline",),
}
"""Values of `x-tidegate-reject-reason`."""

EVERYWHERE = (
    "HEAD answers as GET does, without the body. "
    "On every path: 400 for what is no HTTP, 404, 405, 408 for a head that is slow, 431 for one that is large."
)

TEXT: Json = {"type": "string"}
NAME: Json = {"type": "string", "pattern": NAME_PATTERN}
WHOLE_MILLISECONDS: Json = {"type": "string", "pattern": f"^{MILLISECONDS}$"}
REQUEST_HEADERS: dict[str, tuple[str, Json]] = {
    telemetry.REQUEST_ID: ("Becomes the request's id.", TEXT),
    telemetry.TRACEPARENT: ("W3C trace context: the request's trace continues the caller's.", TEXT),
    telemetry.SESSION: ("The conversation that the request belongs to.", TEXT),
    telemetry.TENANT: ("Whose request it is; with an API key it must be the key's tenant.", NAME),
    telemetry.PRIORITY: ("Band to wait in, no higher than the tenant's highest.", TEXT),
    telemetry.TTFT_MS: ("The request's own deadline for its first token.", WHOLE_MILLISECONDS),
    telemetry.DEADLINE_MS: ("The request's own deadline for its end.", WHOLE_MILLISECONDS),
    telemetry.TIMING: ("`1` asks for where the time went.", TEXT),
    telemetry.REPLAY_OF: ("Traceparent of the request that this one replays.", TEXT),
}
ANSWER_HEADERS: dict[str, tuple[str, Json]] = {
    telemetry.REQUEST_ID: ("The request's id.", TEXT),
    telemetry.TRACEPARENT: ("The request's trace.", TEXT),
}
WORKER_HEADER = {telemetry.WORKER: ("The worker that ran it.", TEXT)}
RETRY_HEADER = {"retry-after": ("Seconds to wait.", {"type": "integer", "minimum": 1})}

PROBES = (
    Operation(path="/health", summary="Is the process alive?", answers={200: shapes.Health}),
    Operation(
        path="/ready",
        summary="Would a request be served?",
        answers={200: shapes.Readiness, 503: shapes.Readiness},
    ),
    Operation(path="/openapi.json", summary="This document.", answers={200: shapes.Document}),
)


def _inference(path: str, summary: str, body: Any, answer: Any, event: Any = None) -> Operation:
    return Operation(
        method="post",
        path=path,
        summary=summary,
        answers={200: answer},
        body=body,
        event=event,
        parameters=tuple(REQUEST_HEADERS),
        refusals=tuple(ERRORS),
    )


PUBLIC = (
    _inference("/v1/chat/completions", "Answer a chat.", ChatBody, shapes.ChatCompletion, shapes.ChatCompletionChunk),
    _inference("/v1/completions", "Continue a prompt.", CompletionBody, shapes.Completion, shapes.Completion),
    _inference("/generate", "Continue a prompt, in the smallest form.", GenerateBody, shapes.Generated),
    Operation(
        path="/v1/models",
        summary="The models that are served now, and that the tenant may use.",
        answers={200: shapes.ModelList},
        parameters=(telemetry.TENANT,),
        refusals=(InvalidRequest, Unauthenticated, Forbidden),
    ),
    Operation(
        path="/v1/models/{model}",
        summary="One of them.",
        answers={200: shapes.Model},
        parameters=(telemetry.TENANT,),
        refusals=(InvalidRequest, Unauthenticated, Forbidden, UnknownModel),
    ),
    *PROBES,
)
OPERATOR = (
    Operation(
        path="/metrics",
        summary="Prometheus metrics; as OpenMetrics, with exemplars, for those who accept it.",
        answers={200: None},
        media_types=("text/plain", "application/openmetrics-text"),
    ),
    Operation(path="/admin/state", summary="Queue, workers, tenants, capture.", answers={200: dict[str, Any]}),
    Operation(path="/admin/workers", summary="The workers.", answers={200: list[shapes.WorkerState]}),
    Operation(
        method="post",
        path="/admin/workers",
        summary="Connect to a worker, or use a drained one again.",
        answers={201: shapes.WorkerState},
        body=NewWorker,
        refusals=(InvalidRequest, Forbidden),
    ),
    Operation(
        method="post",
        path="/admin/workers/{address}/drain",
        summary="Send a worker no more requests; its running ones go on.",
        answers={200: shapes.WorkerState},
        refusals=(Forbidden, UnknownWorker),
    ),
    Operation(
        method="delete",
        path="/admin/workers/{address}",
        summary="Drain a worker, then forget it.",
        answers={202: shapes.WorkerState},
        refusals=(Forbidden, UnknownWorker),
    ),
    *PROBES,
)


@functools.lru_cache(maxsize=1)
def public_document(limits: Limits, bands: tuple[Band, ...]) -> bytes:
    """What clients reach."""
    document = _document("Tidegate", PUBLIC)
    document["security"] = [{}, {"key": []}]
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Needed where API keys are configured."}
    }
    _tell_limits(document, limits, [band.name for band in bands])
    return msgspec.json.encode(document)


@functools.cache
def operator_document() -> bytes:
    """What operators reach."""
    return msgspec.json.encode(_document("Tidegate, operator's listener", OPERATOR))


def _document(title: str, operations: Sequence[Operation]) -> Json:
    paths: Json = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": importlib.metadata.version("tidegate"), "description": EVERYWHERE},
        "paths": paths,
        "components": {"schemas": _components(operations), "responses": _refusals(operations)},
    }


def _operation(operation: Operation) -> Json:
    described: Json = {
        "summary": operation.summary,
        "operationId": operation.method + operation.path.replace("/", "_").replace(".", "_"),
        "responses": {str(status): _answer(operation, status, kind) for status, kind in operation.answers.items()}
        | {str(error.http_status): _refer("responses", error.__name__) for error in operation.refusals},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": TEXT}
        for name in PATH_PARAMETER.findall(operation.path)
    ] + [
        {"name": name, "in": "header", "description": REQUEST_HEADERS[name][0], "schema": REQUEST_HEADERS[name][1]}
        for name in operation.parameters
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": _schema(operation.body)}}}
    return described


def _answer(operation: Operation, status: int, kind: Any) -> Json:
    schema = TEXT if kind is None else _schema(kind)
    content: Json = {media_type: {"schema": schema} for media_type in operation.media_types}
    if operation.event is not None:
        content[EVENTS] = {"schema": _events(operation.event)}
    answer: Json = {"description": "As asked." if status < 400 else "Not now.", "content": content}
    if telemetry.REQUEST_ID in operation.parameters:
        answer["headers"] = _headers(ANSWER_HEADERS | WORKER_HEADER)
    return answer


def _events(kind: Any) -> Json:
    """Each event of a stream, as OpenAPI 3.2 describes them; 3.1 has no word for it."""
    chunk = {"anyOf": [_schema(kind), _schema(shapes.Error)]}
    data = {"anyOf": [{"const": "[DONE]"}, {**TEXT, "contentMediaType": JSON, "contentSchema": chunk}]}
    return {
        "description": "Server-sent events, with `stream: true`. The last one is `[DONE]`, or an error.",
        "type": "object",
        "required": ["data"],
        "properties": {"data": data},
    }


def _refusals(operations: Sequence[Operation]) -> Json:
    kinds = {error: None for operation in operations for error in operation.refusals}
    return {error.__name__: _refusal(error) for error in kinds}


def _refusal(error: type[RequestError]) -> Json:
    headers = dict(ANSWER_HEADERS)
    if error in REASONS:
        reason = ("Why.", {**TEXT, "enum": list(REASONS[error])})
        headers |= RETRY_HEADER | {telemetry.REJECT_REASON: reason}
    return {
        "description": ERRORS.get(error) or inspect.getdoc(error),
        "headers": _headers(headers),
        "content": {JSON: {"schema": _schema(shapes.Error)}},
    }


def _headers(headers: dict[str, tuple[str, Json]]) -> Json:
    return {name: {"description": text, "schema": schema} for name, (text, schema) in headers.items()}


def _components(operations: Sequence[Operation]) -> Json:
    kinds: list[Any] = [shapes.Error]
    for operation in operations:
        kinds += [*operation.answers.values(), operation.body, operation.event]
    late = [kind for kinds_of_field in LATE_FIELDS.values() for kind in kinds_of_field]
    _, components = msgspec.json.schema_components(
        [kind for kind in [*kinds, *late] if kind is not None], ref_template=SCHEMAS
    )
    for (body, field), kinds_of_field in LATE_FIELDS.items():
        if body in components:
            schemas = [_schema(kind) for kind in kinds_of_field]
            components[body]["properties"][field] |= schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return components


def _tell_limits(document: Json, limits: Limits, bands: list[str]) -> None:
    """What this gateway's settings narrow further."""
    band = {"anyOf": [{"enum": bands}, {"type": "integer", "minimum": 0, "maximum": len(bands) - 1}, {"type": "null"}]}
    for body in ("ChatBody", "CompletionBody", "GenerateBody"):
        fields = document["components"]["schemas"][body]["properties"]
        for name in fields.keys() & {"max_tokens", "max_completion_tokens"}:
            fields[name]["anyOf"][0]["maximum"] = limits.max_tokens
        if "priority" in fields:
            fields["priority"] = band
    for operation in PUBLIC:
        for parameter in document["paths"][operation.path][operation.method].get("parameters", ()):
            if parameter["name"] == telemetry.PRIORITY:
                parameter["schema"] = {**TEXT, "enum": bands}
    too_large = document["components"]["responses"][TooLarge.__name__]
    too_large["description"] = f"The body exceeds {limits.body_bytes} bytes."


def _schema(kind: Any) -> Json:
    """A type's schema, its structs by reference."""
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=SCHEMAS)
    return schema


def _refer(section: str, name: str) -> Json:
    return {"$ref": f"#/components/{section}/{name}"}
