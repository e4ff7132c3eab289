"""Service level objectives of a request, as `ttft=1s,tpot=100ms`."""

from __future__ import annotations

import re

import msgspec

from protos.core.errors import ConfigError
from replay.result import Fate, Result

_UNITS_NS = {"us": 1e3, "ms": 1e6, "s": 1e9}
_TERM = re.compile(r"(ttft|tpot|e2e)=(\d+(?:\.\d+)?)(us|ms|s)")


class Slo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Nanoseconds that a request may take, from its intended send; None is no limit."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None
    e2e_ns: int | None = None

    def is_met_by(self, result: Result) -> bool:
        """Only finished requests with a first token meet any. A TPOT that is undefined is not missed."""
        if result.fate is not Fate.FINISHED or result.ttft_ns is None:
            return False
        return (
            _is_within(result.ttft_ns, self.ttft_ns)
            and _is_within(result.tpot_ns, self.tpot_ns)
            and _is_within(result.e2e_ns, self.e2e_ns)
        )

    def __str__(self) -> str:
        limits = {"ttft": self.ttft_ns, "tpot": self.tpot_ns, "e2e": self.e2e_ns}
        return ",".join(f"{name}={limit / 1e6:g}ms" for name, limit in limits.items() if limit is not None)


def parse_slo(text: str) -> Slo:
    """Raises ConfigError."""
    limits: dict[str, int] = {}
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ConfigError(f"--slo {term!r}: expected terms like ttft=1s,tpot=100ms,e2e=30s")
        limits[f"{match[1]}_ns"] = round(float(match[2]) * _UNITS_NS[match[3]])
    return Slo(**limits)


def _is_within(value: float | None, limit: int | None) -> bool:
    return value is None or limit is None or value <= limit
