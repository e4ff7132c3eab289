"""Frames in the making."""

from __future__ import annotations

from engine import outbox as module
from engine.outbox import Outbox
from protos.core.contract import NO_STAMPS, Accepted, Started, TokenLogprob


def make() -> tuple[Outbox, list[None]]:
    wakes: list[None] = []
    return Outbox(lambda: wakes.append(None)), wakes


def test_everything_until_the_next_take_is_one_frame() -> None:
    outbox, wakes = make()
    outbox.accepted(Accepted(1, 10))
    outbox.started(Started(1, 3, 0, NO_STAMPS))
    outbox.delta(1, "a", (7,), 0, None)
    outbox.delta(2, "bc", (8, 9), 0, None)
    frame = outbox.take()
    assert len(wakes) == 3, "what was accepted waits for company"
    assert frame.step == 1
    assert frame.deltas is not None
    assert (frame.deltas.slots, frame.deltas.texts) == ([1, 2], ["a", "bc"])
    assert (frame.deltas.token_counts, frame.deltas.token_ids) == ([1, 2], [7, 8, 9])
    assert frame.deltas.choices == []
    assert outbox.is_empty


def test_choices_are_sent_once_one_row_needs_them() -> None:
    outbox, _ = make()
    outbox.delta(1, "a", (7,), 0, None)
    outbox.delta(1, "b", (8,), 1, (TokenLogprob("b", -1.0, b"b"),))
    deltas = outbox.take().deltas
    assert deltas is not None
    assert deltas.choices == [0, 1]
    assert list(deltas.logprobs) == [1]
    outbox.delta(1, "c", (9,), 0, None)
    deltas = outbox.take().deltas
    assert deltas is not None
    assert deltas.choices == []


def test_frames_without_deltas_do_not_count_as_steps() -> None:
    outbox, _ = make()
    assert outbox.take().step == 0
    outbox.delta(1, "a", (7,), 0, None)
    assert outbox.take().step == 1


def test_no_frame_grows_beyond_its_limit(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    outbox, _ = make()
    for number in range(10):
        outbox.delta(1, str(number), (number,), 0, None)
    frames = []
    while not outbox.is_empty:
        frames.append(outbox.take().deltas)
    assert [deltas.texts for deltas in frames if deltas] == [list("0123"), list("4567"), list("89")]
