"""Who and what a request is, from its headers: ids, trace context, session, replay."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable

import msgspec

from protos.core import telemetry

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TOKEN = re.compile(r"[\x21-\x7e]{1,128}")
_ZERO_TRACE, _ZERO_SPAN = "0" * 32, "0" * 16
_SAMPLED = 0x01

# Ids must be unique, not secret: a seeded Mersenne twister costs a tenth of os.urandom.
_random = random.Random(f"{random.SystemRandom().getrandbits(128)}-{time.time_ns()}")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """`trace_id` is the client's where it sent a valid traceparent; `span_id` is always ours."""

    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    is_sampled: bool
    replay_of: str | None
    session: str | None
    wants_timing: bool
    tenant: str | None
    """What the client says; the pipeline checks it."""
    priority: str | None
    ttft_ms: str | None
    deadline_ms: str | None

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.is_sampled else 0:02x}"


_WANTED = {
    name.encode(): name
    for name in (
        telemetry.REQUEST_ID,
        telemetry.TRACEPARENT,
        telemetry.REPLAY_OF,
        telemetry.SESSION,
        telemetry.TIMING,
        telemetry.TENANT,
        telemetry.PRIORITY,
        telemetry.TTFT_MS,
        telemetry.DEADLINE_MS,
    )
}


def identify(headers: Iterable[tuple[bytes, bytes]]) -> Identity:
    """Headers in ASGI's form. A malformed id counts as absent: tracing never refuses a request."""
    found = _find(headers)
    match = _TRACEPARENT.fullmatch(found.get(telemetry.TRACEPARENT, ""))
    is_continued = match is not None and match[1] != _ZERO_TRACE and match[2] != _ZERO_SPAN
    return Identity(
        request_id=_token(found.get(telemetry.REQUEST_ID)) or new_id(128),
        trace_id=match[1] if match and is_continued else new_id(128),
        span_id=new_id(64),
        parent_span_id=match[2] if match and is_continued else None,
        is_sampled=bool(int(match[3], 16) & _SAMPLED) if match and is_continued else True,
        replay_of=_traceparent(found.get(telemetry.REPLAY_OF)),
        session=_token(found.get(telemetry.SESSION)),
        wants_timing=found.get(telemetry.TIMING) == "1",
        tenant=found.get(telemetry.TENANT),
        priority=found.get(telemetry.PRIORITY),
        ttft_ms=found.get(telemetry.TTFT_MS),
        deadline_ms=found.get(telemetry.DEADLINE_MS),
    )


def authorization(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The header that holds the API key. Not part of an Identity: what is kept there may be printed."""
    return ", ".join(value.decode("latin-1") for name, value in headers if name == b"authorization") or None


def new_id(bits: int) -> str:
    """A random id in hex, never zero."""
    return f"{_random.getrandbits(bits) or 1:0{bits // 4}x}"


def _find(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The headers that are read. One that was sent twice is a list, as HTTP has it, and so none of its valid values."""
    pairs = [(_WANTED[name], value.decode("latin-1")) for name, value in headers if name in _WANTED]
    found = dict(pairs)
    if len(found) < len(pairs):
        found = {name: ", ".join(value for other, value in pairs if other == name) for name in found}
    return found


def _token(value: str | None) -> str | None:
    return value if value is not None and _TOKEN.fullmatch(value) else None


def _traceparent(value: str | None) -> str | None:
    return value if value is not None and _TRACEPARENT.fullmatch(value) else None
