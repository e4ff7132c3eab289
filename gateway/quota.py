"""What tenants may take at once and per minute: pure decisions with the time passed in.

Concurrency is counted in leases. Rates are counted over a sliding minute, exactly: a request that is refused takes
nothing, and a request that used other than its estimate is corrected when it settles.
"""

from __future__ import annotations

import collections

import msgspec

from gateway.tenants import Tenant
from protos.core.errors import Overloaded

MINUTE_NS = 60_000_000_000
DAY_NS = 24 * 60 * MINUTE_NS


class Grant(msgspec.Struct):
    """One admitted request's claim on its tenant's limits. `tokens` is an estimate until it is settled."""

    tenant: str
    at_ns: int
    day: int
    tokens: int


class _Usage:
    """One tenant's grants: running ones as a count, those of the last minute one by one."""

    __slots__ = ("day", "day_tokens", "grants", "minute_tokens", "running")

    def __init__(self) -> None:
        self.running = 0
        self.grants: collections.deque[Grant] = collections.deque()
        self.minute_tokens = 0
        self.day = 0
        self.day_tokens = 0

    def forget(self, now_ns: int, day: int) -> None:
        while self.grants and self.grants[0].at_ns <= now_ns - MINUTE_NS:
            self.minute_tokens -= self.grants.popleft().tokens
        if day != self.day:
            self.day, self.day_tokens = day, 0


class Quotas:
    """All tenants' usage. Owned by the pipeline."""

    def __init__(self) -> None:
        self._usage: dict[str, _Usage] = {}

    def tenants(self) -> list[str]:
        """Those that were ever granted anything."""
        return list(self._usage)

    def running(self, tenant: str) -> int:
        usage = self._usage.get(tenant)
        return usage.running if usage is not None else 0

    def admit(self, name: str, tenant: Tenant, tokens: int, now_ns: int, unix_ns: int) -> Grant | Overloaded:
        """Take one request with an estimate of its tokens, or say which limit is in the way."""
        usage = self._usage.setdefault(name, _Usage())
        day = unix_ns // DAY_NS
        usage.forget(now_ns, day)
        refusal = _refusal(usage, tenant, tokens, now_ns, unix_ns)
        if refusal is not None:
            return refusal
        grant = Grant(name, now_ns, day, tokens)
        usage.running += 1
        usage.grants.append(grant)
        usage.minute_tokens += tokens
        usage.day_tokens += tokens
        return grant

    def settle(self, grant: Grant, tokens: int, now_ns: int) -> None:
        """The request is over and took `tokens`. Call it once per grant."""
        usage = self._usage[grant.tenant]
        usage.running -= 1
        assert usage.running >= 0, f"tenant {grant.tenant}: a grant was settled twice"
        difference = tokens - grant.tokens
        grant.tokens = tokens
        if grant.day == usage.day:
            usage.day_tokens += difference
        if grant.at_ns > now_ns - MINUTE_NS and usage.grants and grant.at_ns >= usage.grants[0].at_ns:
            usage.minute_tokens += difference


def _refusal(usage: _Usage, tenant: Tenant, tokens: int, now_ns: int, unix_ns: int) -> Overloaded | None:
    if tenant.concurrency is not None and usage.running >= tenant.concurrency:
        return Overloaded(
            f"{tenant.concurrency} requests of this tenant are under way, its limit; retry when one is done",
            reason="tenant_concurrency",
            retry_after_s=1.0,
        )
    if tenant.requests_per_minute is not None and len(usage.grants) >= tenant.requests_per_minute:
        return Overloaded(
            f"{tenant.requests_per_minute} requests per minute is this tenant's limit",
            reason="tenant_rate",
            retry_after_s=_until_free(usage, 0, tenant.requests_per_minute - 1, now_ns),
        )
    if tenant.tokens_per_minute is not None and usage.minute_tokens + tokens > tenant.tokens_per_minute:
        return Overloaded(
            f"{tenant.tokens_per_minute} tokens per minute is this tenant's limit; this request may need {tokens}",
            reason="tenant_tokens",
            retry_after_s=_until_free(usage, tokens, tenant.tokens_per_minute, now_ns, counts_tokens=True),
        )
    if tenant.tokens_per_day is not None and usage.day_tokens + tokens > tenant.tokens_per_day:
        return Overloaded(
            f"{tenant.tokens_per_day} tokens per day is this tenant's quota",
            reason="tenant_tokens",
            retry_after_s=_seconds(DAY_NS - unix_ns % DAY_NS) if tokens <= tenant.tokens_per_day else None,
        )
    return None


def _until_free(usage: _Usage, needed: int, limit: int, now_ns: int, *, counts_tokens: bool = False) -> int | None:
    """Seconds until enough grants have left the minute; None where no minute is enough."""
    if needed > limit:
        return None
    held = usage.minute_tokens if counts_tokens else len(usage.grants)
    free_ns = now_ns
    for grant in usage.grants:
        if held + needed <= limit:
            break
        held -= grant.tokens if counts_tokens else 1
        free_ns = grant.at_ns + MINUTE_NS
    return _seconds(free_ns - now_ns)


def _seconds(duration_ns: int) -> int:
    """Rounded up: who comes back sooner is refused again."""
    return -(-duration_ns // 1_000_000_000)
