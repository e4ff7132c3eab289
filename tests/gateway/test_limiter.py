"""How many sequences a worker is given: less when it preempts, more again when it has room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from gateway.limiter import CUT, ROUND_STEPS, SequenceLimit
from protos.core.contract import Load
from tests.gateway.processes import GatewayProcess, Process


def load(running: int, *, waiting: int = 0, used: int = 50, preemptions: int = 0) -> Load:
    return Load(running=running, waiting=waiting, kv_blocks_used=used, kv_blocks_total=100, preemptions=preemptions)


def rounds(limit: SequenceLimit, count: int, report: Load) -> int:
    for _ in range(count * ROUND_STEPS):
        limit.stepped(report)
    return limit.value


def cut_to(value: int, most: int = 64) -> SequenceLimit:
    """A limit that a preemption has brought down to this."""
    limit = SequenceLimit(most)
    limit.stepped(load(most))
    limit.stepped(load(-int(-value // CUT), preemptions=1))
    assert limit.value == value
    return limit


def test_worker_that_does_not_preempt_gets_all_that_it_takes() -> None:
    assert rounds(SequenceLimit(64), 10, load(64, used=100)) == 64


def test_preemption_cuts_the_limit_below_what_runs() -> None:
    limit = SequenceLimit(64)
    limit.stepped(load(41, used=100))
    limit.stepped(load(40, used=99, preemptions=1))
    assert limit.value == 36


def test_preemptions_above_the_limit_say_nothing_new() -> None:
    limit = cut_to(36)
    for preemptions in range(2, 6):
        limit.stepped(load(38, waiting=1, used=100, preemptions=preemptions))
    assert limit.value == 36
    limit.stepped(load(35, waiting=1, used=100, preemptions=6))
    assert limit.value == 31


def test_preemptions_before_the_gateway_came_do_not_count() -> None:
    limit = SequenceLimit(64)
    limit.stepped(load(40, preemptions=1_000))
    assert limit.value == 64


def test_limit_recovers_to_the_most_round_by_round() -> None:
    limit = cut_to(36)
    values = [rounds(limit, 1, load(limit.value, preemptions=1)) for _ in range(30)]
    assert values[:3] == [37, 38, 39]
    assert values == sorted(values)
    assert values[-1] == 64


def test_limit_does_not_grow_while_it_is_not_reached() -> None:
    assert rounds(cut_to(36), 10, load(20, preemptions=1)) == 36


def test_limit_does_not_grow_while_the_cache_is_nearly_full() -> None:
    assert rounds(cut_to(36), 10, load(36, used=96, preemptions=1)) == 36


def test_queue_in_an_engine_whose_cache_is_full_brings_the_limit_to_what_runs() -> None:
    assert rounds(SequenceLimit(64), 1, load(24, waiting=40, used=97)) == 24


def test_queue_in_an_engine_with_room_in_its_cache_is_its_prompts_turn() -> None:
    assert rounds(SequenceLimit(64), 10, load(24, waiting=40, used=60)) == 64


def test_queue_that_empties_now_and_then_is_none() -> None:
    limit = SequenceLimit(64)
    for step in range(10 * ROUND_STEPS):
        limit.stepped(load(24, waiting=step % 8, used=97))
    assert limit.value == 64


@given(
    st.integers(1, 100),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 50), st.integers(0, 100), st.integers(0, 3)), max_size=300),
)
def test_limit_stays_within_its_bounds(most: int, least: int, reports: list[tuple[int, int, int, int]]) -> None:
    limit = SequenceLimit(most, least)
    preemptions = 0
    for running, waiting, used, preempted in reports:
        preemptions += preempted
        limit.stepped(load(running, waiting=waiting, used=used, preemptions=preemptions))
        assert min(least, most) <= limit.value <= most


def test_worker_process_that_preempts_is_given_less_and_says_so(tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text("[engine]\nmax_model_len = 512\nmax_num_seqs = 64\n[engine.sim]\nstep_ms = 2\nkv_blocks = 48\n")
    flags = ("--backend", "sim", "--profile", "instant", "--served-model-name", "m", "--port", "0")
    worker = Process(tmp_path / "worker", "engine", "--config", str(config), *flags, ready=r"127\.0\.0\.1:(\d+)")
    gateway = GatewayProcess(tmp_path / "gateway", f"127.0.0.1:{worker.wait_ready()[1]}")
    try:
        gateway.start(1)
        body = {"model": "m", "prompt": "Tell me a tale", "max_tokens": 100, "ignore_eos": True}
        with ThreadPoolExecutor(24) as clients:
            answers = [clients.submit(gateway.request, "POST", "/v1/completions", body) for _ in range(24)]
        assert [answer.result()[0] for answer in answers] == [200] * 24
        (state,) = gateway.state()["workers"]
        assert state["load"]["preemptions"] > 0
        assert 1 <= state["sequence_limit"] < 24
        metrics = gateway.request("GET", "/metrics", operator=True)[2].decode()
        sample = f'tidegate_worker_sequence_limit{{worker="{state["address"]}"}} {state["sequence_limit"]}.0'
        assert sample in metrics.splitlines()
    finally:
        gateway.kill()
        worker.kill()
