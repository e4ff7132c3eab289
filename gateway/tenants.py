"""Who may ask for what: API keys, ceilings and weights of tenants.

A key is shown once, by `tidegate key new`; the configuration holds its SHA-256. Keys are random and long, so a plain
hash cannot be guessed back, and looking one up by its hash tells a stranger nothing about another.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

from protos.core import telemetry
from protos.core.errors import ConfigError, Forbidden, InvalidRequest, RequestError, Unauthenticated
from protos.core.settings import Positive

Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=60_000)]
ANONYMOUS = "anonymous"
MOST_CLAIMED = 10_000
"""Books are kept for each tenant: clients without keys share one name when they have thought of so many."""
KEY_PREFIX = "tg-"
HASH_PREFIX = "sha256:"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_is_name = re.compile(NAME_PATTERN).fullmatch
TenantName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
KeyHash = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]


class Band(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A priority band; the first one configured is the top."""

    name: TenantName
    queue_requests: Positive | None = None
    """Most requests of the band that may wait; the gateway's limit alone without it."""
    is_sheddable: bool = True
    """May be refused because a prediction says that it would be late."""


DEFAULT_BANDS = (Band(name="critical", is_sheddable=False), Band(name="standard"), Band(name="batch"))


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section [gateway.tenants.NAME]. None means no limit of its own."""

    keys: tuple[KeyHash, ...] = ()
    """"sha256:…" of each API key, as `tidegate key new` prints it."""
    weight: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)] = 1.0
    """Share of service when tenants compete."""
    priority: str | None = None
    """Band of requests that ask for none; the second band without it, or the ceiling where that is lower."""
    max_priority: str | None = None
    """Highest band that the tenant may use; the second one without it."""
    concurrency: Positive | None = None
    """Requests in the gateway at once, waiting or running."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Prompt and output tokens."""
    tokens_per_day: Positive | None = None
    """Quota of the UTC day, counted by this gateway since it started."""
    models: tuple[str, ...] = ()
    """Models that the tenant may use; all of them when empty."""
    resume: bool = False
    """Answers whose worker is lost go on from their last token on another one, where that is exact."""
    hedge_after_ms: Milliseconds | None = None
    """A request without a first token so long after it was sent to a worker is sent to a second one too; see
    `gateway.hedge`. Never without it."""


class TenantTable:
    """The configured tenants. Frozen: a reload makes a new one."""

    def __init__(self, bands: Iterable[Band], tenants: Mapping[str, Tenant]) -> None:
        """Raises ConfigError when a band or a key does not fit."""
        self.bands = tuple(bands)
        self.tenants = dict(tenants)
        self._band_numbers = {band.name: number for number, band in enumerate(self.bands)}
        if not self.bands or len(self._band_numbers) != len(self.bands):
            raise ConfigError("gateway.bands: needs at least one band, each name once")
        self._names_by_hash: dict[str, str] = {}
        self._claimed: set[str] = set()
        """Names that clients without keys gave themselves."""
        for name, tenant in self.tenants.items():
            self._check(name, tenant)
        self._anonymous = Tenant(max_priority=self.bands[0].name)

    def _check(self, name: str, tenant: Tenant) -> None:
        for field, band in (("priority", tenant.priority), ("max_priority", tenant.max_priority)):
            if band is not None and band not in self._band_numbers:
                known = ", ".join(self._band_numbers)
                raise ConfigError(f"gateway.tenants.{name}.{field}: no band '{band}'; known: {known}")
        for key_hash in tenant.keys:
            owner = self._names_by_hash.setdefault(key_hash, name)
            if owner != name:
                raise ConfigError(f"gateway.tenants.{name}.keys: a key of tenant '{owner}' too")

    @property
    def has_keys(self) -> bool:
        return bool(self._names_by_hash)

    def get(self, name: str) -> Tenant:
        """A tenant's settings; those of nobody in particular for a name that is not configured."""
        return self.tenants.get(name, self._anonymous)

    def authenticate(self, authorization: str | None, claimed: str | None) -> str | RequestError:
        """The tenant's name, from the Authorization header.

        Where no keys are configured, everybody is who the tenant header says; with keys, that header must be the truth.
        """
        if not self.has_keys:
            return self._trust(claimed)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return Unauthenticated("an API key is required: send 'Authorization: Bearer KEY'")
        name = self._names_by_hash.get(hash_key(key.strip()))
        if name is None:
            return Unauthenticated("the API key is not known here", code="invalid_api_key")
        if claimed is not None and claimed != name:
            return Forbidden(f"x-tidegate-tenant: the API key is not of tenant '{claimed}'")
        return name

    def _trust(self, claimed: str | None) -> str | RequestError:
        if claimed is None:
            return ANONYMOUS
        if not _is_name(claimed):
            return InvalidRequest(f"{telemetry.TENANT}: must match {NAME_PATTERN}", param=telemetry.TENANT)
        if claimed in self.tenants or claimed in self._claimed:
            return claimed
        if len(self._claimed) >= MOST_CLAIMED:
            return ANONYMOUS
        self._claimed.add(claimed)
        return claimed

    def band_number(self, tenant: Tenant, asked: str | int | None, param: str = "priority") -> int | RequestError:
        """Which band a request waits in: what it asks for in `param`, clamped to the tenant's ceiling. 0 is the top."""
        ceiling = self._number(tenant.max_priority, 1)
        if asked is None:
            return max(ceiling, self._number(tenant.priority, 1))
        number = asked if isinstance(asked, int) else self._band_numbers.get(asked, -1)
        if not 0 <= number < len(self.bands):
            known = ", ".join(band.name for band in self.bands)
            return InvalidRequest(f"{param}: no band '{asked}'; known: {known}", param=param)
        return max(ceiling, number)

    def _number(self, name: str | None, default: int) -> int:
        return min(default, len(self.bands) - 1) if name is None else self._band_numbers[name]


def new_key() -> tuple[str, str]:
    """A fresh API key and what the configuration holds of it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()
