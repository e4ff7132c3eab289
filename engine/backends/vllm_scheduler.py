"""vLLM's own scheduler, in which prompts make way for urgent ones: `engine.yielding` before each of its steps.

Runs in vLLM's engine process, which makes it by its name from `SchedulerConfig.scheduler_cls`. vLLM does not call that
interface stable: what is used here is `schedule`, its running and waiting requests and two of its limits, of 0.32.
"""

from __future__ import annotations

import itertools
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from engine.yielding import STEP_TOKENS, Prompt, Yielding


class MakesWay:
    """Over one of vLLM's schedulers. It takes prompts that sit a step out from those that run, and limits the step."""

    running: list[Any]
    max_num_scheduled_tokens: int
    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch_tokens = self.max_num_scheduled_tokens
        self._yielding = Yielding(self._batch_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        sitting_out = self._make_way()
        self.max_num_active_reqs -= len(sitting_out)
        try:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.running += sitting_out
            self.max_num_active_reqs += len(sitting_out)

    def _make_way(self) -> list[Any]:
        self.max_num_scheduled_tokens = self._batch_tokens
        everything = self.requests.values()  # type: ignore[attr-defined]
        if not any(map(step_tokens, everything)):
            return []
        prompts = [request for request in self.running if request.is_prefill_chunk]
        waiting = itertools.chain(self.waiting, self.kv_holding_waiting)  # type: ignore[attr-defined]
        unfinished = (
            Prompt(one.request_id, _next_tokens(one), step_tokens(one)) for one in itertools.chain(prompts, waiting)
        )
        decodes = (request for request in self.running if not request.is_prefill_chunk)
        plan = self._yielding.plan(sum(map(_next_tokens, decodes)), unfinished)
        self.max_num_scheduled_tokens = plan.budget_tokens
        sitting_out = [one for one in prompts if plan.is_urgent and step_tokens(one)]
        if sitting_out:
            self.running = [request for request in self.running if request not in sitting_out]
        return sitting_out


def step_tokens(request: Any) -> int:
    """`Submit.step_tokens`."""
    arguments = request.sampling_params.extra_args if request.sampling_params is not None else None
    return arguments.get(STEP_TOKENS, 0) if arguments else 0


def _next_tokens(request: Any) -> int:
    """What the next step would compute of it; asynchronous scheduling counts tokens before they are known."""
    left: int = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
    return max(0, left)


class YieldingScheduler(MakesWay, Scheduler):  # type: ignore[misc]
    """For `async_scheduling=False`."""


class YieldingAsyncScheduler(MakesWay, AsyncScheduler):  # type: ignore[misc]
    """For `async_scheduling=True`."""
