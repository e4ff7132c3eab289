"""The stream of one request: what it counts, what it writes, and when it leaves both to its owner."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from gateway.answers import ChatAnswer
from gateway.stream import SIZES, TokenStream, write
from gateway.wire import Socket
from protos.core.contract import TokenLogprob


class FakeOwner:
    def __init__(self) -> None:
        self.overruns = 0
        self.heard: list[str] = []
        self.on_overrun: Callable[[], None] = self._note

    def delta(
        self, text: str, token_count: int, choice: int, logprobs: Sequence[TokenLogprob] | None, now_ns: int
    ) -> None:
        self.heard.append(text)

    def _note(self) -> None:
        self.overruns += 1


class Peer:
    """Both ends of a client's connection: ours does not block, and `queued` is what it did not take."""

    def __init__(self) -> None:
        self.ours, self.client = socket.socketpair()
        self.ours.setblocking(False)
        self.queued: list[bytes] = []
        self.on_full: Callable[[], object] = lambda: None

    def read(self) -> bytes:
        """What has come."""
        return self.client.recv(1 << 20, socket.MSG_DONTWAIT)

    def read_all(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.read():
                pass

    def queue(self, data: bytes) -> None:
        self.queued.append(data)
        self.on_full()

    def open(self, owner: FakeOwner, opening: bytes = b"<", closing: bytes = b">") -> TokenStream:
        stream = TokenStream(owner)
        stream.charged_tokens = 10
        stream.open(Socket(self.ours.fileno(), self.queue), opening, closing)
        return stream


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    with peer.ours, peer.client:
        yield peer


def tell(stream: TokenStream, text: str, count: int, now_ns: int) -> None:
    """A step of one row."""
    if chunk := stream.token(text, count, now_ns):
        write([stream], [chunk])


def dechunked(data: bytes) -> bytes:
    size, _, rest = data.partition(b"\r\n")
    assert rest[int(size, 16) :] == b"\r\n"
    return rest[: int(size, 16)]


def test_a_text_leaves_as_one_http_chunk(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    tell(stream, 'a "quoted" é\n', 2, 1)
    assert dechunked(peer.read()) == '<"a \\"quoted\\" é\\n">'.encode()


def test_a_chunk_larger_than_the_table_of_sizes_has_the_right_size(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    for length in (len(SIZES) - 5, len(SIZES) - 4, len(SIZES) - 3, 70_000):
        tell(stream, "x" * length, 1, 1)
        assert len(dechunked(peer.read())) == length + 4


def test_an_open_stream_writes_what_the_answer_would(peer: Peer) -> None:
    answer = ChatAnswer("r", "m", 1, wants_usage=True)
    stream = peer.open(FakeOwner(), *answer.text_frame(0))
    tell(stream, "hello", 1, 1)
    assert dechunked(peer.read()) == answer.chunk(0, "hello", None)


def test_a_closed_stream_and_a_row_without_text_leave_everything_to_the_owner(peer: Peer) -> None:
    owner = FakeOwner()
    stream = peer.open(owner)
    tell(stream, "", 1, 1)
    stream.close()
    tell(stream, "late", 1, 2)
    assert (owner.heard, stream.tokens) == (["", "late"], 0)
    with pytest.raises(BlockingIOError):
        peer.read()


def test_tokens_are_counted_whoever_writes_them(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    stream.count(3, 5)
    tell(stream, "a", 2, 6)
    stream.charged_tokens = 40
    assert (stream.tokens, stream.charged_tokens) == (5, 40)


def test_the_owner_hears_of_each_row_beyond_what_was_charged(peer: Peer) -> None:
    owner = FakeOwner()
    stream = peer.open(owner)
    tell(stream, "a", 10, 1)
    assert owner.overruns == 0
    tell(stream, "b", 1, 2)
    stream.count(1, 3)
    assert owner.overruns == 2
    stream.charged_tokens = 20
    tell(stream, "c", 1, 4)
    assert owner.overruns == 2


def test_the_longest_gap_is_between_tokens_and_not_before_the_first(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    stream.count(1, 1_000)
    assert stream.max_gap_ns == 0
    tell(stream, "a", 1, 1_010)
    tell(stream, "b", 1, 1_050)
    stream.count(1, 1_060)
    assert (stream.max_gap_ns, stream.last_ns) == (40, 1_060)


def test_what_the_socket_does_not_take_is_left_to_the_transport(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    sent = 0
    while not peer.queued:
        tell(stream, "x" * 10_000, 1, 1)
        sent += 1
    taken = b""
    while len(taken) + len(peer.queued[0]) < sent * len(b"2714\r\n") + sent * 10_006:
        taken += peer.read()
    assert (taken + peer.queued[0]).count(b"x" * 10_000) == sent


def test_a_broken_socket_is_the_transport_s_to_find(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    peer.client.close()
    tell(stream, "a", 1, 1)
    assert [dechunked(chunk) for chunk in peer.queued] == [b'<"a">']


def test_the_texts_of_a_step_stay_in_order_though_the_socket_takes_the_second_and_not_the_first(peer: Peer) -> None:
    stream = peer.open(FakeOwner())
    while not peer.queued:
        tell(stream, "x" * 10_000, 1, 1)
    peer.queued.clear()

    def on_full() -> None:
        stream.close()  # as its outlet does
        peer.read_all()  # and the client reads just then

    peer.on_full = on_full
    write([stream, stream], [stream.token(text, 1, 1) or b"" for text in ("first", "second")])
    assert [dechunked(chunk) for chunk in peer.queued] == [b'<"first">', b'<"second">']
