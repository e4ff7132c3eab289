"""The seam between the worker and its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from protos.core.contract import Failed, Finished, Load, ModelInfo, Started, Submit, TokenLogprob

Cancel = Callable[[], None]
"""Ends a sequence as "cancelled". Does nothing once it has ended."""


class Sink(Protocol):
    """Where a backend tells what happens to the requests of one session.

    The methods run on the event loop, never block and never raise. For each request: at most one `started`, before its
    first `delta`; then exactly one of `finished` and `failed`, and nothing after it.
    """

    def started(self, started: Started) -> None: ...

    def delta(
        self, slot: int, text: str, token_ids: Sequence[int], choice: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> None:
        """New tokens of one choice; `logprobs` has one item per token, or is None where none were asked for."""

    def finished(self, finished: Finished) -> None: ...

    def failed(self, failed: Failed) -> None: ...


class Backend(Protocol):
    """One engine with one model loaded."""

    async def start(self) -> ModelInfo:
        """Load the model. Raises ConfigError where the settings cannot work."""

    def submit(self, submit: Submit, received_ns: int, sink: Sink) -> Cancel:
        """Run a request. Never raises: what is wrong with it becomes a `failed`, perhaps before this returns."""

    def load(self) -> Load:
        """The engine's load now, without the host's."""

    async def run(self) -> str:
        """Be the engine until it dies; then every open request has got its `failed`, and the text says why."""

    async def stop(self) -> None:
        """Release what the engine holds. Open requests get no more events."""
