"""Settings of a replay: section [replay]."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

DEFAULT_TARGET = "http://127.0.0.1:8000"
Positive = Annotated[float, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class ReplaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    target: str = DEFAULT_TARGET
    speed: Positive = 1.0
    """Session starts per recorded session start; think time stays."""
    model: str | None = None
    """None keeps the recorded model where the target serves it, and takes the target's first one elsewhere."""
    lengths: Literal["recorded", "free"] = "recorded"
    """Answers as long as the recorded ones, or as the model makes them."""
    slo: str = "ttft=1s,tpot=100ms"
    limit_duration: Seconds | None = None
    """Seconds of the source to replay."""
    users: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    """Closed loop with so many users instead of the recorded times."""
    spawn_rate: Positive = 1.0
    """Users who start per second."""
    think_time: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    """Seconds between two requests of a user; None keeps the recorded ones."""
    timeout: Seconds = 330.0
    """Seconds for a whole answer; longer than the gateway's own limit."""
    connect_timeout: Seconds = 10.0
    api_key: str = ""
