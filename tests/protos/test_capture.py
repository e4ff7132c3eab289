from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.core import journal
from protos.core.capture import (
    BLOCK_BYTES,
    CaptureItem,
    CaptureWriter,
    FullContent,
    HashedContent,
    Level,
    encode_item,
    hash_blocks,
    key_id,
    read_capture,
)
from protos.core.contract import Sampling
from protos.core.errors import CaptureError
from protos.core.record import Outcome, Phases, RequestRecord, is_partition

KEY = b"k" * 32
SECRET = "Zanzibar"


def record(**changes: object) -> RequestRecord:
    values: dict[str, object] = {
        "request_id": "r",
        "trace_id": "1" * 32,
        "span_id": "2" * 16,
        "endpoint": "/v1/chat/completions",
        "arrived_unix_ns": 5,
        "outcome": Outcome.FINISHED,
        "status": 200,
        "phases": Phases(receive=1, decode=2),
        "total_ns": 4,
        "unattributed_ns": 1,
    }
    return msgspec.convert(values | changes, RequestRecord)


def item(prompt: str = SECRET, body: bytes | None = None) -> CaptureItem:
    return CaptureItem(
        record=record(),
        body=body or msgspec.json.encode({"prompt": prompt, "stop": [SECRET]}),
        prompt=prompt.encode(),
        sampling=Sampling(max_tokens=5, stop=(SECRET,), logit_bias={7: 1.0}, stop_token_ids=(9,)),
        output=(SECRET,),
    )


def write(root: Path, items: list[CaptureItem], level: Level) -> Path:
    writer = CaptureWriter(root, id="c", writer="test", level=level, key=KEY)
    for each in items:
        writer.offer(each)
    writer.close()
    return root / "c"


@pytest.mark.parametrize("level", ["full", "hashed", "off"])
def test_record_survives_every_level(level: Level, tmp_path: Path) -> None:
    (entry,) = read_capture(write(tmp_path, [item()], level))
    assert entry.record == record()
    assert is_partition(entry.record)


def test_full_level_keeps_body_and_output_byte_for_byte(tmp_path: Path) -> None:
    body = '{"prompt": "äöü \\u0000 \\ud83d\\ude00", "n": 1.50}'.encode()
    (entry,) = read_capture(write(tmp_path, [item(body=body)], "full"))
    assert isinstance(entry.content, FullContent)
    assert bytes(entry.content.body) == body
    assert entry.content.output == (SECRET,)


def test_body_with_line_breaks_stays_one_line(tmp_path: Path) -> None:
    body = b'{\r\n  "prompt": "a\\nb",\n  "n": 1\n}'
    (entry,) = read_capture(write(tmp_path, [item(body=body)], "full"))
    assert isinstance(entry.content, FullContent)
    assert msgspec.json.decode(entry.content.body) == {"prompt": "a\nb", "n": 1}


@pytest.mark.parametrize("level", ["hashed", "off"])
def test_no_text_of_the_client_is_kept(level: Level) -> None:
    data = encode_item(item(), level, KEY)
    assert SECRET.encode() not in data
    assert KEY not in data


def test_hashed_level_keeps_what_sampling_costs(tmp_path: Path) -> None:
    (entry,) = read_capture(write(tmp_path, [item()], "hashed"))
    assert isinstance(entry.content, HashedContent)
    assert entry.content.sampling == Sampling(max_tokens=5)
    assert entry.content.prompt_bytes == len(SECRET)
    assert journal.read_manifest(tmp_path / "c").facts == {
        "level": "hashed",
        "key_id": key_id(KEY),
        "block_bytes": BLOCK_BYTES,
    }


def test_refused_request_has_no_content() -> None:
    refused = msgspec.structs.replace(item(), sampling=None, body=b"not json")
    assert msgspec.json.decode(encode_item(refused, "full", KEY))["content"] is None


@given(st.binary(max_size=2000), st.binary(max_size=2000), st.binary(max_size=1500))
def test_hashes_are_equal_exactly_as_far_as_the_blocks_are(shared: bytes, one: bytes, other: bytes) -> None:
    a, b = shared + one, shared + other
    hashes = hash_blocks(a, KEY), hash_blocks(b, KEY)
    assert [len(found) for found in hashes] == [-(-len(prompt) // BLOCK_BYTES) for prompt in (a, b)]
    for count in range(1, min(map(len, hashes)) + 1):
        same = a[: count * BLOCK_BYTES] == b[: count * BLOCK_BYTES]
        assert (hashes[0][:count] == hashes[1][:count]) == same


def test_another_key_gives_other_hashes() -> None:
    assert hash_blocks(b"a", KEY) != hash_blocks(b"a", b"other")
    assert key_id(KEY) != key_id(b"other")


def test_replay_is_no_capture(tmp_path: Path) -> None:
    writer = journal.JournalWriter[bytes](tmp_path / "r", kind="replay", id="r", writer="t", encode=bytes)
    writer.close()
    with pytest.raises(CaptureError, match="is a replay journal, not a capture"):
        list(read_capture(tmp_path / "r"))


@given(st.sampled_from([b"{}", b'{"record":1}', b'{"record":{"request_id":"r"}}', b"[]", b"null"]))
def test_entry_that_is_no_record_is_a_capture_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        writer = journal.JournalWriter[bytes](Path(folder) / "c", kind="capture", id="c", writer="t", encode=bytes)
        writer.offer(data)
        writer.close()
        with pytest.raises(CaptureError, match="entry 0"):
            list(read_capture(Path(folder) / "c"))
