"""Captures made in a test, as a gateway would have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from protos.core.capture import CaptureItem, CaptureWriter, Level
from protos.core.contract import Sampling
from protos.core.record import Outcome, Phases, RequestRecord

START_UNIX_NS = 1_700_000_000_000_000_000
MS = 1_000_000


def record(number: int, at_ms: int, *, total_ms: int = 100, **changes: Any) -> RequestRecord:
    phases = Phases(receive=1 * MS, queue=9 * MS, prefill=20 * MS, decode=(total_ms - 30) * MS)
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "trace_id": f"{number:032x}",
        "span_id": f"{number:016x}",
        "endpoint": "/v1/chat/completions",
        "model": "fake",
        "is_stream": True,
        "arrived_unix_ns": START_UNIX_NS + at_ms * MS,
        "outcome": Outcome.FINISHED,
        "status": 200,
        "prompt_tokens": 20,
        "output_tokens": 5,
        "phases": phases,
        "total_ns": total_ms * MS,
        "first_token_at_ns": 30 * MS,
    }
    return RequestRecord(**values | changes)


def item(given: RequestRecord, prompt: str = "What is the capital of France?") -> CaptureItem:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": given.model, "messages": messages, "stream": True, "temperature": 0.7, "max_tokens": 90}
    return CaptureItem(
        record=given,
        body=msgspec.json.encode(body),
        prompt=msgspec.json.encode(messages),
        sampling=Sampling(max_tokens=90, temperature=0.7),
        output=("Paris",),
    )


def write_capture(root: Path, items: list[CaptureItem], level: Level = "full") -> Path:
    writer = CaptureWriter(root, id="capture-1", writer="test", level=level, key=b"k" * 32)
    for each in items:
        assert writer.offer(each)
    writer.close()
    return root / "capture-1"
