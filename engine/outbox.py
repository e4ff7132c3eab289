"""Frames for one session, in the making: what happens until the socket takes the next frame travels together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from protos.core.contract import Accepted, Deltas, EngineFrame, Failed, Finished, Started, TokenLogprob

MAX_ROWS = 16_384
"""Rows of a frame, so that a gateway that reads nothing for minutes still gets messages that it can take."""


class Outbox:
    """Collects events; `wake` is called for those that should leave soon, and should be cheap and do nothing twice."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._full: deque[EngineFrame] = deque()
        self._frame = EngineFrame()
        self._deltas = Deltas()
        self._has_choices = False
        self._steps = 0

    @property
    def is_empty(self) -> bool:
        frame = self._frame
        return not (
            self._full
            or self._deltas.slots
            or frame.accepted
            or frame.started
            or frame.finished
            or frame.failed
            or frame.pong
        )

    @property
    def has_more(self) -> bool:
        """Frames are waiting that will not grow any more."""
        return bool(self._full)

    def accepted(self, accepted: Accepted) -> None:
        """Leaves with the next frame: nobody waits for it, and a frame for each would double their number."""
        self._frame.accepted.append(accepted)

    def started(self, started: Started) -> None:
        self._frame.started.append(started)
        self._wake()

    def delta(
        self, slot: int, text: str, token_ids: Sequence[int], choice: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> None:
        deltas = self._deltas
        if logprobs is not None:
            deltas.logprobs[len(deltas.slots)] = logprobs
        if choice:
            self._has_choices = True
        deltas.slots.append(slot)
        deltas.texts.append(text)
        deltas.token_counts.append(len(token_ids))
        deltas.token_ids.extend(token_ids)
        deltas.choices.append(choice)
        if len(deltas.slots) == MAX_ROWS:
            self._full.append(self._seal())
        self._wake()

    def finished(self, finished: Finished) -> None:
        self._frame.finished.append(finished)
        self._wake()

    def failed(self, failed: Failed) -> None:
        self._frame.failed.append(failed)
        self._wake()

    def pong(self, ping_sent_ns: int, received_ns: int) -> None:
        """Answer a ping; of several between two frames the last one counts."""
        self._frame.pong = (ping_sent_ns, received_ns)
        self._wake()

    def take(self) -> EngineFrame:
        """The oldest frame, without load and stamps; an empty one where nothing happened."""
        return self._full.popleft() if self._full else self._seal()

    def _seal(self) -> EngineFrame:
        frame = self._frame
        if self._deltas.slots:
            if not self._has_choices:
                self._deltas.choices = []
            self._steps += 1
            frame.deltas = self._deltas
            frame.step = self._steps
            self._deltas = Deltas()
            self._has_choices = False
        self._frame = EngineFrame()
        return frame
