"""One attempt of a request while it runs: where, and how to end it."""

from __future__ import annotations

import msgspec

from gateway.upstream import Upstream
from protos.core.contract import ModelInfo


class Run(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    model: ModelInfo
    upstream: Upstream
    slot: int
    """Of the upstream."""
    lease: int
    """Its number in the scheduler's books."""
    began_ns: int
    cached_tokens: int
    """Of the prompt, expected in the worker's prefix cache."""
    is_hedge: bool = False

    def cancel(self) -> None:
        """Ask the worker to stop; the sink still hears how it ended."""
        self.upstream.cancel(self.slot)
