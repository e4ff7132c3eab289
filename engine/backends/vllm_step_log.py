"""The scheduler in vLLM, writing a step log.

Runs in vLLM's engine process, which makes it by its name from `SchedulerConfig.scheduler_cls`. vLLM does not call that
interface stable: what is used here is `schedule`, `update_from_output`, `add_request` and `finish_requests` of 0.32.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from engine.backends.vllm_scheduler import YieldingAsyncScheduler, YieldingScheduler, step_tokens
from engine.sim.parameters import Work
from engine.step_log import STEP_LOG, EngineFacts, LoggedRequest, LoggedStep, StepLogWriter

HASH_BYTES = 6


class _Request:
    """One request between `add_request` and its end. `request` is vLLM's own."""

    __slots__ = ("arrived_ns", "cached_tokens", "first_token_ns", "output_tokens", "request", "scheduled_ns")

    def __init__(self, request: Any) -> None:
        self.request = request
        # vLLM stamps arrivals in the frontend, before they wait for the running step to end.
        self.arrived_ns = time.monotonic_ns() - max(0, int(1e9 * (time.time() - request.arrival_time)))
        self.scheduled_ns = 0
        self.first_token_ns = 0
        self.cached_tokens = 0
        self.output_tokens = 0


class Recorder:
    """Follows one scheduler and writes its log."""

    def __init__(self, log: StepLogWriter) -> None:
        self._log = log
        self._open: dict[str, _Request] = {}
        self._scheduled: deque[tuple[int, Work]] = deque()
        """Steps that run, the oldest first: asynchronous scheduling has several."""
        self._ended_ns = 0
        self._is_busy = False

    def added(self, request: Any) -> None:
        self._open.setdefault(request.request_id, _Request(request))

    def scheduled(self, output: Any, started_ns: int) -> None:
        if not output.total_num_scheduled_tokens:
            return
        for new in output.scheduled_new_reqs:
            request = self._open[new.req_id]
            if not request.scheduled_ns:
                request.scheduled_ns = started_ns
                request.cached_tokens = new.num_computed_tokens
        self._scheduled.append((started_ns, self._work(output.num_scheduled_tokens)))

    def updated(self, scheduled: Any, outputs: Any, is_busy: bool) -> None:
        now_ns = time.monotonic_ns()
        if scheduled.total_num_scheduled_tokens:
            started_ns, work = self._scheduled.popleft()
            start_ns = self._ended_ns if self._is_busy else max(started_ns, self._ended_ns)
            self._log.write(LoggedStep(start_ns=start_ns, duration_ns=now_ns - start_ns, work=work))
            self._ended_ns = now_ns
        self._is_busy = is_busy
        for output in (output for batch in outputs.values() for output in batch.outputs):
            self._told(output, now_ns)

    def aborted(self, request_id: str) -> None:
        if request_id in self._open:
            self._end(request_id, time.monotonic_ns(), is_cancelled=True)

    def _told(self, output: Any, now_ns: int) -> None:
        request = self._open.get(output.request_id)
        if request is None:
            return
        if output.new_token_ids:
            request.first_token_ns = request.first_token_ns or now_ns
            request.output_tokens += len(output.new_token_ids)
        if output.finish_reason is not None:
            self._end(output.request_id, now_ns, is_cancelled=False)

    def _work(self, chunks: dict[str, int]) -> Work:
        """Called after scheduling, when vLLM counts the step's tokens as computed."""
        prefill_tokens = prefill_pairs = decodes = kv_tokens = 0
        for request_id, chunk in chunks.items():
            request = self._open[request_id].request
            computed = request.num_computed_tokens - chunk
            if chunk == 1 and computed >= request.num_prompt_tokens:
                decodes += 1
                kv_tokens += computed
            else:
                prefill_tokens += chunk
                prefill_pairs += chunk * (2 * computed + chunk) // 2
        return Work(prefill_tokens, prefill_pairs, decodes, kv_tokens)

    def _end(self, request_id: str, now_ns: int, *, is_cancelled: bool) -> None:
        ended = self._open.pop(request_id)
        request = ended.request
        self._log.write(
            LoggedRequest(
                arrived_ns=ended.arrived_ns,
                scheduled_ns=ended.scheduled_ns,
                first_token_ns=ended.first_token_ns,
                ended_ns=now_ns,
                prompt_tokens=request.num_prompt_tokens,
                output_tokens=ended.output_tokens,
                cached_tokens=ended.cached_tokens,
                preemptions=request.num_preemptions,
                priority=request.priority,
                step_tokens=step_tokens(request),
                is_cancelled=is_cancelled,
                blocks=[int.from_bytes(block[:HASH_BYTES], "little") for block in request.block_hashes],
            )
        )


class _Logged:
    """Over one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        log = StepLogWriter(Path(os.environ[STEP_LOG]))
        log.write(_facts(self))
        self._recorder = Recorder(log)

    def add_request(self, request: Any) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._recorder.added(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        started_ns = time.monotonic_ns()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._recorder.scheduled(output, started_ns)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        self._recorder.updated(scheduler_output, outputs, self.has_unfinished_requests())  # type: ignore[attr-defined]
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        asked = self.requests if request_ids is None else request_ids  # type: ignore[attr-defined]
        names = [asked] if isinstance(asked, str) else list(asked)
        finished = super().finish_requests(names, finished_status)  # type: ignore[misc]
        for name in names:
            self._recorder.aborted(name)
        return finished


class LoggedScheduler(_Logged, YieldingScheduler):
    """For `async_scheduling=False`."""


class LoggedAsyncScheduler(_Logged, YieldingAsyncScheduler):
    """For `async_scheduling=True`."""


def _facts(scheduler: Any) -> EngineFacts:
    config = scheduler.vllm_config
    return EngineFacts(
        backend="vllm",
        model=config.model_config.served_model_name or config.model_config.model,
        context_tokens=config.model_config.max_model_len,
        max_sequences=config.scheduler_config.max_num_seqs,
        max_batch_tokens=config.scheduler_config.max_num_batched_tokens,
        # One block is vLLM's own, for padding.
        kv_blocks=scheduler.kv_cache_config.num_blocks - 1,
        kv_block_tokens=config.cache_config.block_size,
    )
