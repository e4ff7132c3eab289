from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replay.sse import SseParser

texts = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1).map(str.encode)


@given(st.lists(st.lists(texts, min_size=1, max_size=3)), st.sampled_from([b"\n", b"\r\n"]), st.data())
def test_events_come_out_whole_however_they_are_cut(events: list[list[bytes]], end: bytes, data: st.DataObject) -> None:
    wire = b"".join(b"".join(b"data: " + line + end for line in lines) + end for lines in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    parser = SseParser()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        found += parser.feed(wire[start:stop])
    assert found == [b"\n".join(lines) for lines in events]


def test_comments_ids_and_names_are_skipped() -> None:
    wire = b": keep-alive\n\nid: 1\nevent: message\ndata:{}\n\nretry: 5\n\n"
    assert SseParser().feed(wire) == [b"{}"]


@given(st.binary())
def test_anything_can_be_fed(wire: bytes) -> None:
    SseParser().feed(wire)
