"""The capture format: one entry per request, in a journal of kind "capture".

What an entry holds of the request itself depends on the privacy level:

    full    the client's body and the text that it got
    hashed  keyed hashes of the prompt's blocks, and lengths: cache-faithful and free of text (the default)
    off     the record alone

Headers are never captured, so neither are API keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from protos.core import journal
from protos.core.contract import Sampling
from protos.core.errors import CaptureError
from protos.core.record import RequestRecord

Level = Literal["full", "hashed", "off"]
BLOCK_BYTES = 256
HASH_BYTES = 8
KIND = "capture"


class FullContent(msgspec.Struct, frozen=True, tag="full"):
    body: msgspec.Raw
    """The client's JSON body, line breaks between its tokens taken out."""
    output: tuple[str, ...] = ()
    """Text per choice, as far as it was sent."""


class HashedContent(msgspec.Struct, frozen=True, tag="hashed", omit_defaults=True):
    """Two prompts share their first k hashes exactly when they share their first k * block_bytes bytes."""

    prompt_bytes: int
    block_bytes: int
    blocks: tuple[str, ...]
    """Chained keyed BLAKE2b of each block, 16 hex digits; the last block may be short."""
    sampling: Sampling
    """Without what holds text or words of the client: stop, logit_bias."""


Content = FullContent | HashedContent


class CaptureEntry(msgspec.Struct, frozen=True):
    record: RequestRecord
    content: Content | None = None


class CaptureItem(msgspec.Struct, frozen=True):
    """What the gateway hands over when a request settles. `prompt` is the prompt's bytes in canonical form."""

    record: RequestRecord
    body: bytes
    prompt: bytes
    sampling: Sampling | None
    output: tuple[str, ...] = ()


_encoder = msgspec.json.Encoder()
_entry_decoder = msgspec.json.Decoder(CaptureEntry)


def key_id(key: bytes) -> str:
    """A short name for a hash key that does not give it away."""
    return hashlib.blake2b(key, digest_size=4, person=b"tidegate-key").hexdigest()


def hash_blocks(prompt: bytes, key: bytes, block_bytes: int = BLOCK_BYTES) -> tuple[str, ...]:
    """Chained keyed hash of each block of a prompt; equal prefixes give equal hashes under the same key."""
    hashes = []
    previous = b""
    for start in range(0, len(prompt), block_bytes):
        block = prompt[start : start + block_bytes]
        previous = hashlib.blake2b(previous + block, digest_size=HASH_BYTES, key=key).digest()
        hashes.append(previous.hex())
    return tuple(hashes)


def encode_item(item: CaptureItem, level: Level, key: bytes) -> bytes:
    """One entry's JSON at a privacy level."""
    return _encoder.encode(CaptureEntry(item.record, _content(item, level, key)))


def _content(item: CaptureItem, level: Level, key: bytes) -> Content | None:
    if level == "off" or item.sampling is None:
        # A request without sampling was refused before its body was understood: there is nothing to replay.
        return None
    if level == "full":
        return FullContent(msgspec.Raw(_on_one_line(item.body)), item.output)
    sampling = msgspec.structs.replace(item.sampling, stop=(), stop_token_ids=(), logit_bias={})
    return HashedContent(len(item.prompt), BLOCK_BYTES, hash_blocks(item.prompt, key), sampling)


def _on_one_line(body: bytes) -> bytes:
    return msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body


class CaptureWriter(journal.JournalWriter[CaptureItem]):
    """Writes `root/<id>/`. `key` is for the hashed level: the same key makes two captures comparable."""

    def __init__(self, root: Path, *, id: str, writer: str, level: Level, key: bytes, **limits: Any) -> None:
        self.level = level
        super().__init__(
            root / id,
            kind=KIND,
            id=id,
            writer=writer,
            encode=lambda item: encode_item(item, level, key),
            facts={"level": level, "key_id": key_id(key) if level == "hashed" else None, "block_bytes": BLOCK_BYTES},
            **limits,
        )


def read_capture(directory: Path, on_cut: Any = None) -> Iterator[CaptureEntry]:
    """Entries of a capture in the order in which the requests settled. Raises CaptureError."""
    kind = journal.read_manifest(directory).kind
    if kind != KIND:
        raise CaptureError(f"{directory} is a {kind} journal, not a capture")
    for entry in journal.read(directory, on_cut):
        try:
            yield _entry_decoder.decode(entry.data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CaptureError(f"{directory}: entry {entry.seq}: {error}") from None
