"""What routing by prefix is worth, with the gateway's own scheduler over simulated engines in virtual time."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import msgspec

from engine.sim.parameters import SimParameters
from gateway import router
from tests.bench.routing import BLOCK_TOKENS, Turn, least_loaded, play_sessions, play_unique, read_sessions
from tests.virtual.harness import SECOND_NS, Gateway

ENGINE = SimParameters(
    step_us=19_000, prefill_token_us=172, prefill_pair_ns=4.8, decode_us=30, kv_token_ns=102, kv_blocks=4_000
)


def fleet() -> Gateway:
    return Gateway(ENGINE, workers=4, max_sequences=32)


def chats(count: int) -> list[list[Turn]]:
    """Ten turns each: what the session begins with, then a question and an answer more per turn."""
    draw = random.Random(3)
    sessions = []
    for _ in range(count):
        content = tuple(draw.getrandbits(62) for _ in range(800))
        length, turns = draw.randint(50, 250), []
        for _ in range(10):
            turns.append(
                Turn(
                    think_ns=draw.randint(1, 15) * SECOND_NS,
                    prompt_tokens=length * BLOCK_TOKENS + 1,
                    output_tokens=5 * BLOCK_TOKENS,
                    blocks=content[: length + 5],
                )
            )
            length += 5 + draw.randint(5, 40)
        sessions.append(turns)
    return sessions


def test_turns_of_sessions_get_their_first_token_in_half_the_time_of_least_loaded() -> None:
    sessions = chats(40)
    base = play_sessions(sessions, 0.4, 240, least_loaded, fleet)
    ours = play_sessions(sessions, 0.4, 240, router.choose, fleet)
    assert ours.mean_ttft_ns <= 0.5 * base.mean_ttft_ns
    assert ours.cached_share > base.cached_share + 0.15
    assert abs(ours.expected_share - ours.cached_share) < 0.05


def test_prompts_that_share_nothing_wait_no_longer_than_with_least_loaded() -> None:
    base = play_unique(8, 90, least_loaded, fleet)
    ours = play_unique(8, 90, router.choose, fleet)
    assert ours.mean_ttft_ns <= 1.03 * base.mean_ttft_ns
    assert ours.requests == base.requests
    assert ours.expected_share == 0


def test_trace_becomes_sessions_whose_turns_share_blocks(tmp_path: Path) -> None:
    def request(tokens: int, out: int, *runs: tuple[int, int], **more: Any) -> dict[str, Any]:
        return {"in": tokens, "out": out, "hash_rle": runs, "type": "n", "think_time": 2.0, "t": 0, **more}

    requests = [request(640, 128, (1, 10)), request(896, 64, (1, 14)), request(10**6, 64, (1, 15_625))]
    lines = [{"id": name, "tool_tokens": 128, "requests": requests} for name in ("a", "b")]
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(msgspec.json.encode, lines))))
    a, b = read_sessions(path, context_tokens=1_000)
    assert [(turn.prompt_tokens, turn.output_tokens, turn.think_ns) for turn in a] == [
        (160, 32, 2 * SECOND_NS),
        (224, 16, 2 * SECOND_NS),
    ]
    assert len(a[0].blocks) == 12, "ten of the prompt, and two of the answer, as the next prompt tells"
    assert a[0].blocks == a[1].blocks[:12]
    assert a[0].blocks[:2] == b[0].blocks[:2], "both have the same tools"
    assert not set(a[0].blocks[2:]) & set(b[0].blocks[2:])
