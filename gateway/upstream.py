"""The seam to a worker. The gRPC session is one implementation, the tests' fake the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from protos.core.contract import Failed, Finished, Prompt, Sampling, Started, TokenLogprob


class Tokens(Protocol):
    """Where plain text of a request's first choice goes: nearly all that a worker sends."""

    @property
    def descriptor(self) -> int:
        """Of the client's socket, where it may be written to."""

    @property
    def queue(self) -> Callable[[bytes], None]:
        """Takes what the socket does not."""

    def token(self, text: str, count: int, now_ns: int) -> bytes | None:
        """What is to be written there, if anything."""


class Sink(Protocol):
    """What a running request hears from its worker. All calls are synchronous and on the event loop.

    Exactly one of `finished`, `failed` and `lost` ends the series. Stamps are in the worker's clock; `offset_ns` is
    that clock minus ours.
    """

    @property
    def stream(self) -> Tokens: ...

    def accepted(self, received_ns: int, offset_ns: int) -> None: ...

    def started(self, event: Started, offset_ns: int) -> None: ...

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None: ...

    def finished(self, event: Finished, offset_ns: int) -> None: ...

    def failed(self, event: Failed, offset_ns: int) -> None: ...

    def lost(self, reason: str) -> None:
        """The session broke: nobody knows what the worker did since."""


class Upstream(Protocol):
    """A connected worker."""

    def submit(
        self,
        sink: Sink,
        *,
        request_id: str,
        prompt: Prompt,
        sampling: Sampling,
        model: str,
        traceparent: str,
        priority: int = 0,
        step_tokens: int = 0,
        token_ids: list[int] | None = None,
    ) -> int:
        """Send a request; returns its slot, for `cancel`.

        `priority` and `step_tokens` are those of `Submit`. `token_ids` are the output tokens that it has from another
        worker; the new ones are appended. None keeps none.
        """

    def redirect(self, slot: int, sink: Sink, token_ids: list[int] | None = None) -> None:
        """Another sink hears the slot from here on, and other token ids are kept. Ignored where its end has come."""

    def cancel(self, slot: int) -> None:
        """Ask the worker to stop; the sink still hears how it ended. Unknown slots are ignored: the end came first."""
