"""Settled requests, ready-made."""

from __future__ import annotations

from typing import Any

from protos.core.record import Attempt, Outcome, Phases, RequestRecord


def record(**changes: Any) -> RequestRecord:
    """A finished request whose phases are its total, unless they are given."""
    phases = changes.pop(
        "phases",
        Phases(
            receive=100_000,
            admit=50_000,
            queue=300_000,
            route=20_000,
            dispatch=200_000,
            engine_input=400_000,
            engine_queue=10_000,
            prefill=5_000_000,
            decode=20_000_000,
            deliver=70_000,
        ),
    )
    total_ns = changes.pop("total_ns", phases.sum_ns())
    facts: dict[str, Any] = {
        "request_id": "r-1",
        "trace_id": "f" * 31 + "1",
        "span_id": "a" * 16,
        "endpoint": "/v1/chat/completions",
        "model": "tide-1",
        "arrived_unix_ns": 1_700_000_000_123_456_789,
        "outcome": Outcome.FINISHED,
        "status": 200,
        "worker": "127.0.0.1:9101",
        "attempts": (Attempt("127.0.0.1:9101", 470_000, total_ns),),
        "phases": phases,
        "total_ns": total_ns,
        "unattributed_ns": max(0, total_ns - phases.sum_ns()),
    }
    return RequestRecord(**{**facts, **changes})
