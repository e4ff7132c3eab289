"""On which terms a request is served: its tenant's band, weight and deadlines. Pure decisions."""

from __future__ import annotations

import re

import msgspec

from gateway.calls import Call
from gateway.identity import Identity
from gateway.settings import Limits
from gateway.tenants import Tenant, TenantTable
from protos.core import telemetry
from protos.core.errors import Forbidden, InvalidRequest, RequestError

MILLISECONDS = "[1-9][0-9]{0,11}"
"""Pattern of the deadline headers' values."""
_milliseconds_of = re.compile(MILLISECONDS).fullmatch


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines are nanoseconds after arrival, `hedge_after_ns` after it was sent to a worker."""

    band: int
    band_name: str
    weight: float
    is_sheddable: bool
    first_token_ns: int
    total_ns: int
    is_first_token_own: bool = False
    """The client asked for a shorter one than the gateway's."""
    is_total_own: bool = False
    may_resume: bool = False
    hedge_after_ns: int | None = None


def agree(identity: Identity, call: Call, tenant: Tenant, table: TenantTable, limits: Limits) -> Terms | RequestError:
    """What the client asked for, within what its tenant may have and what the gateway gives."""
    if identity.priority is None:
        band = table.band_number(tenant, call.priority)
    else:
        band = table.band_number(tenant, identity.priority, telemetry.PRIORITY)
    if isinstance(band, RequestError):
        return band
    first_token_ns = _milliseconds(telemetry.TTFT_MS, identity.ttft_ms, limits.first_token_s)
    if isinstance(first_token_ns, RequestError):
        return first_token_ns
    total_ns = _milliseconds(telemetry.DEADLINE_MS, identity.deadline_ms, limits.total_s)
    if isinstance(total_ns, RequestError):
        return total_ns
    first_token_ns = min(first_token_ns, total_ns)
    return Terms(
        band=band,
        band_name=table.bands[band].name,
        weight=tenant.weight,
        is_sheddable=table.bands[band].is_sheddable,
        first_token_ns=first_token_ns,
        total_ns=total_ns,
        is_first_token_own=first_token_ns < int(limits.first_token_s * 1e9),
        is_total_own=total_ns < int(limits.total_s * 1e9),
        may_resume=tenant.resume,
        hedge_after_ns=None if tenant.hedge_after_ms is None else tenant.hedge_after_ms * 1_000_000,
    )


def check_model(model: str, tenant: Tenant) -> RequestError | None:
    """May the tenant use the model?"""
    if tenant.models and model not in tenant.models:
        return Forbidden(f"model: this tenant may not use '{model}'", param="model")
    return None


def _milliseconds(header: str, value: str | None, limit_s: float) -> int | RequestError:
    """A client's deadline in nanoseconds, no longer than the gateway's own."""
    limit_ns = int(limit_s * 1e9)
    if value is None:
        return limit_ns
    if _milliseconds_of(value) is None:
        return InvalidRequest(f"{header}: must be a positive whole number of milliseconds", param=header)
    return min(limit_ns, int(value) * 1_000_000)
