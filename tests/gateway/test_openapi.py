"""The published documents say what the code does, and all of it. test_fuzz.py holds a process to them."""

from __future__ import annotations

import ast
import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from litestar import Litestar

import gateway
from gateway import identity, shapes
from gateway.answers import ChatAnswer, Choice, CompletionAnswer, GenerateAnswer, render_error
from gateway.app import operator_app, public_app
from gateway.metrics import Metrics
from gateway.openapi import ERRORS, REASONS, REQUEST_HEADERS, operator_document, public_document
from gateway.settings import Limits
from gateway.tenants import DEFAULT_BANDS, Band
from protos.core.errors import RequestError, Unavailable
from tests.gateway.fakes import chat_body, in_virtual_time
from tests.gateway.fakes import gateway as fake_gateway
from tests.gateway.test_answers import LOGPROBS, USAGE

PUBLIC = json.loads(public_document(Limits(), DEFAULT_BANDS))
OPERATOR = json.loads(operator_document())


def routes(app: Litestar) -> set[tuple[str, str]]:
    found = set()
    for route in app.routes:
        methods = getattr(route, "methods", None) or ["POST"]  # a plain ASGI route takes POST alone
        found |= {(route.path_format, method.lower()) for method in methods if method not in ("OPTIONS", "HEAD")}
    return found


def documented(document: Any) -> set[tuple[str, str]]:
    return {(path, method) for path, methods in document["paths"].items() for method in methods}


def test_every_route_is_in_its_listeners_document_and_nothing_else() -> None:
    @in_virtual_time
    async def test() -> None:
        async with fake_gateway() as g:
            public = public_app(g.pipeline, g.fleet, g.scheduler, Limits())  # type: ignore[arg-type]
            operator = operator_app(g.pipeline, g.fleet, g.scheduler, None, Metrics().registry)  # type: ignore[arg-type]
            assert routes(public) == documented(PUBLIC)
            assert routes(operator) == documented(OPERATOR)

    test()


def test_every_header_that_is_read_is_in_the_document() -> None:
    assert set(REQUEST_HEADERS) == set(identity._WANTED.values())
    assert PUBLIC["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def all_errors(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for each in kind.__subclasses__():
        if each.__module__ == RequestError.__module__:
            yield each
            yield from all_errors(each)


def test_every_error_is_in_the_document() -> None:
    assert set(ERRORS) == set(all_errors(RequestError))
    responses = PUBLIC["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", *(str(error.http_status) for error in ERRORS)}


def reasons_in_code() -> set[str]:
    """Literals of `reason=`, where an error is made."""
    found = set()
    for file in Path(gateway.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "reason" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
    return found


def test_every_reject_reason_is_in_the_document() -> None:
    assert {reason for reasons in REASONS.values() for reason in reasons} == reasons_in_code()


def test_all_that_is_referred_to_exists() -> None:
    for document in (PUBLIC, OPERATOR):
        for reference in references(document):
            target: Any = document
            for step in reference.removeprefix("#/").split("/"):
                target = target[step]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)


def test_limits_and_bands_are_this_gateways() -> None:
    document = json.loads(
        public_document(Limits(max_tokens=77, body_bytes=999), (Band(name="gold"), Band(name="lead")))
    )
    chat = document["components"]["schemas"]["ChatBody"]["properties"]
    assert chat["max_tokens"]["anyOf"][0]["maximum"] == chat["max_completion_tokens"]["anyOf"][0]["maximum"] == 77
    assert chat["priority"]["anyOf"][0]["enum"] == ["gold", "lead"]
    assert "999" in document["components"]["responses"]["TooLarge"]["description"]


# ---------------------------------------------------------------- answers are of their documented types


def assert_is(kind: Any, data: bytes) -> None:
    """All of it, and nothing that the type does not have."""
    assert msgspec.to_builtins(msgspec.json.decode(data, type=kind)) == json.loads(data)


@pytest.mark.parametrize(
    ("new_answer", "whole", "event"),
    [
        (ChatAnswer, shapes.ChatCompletion, shapes.ChatCompletionChunk),
        (CompletionAnswer, shapes.Completion, shapes.Completion),
        (GenerateAnswer, shapes.Generated, None),
    ],
)
@pytest.mark.parametrize("logprobs", [LOGPROBS, ()])
def test_answers_are_of_their_documented_types(new_answer: Any, whole: Any, event: Any, logprobs: Any) -> None:
    answer = new_answer("r1", "m", 1700, wants_usage=True)
    choices = [Choice(texts=["he"], logprobs=list(logprobs), finish_reason="stop")]
    assert_is(whole, answer.whole(choices, USAGE, None))
    if event is not None:
        stream = answer.head(1) + answer.chunk(0, "he", logprobs or None) + answer.tail(["stop"], USAGE, None)
        *events, done, rest = stream.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        for data in events:
            assert_is(event, data.removeprefix(b"data: "))


def test_timing_and_errors_are_of_their_documented_types() -> None:
    @in_virtual_time
    async def test() -> None:
        async with fake_gateway() as g:
            client = await g.post(chat_body(max_tokens=1), x_tidegate_timing="1")
            g.fleet.workers["worker-0"].token(1)
            await asyncio.sleep(0.1)
            g.fleet.workers["worker-0"].finish(1)
            await client.task
            assert_is(shapes.ChatCompletion, client.body)
            assert "tidegate" in client.json

    test()
    assert_is(shapes.Error, render_error(Unavailable("no", reason="no_worker")))
