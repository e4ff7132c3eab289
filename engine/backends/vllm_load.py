"""vLLM's load, as its statistics tell it after each step."""

from __future__ import annotations

import time
from typing import Any

from protos.core.contract import Load


class LoadRecorder:
    """Sums up what vLLM reports per step."""

    def __init__(self) -> None:
        self.kv_blocks = 0
        self._running = 0
        self._waiting = 0
        self._kv_usage = 0.0
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._step_ns = 0
        self.stepped_ns = 0
        """End of the last step."""

    def record(self, scheduler: Any, iteration: Any, now_ns: int) -> None:
        """Take one step's statistics; either may be None."""
        # Between tokens, by the engine's own clock: the shortest is the step, however late we hear of it.
        gaps_s: list[float] = []
        if iteration is not None:
            self._preemptions += iteration.num_preempted_reqs
            gaps_s = iteration.inter_token_latencies_iter
        if scheduler is None:
            return
        if gaps_s:
            self._step_ns = int(min(gaps_s) * 1e9)
        else:
            self._step_ns = now_ns - self.stepped_ns if self._running else 0
        self.stepped_ns = now_ns
        self._running = scheduler.num_running_reqs
        self._waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
        self._kv_usage = scheduler.kv_cache_usage
        self._prefix_queries += scheduler.prefix_cache_stats.queries
        self._prefix_hits += scheduler.prefix_cache_stats.hits

    def load(self, sequences: int, queued_prefill_tokens: int) -> Load:
        """The load now. `sequences` are all that the engine has; vLLM reports nothing after an abort, so that its
        last numbers may count sequences that are gone, or miss ones that came since."""
        running = min(self._running, sequences)
        return Load(
            running=running,
            waiting=sequences - running,
            kv_blocks_used=round(self._kv_usage * self.kv_blocks) if sequences else 0,
            kv_blocks_total=self.kv_blocks,
            preemptions=self._preemptions,
            step_ns=self._step_ns,
            queued_prefill_tokens=queued_prefill_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )


def stat_logger(recorder: LoadRecorder) -> type:
    """A vLLM stat logger that feeds a recorder."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StatLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            """vLLM makes one per engine."""

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            recorder.record(scheduler_stats, iteration_stats, time.monotonic_ns())

        def log_engine_initialized(self) -> None:
            """Nothing to log."""

    return StatLogger
