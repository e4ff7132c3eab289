"""Settings of `tidegate up`: section [up]."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protos.core.capture import Level
from protos.core.settings import OtlpEndpoint

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class UpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the parts of one machine listen, and which engine they run.

    `up` decides addresses and capture, and hands them to the parts as flags; all else the parts read from their own
    sections of the same file.
    """

    backend: Literal["auto", "vllm", "sim"] = "auto"
    """auto: vLLM where it is installed, else the simulated engine, saying so."""
    model: str | None = None
    """Pulled model, path or hub name; None takes the [engine] section's, which is SmolLM2-135M-Instruct by default."""
    profile: str | None = None
    """Ready-made engine settings, a name from engine/profiles."""
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    host: str = "127.0.0.1"
    port: Port = 8000
    operator_port: Port = 8001
    """Metrics, state and admin; on 127.0.0.1 only."""
    worker_port: Port = 9101
    """Of the first worker; the others follow."""
    capture_level: Level = "hashed"
    capture_dir: str = "captures"
    otlp_endpoint: OtlpEndpoint = ""
    """http://HOST:4317 of an OpenTelemetry collector or Jaeger; empty sends no traces."""
    log_dir: str = ".tidegate/logs"
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 300.0
    """Longest wait for running streams when stopping."""
