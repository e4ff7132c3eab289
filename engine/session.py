"""One gateway's session: its slots, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from engine.backend import Backend, Cancel
from engine.failure import failed
from engine.outbox import Outbox
from protos.core.contract import (
    Accepted,
    EngineFrame,
    Failed,
    FailureKind,
    Finished,
    GatewayFrame,
    Host,
    Started,
    Submit,
    TokenLogprob,
)
from protos.core.errors import InvalidRequest


class Session:
    """The backend's Sink for one gateway. Owns its slots; all methods run on the event loop, without await."""

    def __init__(self, backend: Backend, model_names: Sequence[str], is_draining: bool) -> None:
        self._backend = backend
        self._model_names = model_names
        self.is_draining = is_draining
        self._cancels: dict[int, Cancel] = {}
        self._last_slot = -1
        self._host: Host | None = None
        self._wakeup = asyncio.Event()
        self._outbox = Outbox(self._wakeup.set)
        self.quiet = asyncio.Event()
        """Set while no slot is open and all that was said is written."""
        self.quiet.set()

    @property
    def open_slots(self) -> int:
        return len(self._cancels)

    def receive(self, frame: GatewayFrame, now_ns: int) -> None:
        """Act on a frame. Raises InvalidRequest where the gateway breaks the protocol."""
        if frame.hello is not None:
            raise InvalidRequest("hello may only be in the first frame of a Session")
        if frame.ping_sent_ns:
            self._outbox.pong(frame.ping_sent_ns, now_ns)
        if frame.drain:
            self.drain()
        for submit in frame.submits:
            self._submit(submit, now_ns)
        for slot in frame.cancels:
            cancel = self._cancels.get(slot)
            if cancel is not None:
                cancel()

    def drain(self) -> None:
        """Accept no more; what runs goes on. Every frame from now on says so."""
        self.is_draining = True
        self._wakeup.set()

    def beat(self, host: Host) -> None:
        """Send a frame soon, whatever happens, with the host's load."""
        self._host = host
        self._wakeup.set()

    def close(self) -> int:
        """The gateway is gone: end everything of it. Returns how many requests that were."""
        cancels = list(self._cancels.values())
        self._cancels.clear()
        for cancel in cancels:
            cancel()
        self.quiet.set()
        return len(cancels)

    async def next_frame(self) -> EngineFrame:
        """What happened since the last frame, as soon as something did; without `sent_ns`."""
        await self._wakeup.wait()
        frame = self._outbox.take()
        if not self._outbox.has_more:
            self._wakeup.clear()
        frame.load = self._backend.load()
        if self._host is not None:
            frame.load = msgspec.structs.replace(frame.load, host=self._host)
            self._host = None
        frame.draining = self.is_draining
        return frame

    def wrote(self) -> None:
        """The frame taken last is written."""
        if not self._cancels and self._outbox.is_empty:
            self.quiet.set()

    def _submit(self, submit: Submit, now_ns: int) -> None:
        if submit.slot <= self._last_slot:
            raise InvalidRequest(f"slot {submit.slot} was used before: slots of a Session must increase")
        self._last_slot = submit.slot
        self.quiet.clear()
        self._outbox.accepted(Accepted(submit.slot, now_ns))
        self._cancels[submit.slot] = _not_yet
        refusal = self._refusal(submit, now_ns)
        if refusal is not None:
            self.failed(refusal)
            return
        cancel = self._backend.submit(submit, now_ns, self)
        if submit.slot in self._cancels:
            self._cancels[submit.slot] = cancel

    def _refusal(self, submit: Submit, now_ns: int) -> Failed | None:
        if self.is_draining:
            message = "the worker is draining; try another one"
            return failed(submit, now_ns, FailureKind.UNAVAILABLE, message)
        if submit.model and submit.model not in self._model_names:
            message = f"the model '{submit.model}' does not exist; this worker has {', '.join(self._model_names)}"
            return failed(submit, now_ns, FailureKind.UNKNOWN_MODEL, message, "model")
        if submit.resumed_token_ids and submit.sampling.n > 1:
            return failed(submit, now_ns, FailureKind.INVALID, "only a request of one choice can be resumed", "n")
        return None

    # ---------------------------------------------------------------- Sink

    def started(self, started: Started) -> None:
        self._outbox.started(started)

    def delta(
        self, slot: int, text: str, token_ids: Sequence[int], choice: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> None:
        self._outbox.delta(slot, text, token_ids, choice, logprobs)

    def finished(self, finished: Finished) -> None:
        if self._cancels.pop(finished.slot, None) is not None:
            self._outbox.finished(finished)

    def failed(self, failed: Failed) -> None:
        if self._cancels.pop(failed.slot, None) is not None:
            self._outbox.failed(failed)


def _not_yet() -> None:
    """Cancel of a request that the backend has not taken yet: it is submitted without an await in between."""
