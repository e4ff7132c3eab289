"""What an engine did, step by step: the file that `tidegate engine calibrate` fits a simulated engine to.

JSON lines: what the engine is, then each step, and each request as it ends. Times are nanoseconds of one monotonic
clock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.sim.parameters import Work
from protos.core.errors import ConfigError

_log = logging.getLogger("tidegate.engine")

STEP_LOG = "TIDEGATE_STEP_LOG"
"""Path of the log, for vLLM's engine process; set by the worker for its children."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, tag_field="is", tag="engine"):
    backend: str
    model: str
    context_tokens: int
    max_sequences: int
    max_batch_tokens: int
    kv_blocks: int
    kv_block_tokens: int


class LoggedStep(msgspec.Struct, frozen=True, kw_only=True, tag_field="is", tag="step"):
    """A step, with what the engine did around it while it had work: steps of a busy engine leave no gap."""

    start_ns: int
    duration_ns: int
    work: Work


class LoggedRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="is", tag="request"):
    """One sequence, from the engine's queue to its last token."""

    arrived_ns: int
    scheduled_ns: int
    first_token_ns: int
    """0 where there was none."""
    ended_ns: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    priority: int
    step_tokens: int = 0
    """See `engine.yielding`."""
    is_cancelled: bool
    blocks: list[int]
    """Hashes of its full blocks, the answer's too: equal ones hold the same tokens after the same tokens."""


Entry = EngineFacts | LoggedStep | LoggedRequest

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


class StepLog(msgspec.Struct):
    """A log that was read, in the order of its lines."""

    engine: EngineFacts
    steps: list[LoggedStep]
    requests: list[LoggedRequest]


class StepLogWriter:
    """Appends to a file; a line is in it when `write` returns, so that a killed engine leaves whole lines.

    Where the disk takes no more the log ends, and the engine goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def write(self, *entries: Entry) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(b"".join(_encoder.encode(entry) + b"\n" for entry in entries))
        except OSError as error:
            self._file.close()
            _log.warning("the step log %s ends here: %s", self._path, error.strerror)


def create(path: Path) -> None:
    """Begin an empty log. Raises ConfigError where none can be there."""
    try:
        path.write_bytes(b"")
    except OSError as error:
        raise ConfigError(f"engine.step_log: cannot write {path}: {error.strerror}") from None


def read(path: Path) -> StepLog:
    """Read a log; a last line that was cut off is left out. Raises ConfigError naming the line that is wrong."""
    log: StepLog | None = None
    for entry in _entries(path):
        if isinstance(entry, EngineFacts):
            log = log or StepLog(entry, [], [])
        elif log is None:
            raise ConfigError(f"{path}: not a step log: it does not begin with the engine")
        elif isinstance(entry, LoggedStep):
            log.steps.append(entry)
        else:
            log.requests.append(entry)
    if log is None:
        raise ConfigError(f"{path}: the step log is empty; was it written by tidegate engine --step-log?")
    return log


def _entries(path: Path) -> Iterator[Entry]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: line {number} is not of a step log: {error}") from None
