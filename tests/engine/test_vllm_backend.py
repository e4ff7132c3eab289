"""vLLM's backend around an engine that is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from engine.backends.vllm import VllmBackend, _choose_scheduler, _makes_way, _set_environment
from engine.backends.vllm_load import LoadRecorder
from engine.outbox import MAX_ROWS
from engine.settings import EngineSettings
from protos.core.contract import Failed, FailureKind, Finished, Started, TokenLogprob
from tests.engine.peer import submit


class Ends:
    """A Sink that keeps how requests end."""

    def __init__(self) -> None:
        self.failures: list[Failed] = []

    def started(self, started: Started) -> None:
        raise AssertionError

    def delta(
        self, slot: int, text: str, token_ids: Sequence[int], choice: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> None:
        raise AssertionError

    def finished(self, finished: Finished) -> None:
        raise AssertionError

    def failed(self, failed: Failed) -> None:
        self.failures.append(failed)


async def test_request_that_comes_after_the_engines_death_fails_as_those_before_it() -> None:
    """Between the engine's death and the worker's drain; an exception there would take the whole session down."""
    backend, ends = VllmBackend(EngineSettings(), "model"), Ends()
    backend._engine = SimpleNamespace(errored=True)
    assert "gone" in await backend.run()
    cancel = backend.submit(submit(7), 1, ends)
    cancel()
    assert [(failure.slot, failure.kind) for failure in ends.failures] == [(7, FailureKind.UNAVAILABLE)]


def test_step_is_as_long_as_the_engine_says_however_late_its_statistics_are_read() -> None:
    recorder = LoadRecorder()

    def record(now_ms: int, *gaps_s: float, running: int = 2) -> int:
        scheduler = SimpleNamespace(
            num_running_reqs=running,
            num_waiting_reqs=0,
            num_skipped_waiting_reqs=0,
            kv_cache_usage=0.0,
            prefix_cache_stats=SimpleNamespace(queries=0, hits=0),
        )
        iteration = SimpleNamespace(num_preempted_reqs=0, inter_token_latencies_iter=list(gaps_s))
        recorder.record(scheduler, iteration, now_ms * 1_000_000)
        return recorder.load(2, 0).step_ns

    record(0)
    assert record(50) == 50_000_000, "prompts alone"
    assert record(90, 0.02, 0.3) == 20_000_000, "one of them was preempted"
    assert record(91, 0.02, 0.02, running=0) == 20_000_000
    assert record(500) == 0, "nobody knows when it began"


@pytest.mark.parametrize(
    ("settings", "theirs", "makes_way"),
    [
        (EngineSettings(), None, True),
        (EngineSettings(makes_way=False), None, False),
        (EngineSettings(), "their.Scheduler", False),
        (EngineSettings(step_log="steps.jsonl"), None, True),
        (EngineSettings(step_log="steps.jsonl", makes_way=False), None, False),
    ],
    ids=["ours", "turned-off", "theirs", "logged", "logged-and-turned-off"],
)
def test_prompts_make_way_where_the_scheduler_is_ours(
    settings: EngineSettings, theirs: str | None, makes_way: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scheduler = SimpleNamespace(scheduler_cls=theirs, async_scheduling=False)
    with mock.patch.dict(os.environ):
        _choose_scheduler(SimpleNamespace(scheduler_config=scheduler), settings)
    assert _makes_way(scheduler, settings) == makes_way


@pytest.mark.vllm
def test_vllm_gives_all_answers_of_a_step_at_once() -> None:
    """Else those beyond the 128th travel in a frame of their own, which the gateway takes for a step."""
    with mock.patch.dict(os.environ):
        os.environ.pop("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", None)
        _set_environment(EngineSettings())
        from vllm import envs

        assert envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE == MAX_ROWS
