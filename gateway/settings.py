"""Settings of the gateway process: section [gateway]."""

from __future__ import annotations

from typing import Annotated

import msgspec

from gateway.tenants import DEFAULT_BANDS, Band, Tenant, TenantName
from protos.core.capture import Level
from protos.core.settings import OtlpEndpoint, Port, Positive

Seconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 24 * 3600)]
"""TOML has `inf`, which no clock counts to."""
PerSecond = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    body_bytes: Positive = 16 * 1024 * 1024
    max_tokens: Positive = 131_072
    """Most output tokens that one request may ask for, over all its choices."""
    queue_requests: Positive = 1_000
    queue_bytes: Positive = 256 * 1024 * 1024
    first_token_s: Seconds = 30.0
    total_s: Seconds = 300.0
    token_s: Seconds | None = None
    """Time per output token that running answers keep: prompts that are not urgent are computed in parts, so that steps
    take no longer, and while answers are behind it, workers get no new ones. None starts a prompt wherever there is a
    slot."""
    attempts: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    """Most workers that one request is tried on: before its first token, or to resume its answer."""
    drain_s: Seconds = 300.0
    """How long running streams may take to finish after SIGTERM."""


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    dir: str | None = None
    """Where captures go; none are written without it."""
    level: Level = "hashed"
    key_file: str | None = None
    """Key of the hashed level; a new random one per capture without it."""


class Tracing(msgspec.Struct, frozen=True, kw_only=True):
    otlp_endpoint: OtlpEndpoint = ""
    """OTLP over gRPC, such as http://127.0.0.1:4317; no spans leave without it."""
    keep_ratio: Ratio = 1.0
    """Fraction kept of the traces that are not kept for a reason (error, slow, cancelled, preempted, retried)."""
    keep_per_s: PerSecond = 20.0
    """Most traces exported per second."""


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    name: str = "gateway"
    host: str = "127.0.0.1"
    port: Port = 8000
    operator_host: str = "127.0.0.1"
    operator_port: Port = 8001
    workers: tuple[str, ...] = ("127.0.0.1:9101",)
    """HOST:PORT of each engine worker; dns://NAME:PORT is all addresses behind a name, asked for every 5 s."""
    limits: Limits = Limits()
    bands: tuple[Band, ...] = DEFAULT_BANDS
    """Priority bands, the top one first."""
    tenants: dict[TenantName, Tenant] = {}
    """Limits and API keys, in sections [gateway.tenants.NAME]; see "Tenants and priorities"."""
    allow_anonymous: bool = False
    """Without any API key, listen beyond the loopback interface all the same."""
    capture: Capture = Capture()
    tracing: Tracing = Tracing()
