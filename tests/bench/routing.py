"""Mean TTFT by routing policy, in virtual time: the gateway's router against least-loaded, over simulated engines.

    python -m tests.bench.routing kvct_sessions_dev.jsonl.gz

Two workloads over four workers. *Sessions* have the shapes of a trace of kv-cache-tester (Claude Code sessions; block
hashes, lengths, think times), shrunk to the context of the engine; a turn comes when the last one has been answered and
its think time has passed. *Unique* prompts share nothing. Both policies get the same arrivals.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import itertools
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from engine import profile as profiles
from engine.settings import EngineSettings
from gateway import router
from gateway.order import Ticket
from gateway.router import Route, Worker
from protos.core import settings as settings_loader
from tests.virtual.harness import SECOND_NS, Arrival, Gateway, Result

TRACE_BLOCK_TOKENS = 64
SHRINK = 4
"""A block of the trace becomes a KV block of the engine: 64 tokens are 16."""
BLOCK_TOKENS = TRACE_BLOCK_TOKENS // SHRINK
LONGEST_THINK_S = 300.0


class _Turn(msgspec.Struct):
    tokens: int = msgspec.field(name="in", default=0)
    out: int = 0
    think_time: float | None = None
    hash_rle: list[tuple[int, int]] = []
    type: str = ""


class _Session(msgspec.Struct):
    id: str
    tool_tokens: int
    requests: list[_Turn]


class Turn(msgspec.Struct, frozen=True):
    """One request of a session, before it is known when the session starts."""

    think_ns: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Content of the prompt's full blocks, and of what the next prompt says that the answer was."""


def read_sessions(path: Path, context_tokens: int) -> list[list[Turn]]:
    """The sessions of a trace, each up to where it outgrows the context."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        sessions = [msgspec.json.decode(line, type=_Session) for line in file]
    return [turns for session in sessions if len(turns := _turns(session, context_tokens)) > 1]


def _turns(session: _Session, context_tokens: int) -> list[Turn]:
    requests = [turn for turn in session.requests if turn.type in ("n", "s") and turn.hash_rle]
    names = [_names(session, turn) for turn in requests]
    turns = []
    for turn, blocks, following in zip(requests, names, [*names[1:], ()], strict=True):
        prompt_tokens, output_tokens = max(1, turn.tokens // SHRINK), max(1, turn.out // SHRINK)
        if prompt_tokens + output_tokens > context_tokens:
            break
        blocks = blocks[: prompt_tokens // BLOCK_TOKENS]
        if following[: len(blocks)] == blocks:
            blocks = following[: (prompt_tokens + output_tokens) // BLOCK_TOKENS]
        think_ns = int(min(turn.think_time or 0.0, LONGEST_THINK_S) * SECOND_NS)
        turns.append(Turn(think_ns, prompt_tokens, output_tokens, blocks))
    return turns


def _names(session: _Session, turn: _Turn) -> tuple[int, ...]:
    """The trace numbers blocks per session; those of the tools are the same in all sessions with the same tools."""
    numbers = itertools.chain.from_iterable(range(first, first + count) for first, count in turn.hash_rle)
    shared = session.tool_tokens // TRACE_BLOCK_TOKENS
    return tuple(
        hash((session.tool_tokens if position < shared else session.id, number)) & (2**63 - 1)
        for position, number in enumerate(numbers)
    )


def text_of(blocks: Iterable[int], tokens: int) -> bytes:
    """A prompt's text for the gateway: four bytes a token, the same for the same blocks."""
    repeats = BLOCK_TOKENS * 4 // 8
    return b"".join(struct.pack("<Q", block) * repeats for block in blocks)[: tokens * 4]


# ---------------------------------------------------------------- policies


def least_loaded(
    workers: Iterable[Worker], ticket: Ticket, is_urgent: bool, priority: int, now_ns: int
) -> Route | None:
    """The worker with the smallest share of its slots in use."""
    free = [(worker.room / worker.model.max_sequences, worker) for worker in workers]
    share, worker = max(free, key=lambda item: item[0], default=(0.0, None))
    return Route(worker, 0.0, 0) if worker is not None and share > 0 else None


POLICIES: dict[str, router.Choose] = {"least-loaded": least_loaded, "tidegate": router.choose}


class Outcome(msgspec.Struct, frozen=True):
    """Of the requests that got a first token. Shares are of their prompts' tokens."""

    mean_ttft_ns: float
    p95_ttft_ns: int
    cached_share: float
    expected_share: float
    requests: int


def play_sessions(
    sessions: Sequence[list[Turn]], rate: float, seconds: float, policy: router.Choose, fleet: Callable[[], Gateway]
) -> Outcome:
    """Sessions begin `rate` times a second; their turns follow when the last one is answered."""
    draw = random.Random(1)
    gateway = fleet()
    gateway.scheduler.choose = policy
    rest: dict[str, Iterator[Turn]] = {}

    def turn_of(name: str, now_ns: int) -> Arrival | None:
        turn = next(rest[name], None)
        if turn is None:
            return None
        full = turn.prompt_tokens // BLOCK_TOKENS
        return Arrival(
            at_ns=now_ns + turn.think_ns,
            prompt_tokens=turn.prompt_tokens,
            output_tokens=turn.output_tokens,
            session=name,
            prompt=text_of(turn.blocks[:full], turn.prompt_tokens),
            blocks=turn.blocks,
        )

    def begin() -> Iterator[Arrival]:
        at_s = 0.0
        for number in itertools.count():
            at_s += draw.expovariate(rate)
            if at_s > seconds:
                return
            rest[f"s{number}"] = iter(draw.choice(sessions))
            if first := turn_of(f"s{number}", int(at_s * SECOND_NS)):
                yield first

    gateway.next_turn = lambda result: turn_of(result.arrival.session or "", gateway.now_ns)
    return outcome(gateway.run(begin(), until_ns=int(seconds * SECOND_NS)))


def play_unique(rate: float, seconds: float, policy: router.Choose, fleet: Callable[[], Gateway]) -> Outcome:
    """Poisson arrivals, log-normal lengths, no two prompts alike."""
    draw = random.Random(2)
    gateway = fleet()
    gateway.scheduler.choose = policy

    def arrivals() -> Iterator[Arrival]:
        at_s = 0.0
        while (at_s := at_s + draw.expovariate(rate)) < seconds:
            tokens = min(8_000, int(draw.lognormvariate(6.6, 1.0)) + 2)
            yield Arrival(
                at_ns=int(at_s * SECOND_NS),
                prompt_tokens=tokens,
                output_tokens=min(1_000, int(draw.lognormvariate(5.0, 0.8)) + 2),
                prompt=draw.randbytes(4 * tokens),
            )

    return outcome(gateway.run(arrivals()))


def outcome(results: list[Result]) -> Outcome:
    done = [result for result in results if result.first_token_ns]
    ttfts = sorted(result.ttft_ns for result in done)
    prompt_tokens = sum(result.arrival.prompt_tokens for result in done)
    return Outcome(
        mean_ttft_ns=sum(ttfts) / len(ttfts),
        p95_ttft_ns=ttfts[int(0.95 * len(ttfts))],
        cached_share=sum(result.cached_tokens for result in done) / prompt_tokens,
        expected_share=sum(result.expected_cached_tokens for result in done) / prompt_tokens,
        requests=len(done),
    )


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path, help="kvct sessions, JSON lines, perhaps gzipped")
    parser.add_argument("--profile", default="qwen3-14b-a100")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--session-rates", default="2,6,12", help="sessions that begin per minute")
    parser.add_argument("--unique-rates", default="3,9,12", help="requests per second")
    options = parser.parse_args()
    settings = _settings(options.profile)

    def fleet() -> Gateway:
        return Gateway(settings.sim, workers=options.workers, max_sequences=64, max_batch_tokens=8_192)

    seconds = options.minutes * 60
    print(f"{options.workers} simulated workers, {options.profile}, {options.minutes:g} minutes of virtual time")
    if options.trace is None or not options.trace.exists():
        print("sessions: skipped, no trace was given (see --help)")
    else:
        sessions = read_sessions(options.trace, settings.max_model_len or 32_768)
        _describe(options.trace, sessions)
        for rate in map(float, options.session_rates.split(",")):
            play = functools.partial(play_sessions, sessions, rate / 60, seconds, fleet=fleet)
            _compare(f"{rate:g} sessions/min", play)
    for rate in map(float, options.unique_rates.split(",")):
        _compare(f"unique, {rate:g}/s", functools.partial(play_unique, rate, seconds, fleet=fleet))


def _describe(trace: Path, sessions: Sequence[list[Turn]]) -> None:
    lengths = sorted(turn.prompt_tokens for turns in sessions for turn in turns)
    middle = f"{lengths[len(lengths) // 10]} to {lengths[len(lengths) * 9 // 10]}"
    print(f"sessions: {len(sessions)} of {trace.name}, {len(lengths)} turns, 80% of the prompts of {middle} tokens")


def _compare(name: str, play: Callable[..., Outcome]) -> None:
    outcomes = {policy: play(policy=choose) for policy, choose in POLICIES.items()}
    base = outcomes["least-loaded"].mean_ttft_ns
    for policy, it in outcomes.items():
        print(
            f"{name:20} {policy:13} mean TTFT {it.mean_ttft_ns / 1e6:8.0f} ms ({it.mean_ttft_ns / base:4.2f}x), "
            f"p95 {it.p95_ttft_ns / 1e6:8.0f} ms, cached {it.cached_share:4.0%} (expected {it.expected_share:4.0%}), "
            f"{it.requests} requests"
        )
    sys.stdout.flush()


def _settings(name: str) -> EngineSettings:
    return settings_loader.load(EngineSettings, "engine", file=None, environ={}, flags={}, profile=profiles.find(name))


if __name__ == "__main__":
    main()
