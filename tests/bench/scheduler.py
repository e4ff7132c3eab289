"""The scheduler decider on one core: random operations per second, a mass cancel, and what one request costs.

The operations are those of `tests.virtual.traffic`, which checks the conservation of requests and leases meanwhile.
Each is made on a first scheduler, unmeasured, with what it called written down; then the same calls are timed on a
second one, which has to answer the same. So neither the drawing nor the checks are in the time, and all that the
decider does is.

The mass cancel is timed in the decider, and again through a whole gateway: see `tests.bench.mass_cancel`.

    python -m tests.bench.scheduler [--operations 1000000]
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec

from gateway.forecast import Forecast
from gateway.order import Ticket
from gateway.router import Worker
from gateway.scheduler import Scheduler
from protos.core.contract import Load
from tests.bench import report
from tests.bench.machine import facts
from tests.bench.mass_cancel import MassCancel, cancel_all
from tests.gateway.fakes import model_info
from tests.virtual.traffic import TOKEN_TARGET_NS, Traffic

RATE_FLOOR = 100_000
PIECE = 10_000
"""Operations that are recorded, then replayed."""
QUEUED = 10_000
CANCEL_CEILING_MS = 100.0
CONCURRENT = 256
ROUNDS = 5
ASKED_BY_CHECKS = {"queued_in", "depths"}
TENANTS = 20
MODEL = "m"
INPUT_TOKENS = 500
STEP_NS = 1_000_000


class Results(msgspec.Struct, kw_only=True):
    operations: dict[str, int]
    calls: int
    operations_per_s: float
    ended: dict[str, int]
    cancel_ms: float
    request_us: float
    through_gateway: MassCancel


class Recording:
    """A scheduler whose calls are written down as calls of its twin."""

    def __init__(self, scheduler: Scheduler, twin: Scheduler) -> None:
        self.calls: list[functools.partial[Any]] = []
        self.answers: list[Any] = []
        self._scheduler = scheduler
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._scheduler, name)
        is_work = callable(value) and name not in ASKED_BY_CHECKS
        return functools.partial(self._call, name, value) if is_work else value

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(functools.partial(getattr(self._twin, name), *args, **kwargs))
        self.answers.append(method(*args, **kwargs))
        return self.answers[-1]

    def replay_s(self) -> float:
        """Seconds of CPU that the twin takes for what was written down since the last time."""
        calls, expected = self.calls, self.answers
        self.calls, self.answers = [], []
        empty = [functools.partial(_nothing, *call.args, **call.keywords) for call in calls]
        elapsed_s, answers = _timed(calls)
        calling_s, _ = _timed(empty)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer == wanted or isinstance(answer, Worker), f"{answer} in place of {wanted}"
        return elapsed_s - calling_s


def _timed(calls: Sequence[functools.partial[Any]]) -> tuple[float, list[Any]]:
    """Seconds of CPU, and the answers. What is written down is not the decider's garbage to walk."""
    gc.collect()
    gc.freeze()
    started_s = time.thread_time()
    answers = [call() for call in calls]
    elapsed_s = time.thread_time() - started_s
    gc.unfreeze()
    return elapsed_s, answers


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A call that does nothing takes the time that is not the decider's."""


class RandomRun(msgspec.Struct):
    traffic: Traffic
    seconds: float = 0.0
    calls: int = 0

    @property
    def operations_per_s(self) -> float:
        return self.traffic.operations.total() / self.seconds


def random_operations(count: int, seed: int = 1) -> RandomRun:
    """At least so many that had something to do; the decider's own time for them."""
    recording = Recording(Scheduler(TOKEN_TARGET_NS), Scheduler(TOKEN_TARGET_NS))
    run = RandomRun(Traffic(seed, cast(Scheduler, recording)))
    while run.traffic.operations.total() < count:
        run.traffic.run(PIECE)
        run.calls += len(recording.calls)
        run.seconds += recording.replay_s()
    run.traffic.end()
    recording.replay_s()
    return run


def mass_cancel_ms() -> float:
    """Taking QUEUED requests of many tenants and bands out of the queue, in the order in which they came."""
    scheduler = Scheduler()
    for number in range(QUEUED):
        scheduler.enqueue(_ticket(number, band=number % 3))
    started_s = time.perf_counter()
    for number in range(QUEUED):
        scheduler.withdraw(number)
    elapsed_ms = 1e3 * (time.perf_counter() - started_s)
    assert scheduler.queued == 0
    return elapsed_ms


def request_us(requests: int = 20_000) -> float:
    """Microseconds of scheduler work per request: forecast, enqueue, place, first token and release, while CONCURRENT
    run; steps of the engine, which are shared by all that run, are left out. The median of ROUNDS."""
    return statistics.median(_request_us(requests) for _ in range(ROUNDS))


def _request_us(requests: int) -> float:
    scheduler = Scheduler()
    # More than run at once: some sequences are kept for urgent requests.
    worker = model_info(names=(MODEL,), max_sequences=2 * CONCURRENT, max_batch_tokens=8_192, kv_blocks=65_536)
    scheduler.worker_joined("w", worker)
    for number in range(CONCURRENT):
        _begin(scheduler, number)
        scheduler.worker_reported("w", Load(running=number + 1), is_draining=False)
        scheduler.stepped("w", number * STEP_NS + STEP_NS // 2)
    assert scheduler.forecast(MODEL, 1, "tenant-0", INPUT_TOKENS, CONCURRENT * STEP_NS) is not None, "it is warm"
    gc.collect()
    started_s = time.perf_counter()
    for number in range(CONCURRENT, CONCURRENT + requests):
        scheduler.release(number - CONCURRENT, 64)
        _begin(scheduler, number)
    return 1e6 * (time.perf_counter() - started_s) / requests


def _begin(scheduler: Scheduler, number: int) -> None:
    now_ns = number * STEP_NS
    forecast = scheduler.forecast(MODEL, 1, _tenant(number), INPUT_TOKENS, now_ns)
    scheduler.enqueue(_ticket(number, 1, now_ns, forecast))
    placed = scheduler.place(now_ns).placed
    assert [placement.ticket.request for placement in placed] == [number]
    scheduler.started(number, now_ns + 1)


def _ticket(number: int, band: int, now_ns: int = 0, forecast: Forecast | None = None) -> Ticket:
    return Ticket(
        request=number,
        model=MODEL,
        tenant=_tenant(number),
        band=band,
        input_tokens=INPUT_TOKENS,
        output_tokens=64,
        size_bytes=2_000,
        arrived_ns=now_ns,
        deadline_ns=10**15 + number,
        forecast=forecast,
    )


def _tenant(number: int) -> str:
    return f"tenant-{number % TENANTS}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    arguments = parser.parse_args()
    report.print_facts("scheduler", facts())
    run = random_operations(arguments.operations)
    print_run(run)
    traffic = run.traffic
    results = Results(
        operations=dict(traffic.operations),
        calls=run.calls,
        operations_per_s=run.operations_per_s,
        ended=dict(traffic.ended),
        cancel_ms=mass_cancel_ms(),
        request_us=request_us(),
        through_gateway=cancel_all(QUEUED),
    )
    report.print_verdict("random operations per second", results.operations_per_s, RATE_FLOOR, at_most=False)
    report.print_verdict(
        f"cancel of {QUEUED:,} queued requests, ms", results.cancel_ms, CANCEL_CEILING_MS, at_most=True
    )
    cancel = results.through_gateway
    report.console.print(
        f"cancel of {cancel.requests:,} queued requests through the gateway: nothing held {cancel.empty_ms:.0f} ms "
        f"after the first socket closed, {cancel.empty_ms - cancel.closing_ms:.0f} ms after the last one; "
        f"{cancel.cpu_ms:.0f} ms of CPU"
    )
    report.console.print(f"scheduler work per request: {results.request_us:.1f} us")
    report.console.print(f"written to {report.write('scheduler', results)}")
    return 0


def print_run(run: RandomRun) -> None:
    operations, ended = run.traffic.operations, run.traffic.ended
    mix = ", ".join(f"{count / operations.total():.1%} {name}" for name, count in operations.most_common())
    ends = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(ended.items()))
    report.console.print(f"{operations.total():,} operations: {mix}; {run.calls:,} calls")
    report.console.print(f"{run.traffic.arrived:,} requests: {ends}; conservation checked, nothing held")


if __name__ == "__main__":
    sys.exit(main())
