"""When a waiting request gets its turn on a worker: three things hold it back.

All are counted in the worker's steps. A place is free when an answer that has one ends (`gateway.departures`); a step
computes only so many tokens of prompts; and the pace of the answers (`gateway.pace`) lets prompts in as fast as steps
without one earn the time that they take.
"""

from __future__ import annotations

import math

from gateway.order import Work
from gateway.router import Worker


def wait_ns(worker: Worker, ahead: Work, share: float, priority: int, now_ns: int) -> float | None:
    """Time until it is the turn of who comes after its `share` of what is ahead; None while that is not known."""
    forecast = worker.forecast
    if not forecast.is_known:
        return None
    requests, tokens = share * ahead.requests, share * ahead.tokens
    prompts_ns = forecast.prompt_ns(tokens)
    steps = max(
        forecast.steps_until(requests + 1 - worker.room, ahead.mean_answer),
        forecast.prompt_steps(tokens, priority),
        forecast.pace.steps_until(
            forecast.pending_ns() + prompts_ns,
            prompts_ns,
            forecast.step_ns(),
            is_in_parts=forecast.makes_way and priority > 0,
        ),
    )
    return forecast.turn_ns(steps, tokens, priority, now_ns) if steps < math.inf else None
