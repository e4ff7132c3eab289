"""The tokens of one request on their way to its client: what relaying costs is here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from gateway.upstream import Tokens
from gateway.wire import Socket
from protos.core.contract import TokenLogprob

SIZES = tuple(b"%x\r\n" % size for size in range(2048))
"""Heads of HTTP chunks."""
CLOSED = -1
"""No descriptor: the system refuses to write to it."""
_encode = msgspec.json.Encoder().encode


class Owner(Protocol):
    """The request of a stream."""

    on_overrun: Callable[[], None]

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        """Anything but one more text of an open stream."""


class _Nobody:
    """Owner of a stream whose request has ended."""

    on_overrun: Callable[[], None] = staticmethod(lambda: None)

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        pass


NOBODY = _Nobody()


def _nobody(_: bytes) -> None:
    raise AssertionError("the stream has no socket")


class TokenStream:
    """Counts tokens and, while it is open, makes of their text what goes to the client's socket.

    To the socket itself, by `write`: a transport touches five objects more. What the socket does not take at once is
    the transport's, which then says that it is full, and the stream is closed.

    Small on purpose. With hundreds of streams, a step finds the memory of none of them in the processor's cache: each
    further object that a token touches costs as much as a dozen operations on one that is there.
    """

    __slots__ = (
        "_charged",
        "_closing",
        "_fixed",
        "_left",
        "_opening",
        "_owner",
        "descriptor",
        "last_ns",
        "max_gap_ns",
        "queue",
    )

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.descriptor = CLOSED
        """Of the socket, while the stream is open."""
        self.queue: Callable[[bytes], None] = _nobody
        """Takes what the socket does not."""
        self._opening = self._closing = b""
        self._fixed = 0
        self._charged = 0
        self._left = 0
        """Tokens until more have come than were charged: one number to change per token."""
        self.last_ns = 0
        """When the last tokens came; 0 before the first."""
        self.max_gap_ns = 0
        """The longest time between tokens."""

    @property
    def tokens(self) -> int:
        """That have come."""
        return self._charged - self._left

    @property
    def charged_tokens(self) -> int:
        """That the tenant was charged for; beyond them the owner's `on_overrun` is called."""
        return self._charged

    @charged_tokens.setter
    def charged_tokens(self, tokens: int) -> None:
        self._left += tokens - self._charged
        self._charged = tokens

    def open(self, socket: Socket, opening: bytes, closing: bytes) -> None:
        """Each text leaves as one HTTP chunk: `opening`, its JSON, `closing`."""
        self.descriptor, self.queue = socket
        self._opening = opening
        self._closing = closing + b"\r\n"
        self._fixed = len(opening) + len(closing)

    def close(self) -> None:
        """All that comes goes to the owner, as before `open`."""
        self.descriptor = CLOSED

    def abandon(self) -> None:
        """The request has ended: what still comes is nobody's."""
        self.close()
        self.queue = _nobody
        self._owner = NOBODY

    def token(self, text: str, count: int, now_ns: int) -> bytes | None:
        """A row of an engine's step, plain text of the first choice: what `write` is to write before anything else.

        None where the owner has it.
        """
        if self.descriptor < 0 or not text:
            self._owner.delta(text, count, 0, None, now_ns)
            return None
        left = self._left = self._left - count
        gap_ns = now_ns - self.last_ns
        if gap_ns > self.max_gap_ns:
            self.max_gap_ns = gap_ns
        self.last_ns = now_ns
        if left < 0:
            self._owner.on_overrun()
        encoded = _encode(text)
        size = self._fixed + len(encoded)
        head = SIZES[size] if size < 2048 else b"%x\r\n" % size
        return head + self._opening + encoded + self._closing

    def count(self, tokens: int, now_ns: int) -> None:
        """Tokens came that `token` did not write."""
        self._left -= tokens
        if self.last_ns:
            self.max_gap_ns = max(self.max_gap_ns, now_ns - self.last_ns)
        self.last_ns = now_ns
        if self._left < 0:
            self._owner.on_overrun()


def write(streams: Sequence[Tokens], chunks: Sequence[bytes]) -> None:
    """What the streams made of a step, one after the other, once it is all made.

    A twentieth less CPU than to make and write each in turn: the kernel's way through TCP and ours through Python do
    not fit into the processor's caches together.
    """
    for stream, chunk in zip(streams, chunks, strict=True):
        try:
            written = os.write(stream.descriptor, chunk)
        except OSError:  # full, broken, or closed with the chunk before: the transport meets the same, and acts on it
            written = 0
        if written != len(chunk):
            stream.queue(chunk[written:])
