"""The stream of one request: what it counts, what it writes, and when it leaves both to its owner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.answers import ChatAnswer
from gateway.stream import SIZES, TokenStream
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


def open_stream(owner: FakeOwner, opening: bytes = b"<", closing: bytes = b">") -> tuple[TokenStream, list[bytes]]:
    stream, written = TokenStream(owner), list[bytes]()
    stream.charged_tokens = 10
    stream.open(written.append, opening, closing)
    return stream, written


def dechunked(data: bytes) -> bytes:
    size, _, rest = data.partition(b"\r\n")
    assert rest[int(size, 16) :] == b"\r\n"
    return rest[: int(size, 16)]


def test_a_text_leaves_as_one_http_chunk() -> None:
    stream, written = open_stream(FakeOwner())
    stream.token('a "quoted" é\n', 2, 1)
    assert dechunked(written[0]) == '<"a \\"quoted\\" é\\n">'.encode()


def test_a_chunk_larger_than_the_table_of_sizes_has_the_right_size() -> None:
    stream, written = open_stream(FakeOwner())
    for length in (len(SIZES) - 5, len(SIZES) - 4, len(SIZES) - 3, 70_000):
        stream.token("x" * length, 1, 1)
        assert len(dechunked(written[-1])) == length + 4


def test_an_open_stream_writes_what_the_answer_would() -> None:
    answer = ChatAnswer("r", "m", 1, wants_usage=True)
    stream, written = open_stream(FakeOwner(), *answer.text_frame(0))
    stream.token("hello", 1, 1)
    assert dechunked(written[0]) == answer.chunk(0, "hello", None)


def test_a_closed_stream_and_a_row_without_text_leave_everything_to_the_owner() -> None:
    owner = FakeOwner()
    stream, written = open_stream(owner)
    stream.token("", 1, 1)
    stream.close()
    stream.token("late", 1, 2)
    assert (owner.heard, written, stream.tokens) == (["", "late"], [], 0)


def test_tokens_are_counted_whoever_writes_them() -> None:
    stream, _ = open_stream(FakeOwner())
    stream.count(3, 5)
    stream.token("a", 2, 6)
    stream.charged_tokens = 40
    assert (stream.tokens, stream.charged_tokens) == (5, 40)


def test_the_owner_hears_of_each_row_beyond_what_was_charged() -> None:
    owner = FakeOwner()
    stream, _ = open_stream(owner)
    stream.token("a", 10, 1)
    assert owner.overruns == 0
    stream.token("b", 1, 2)
    stream.count(1, 3)
    assert owner.overruns == 2
    stream.charged_tokens = 20
    stream.token("c", 1, 4)
    assert owner.overruns == 2


def test_the_longest_gap_is_between_tokens_and_not_before_the_first() -> None:
    stream, _ = open_stream(FakeOwner())
    stream.count(1, 1_000)
    assert stream.max_gap_ns == 0
    stream.token("a", 1, 1_010)
    stream.token("b", 1, 1_050)
    stream.count(1, 1_060)
    assert (stream.max_gap_ns, stream.last_ns) == (40, 1_060)
