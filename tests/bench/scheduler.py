"""The scheduler decider on one core: random operations per second with conservation checked, a mass cancel, and what
one request costs.

    python -m tests.bench.scheduler [--operations 1000000]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import msgspec

from gateway.order import Ticket
from gateway.scheduler import Scheduler
from tests.bench import report
from tests.bench.machine import facts
from tests.gateway.fakes import model_info
from tests.virtual.traffic import Traffic

RATE_FLOOR = 100_000
QUEUED = 10_000
CANCEL_CEILING_MS = 100.0
CONCURRENT = 256
TENANTS = 20
MODEL = "m"


class Results(msgspec.Struct):
    operations: int
    operations_per_s: float
    ended: dict[str, int]
    cancel_ms: float
    request_us: float


def random_operations(count: int, seed: int = 1) -> tuple[float, Traffic]:
    """Operations per second, the driver's own work and its checks of conservation included."""
    traffic = Traffic(seed)
    started_s = time.perf_counter()
    traffic.run(count, check_every=10_000)
    seconds = time.perf_counter() - started_s
    traffic.end()
    return count / seconds, traffic


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
    run; steps of the engine, which are shared by all that run, are left out."""
    scheduler = Scheduler()
    # More than run at once: some sequences are kept for urgent requests.
    worker = model_info(names=(MODEL,), max_sequences=2 * CONCURRENT, max_batch_tokens=8_192, kv_blocks=65_536)
    scheduler.worker_joined("w", worker)
    for number in range(CONCURRENT):
        _begin(scheduler, number)
    gc.collect()
    started_s = time.perf_counter()
    for number in range(CONCURRENT, CONCURRENT + requests):
        scheduler.release(number - CONCURRENT, 64)
        _begin(scheduler, number)
    return 1e6 * (time.perf_counter() - started_s) / requests


def _begin(scheduler: Scheduler, number: int) -> None:
    now_ns = number * 1_000_000
    ticket = _ticket(number, band=1)
    scheduler.forecast(MODEL, 1, ticket.tenant, ticket.input_tokens, now_ns)
    scheduler.enqueue(ticket)
    placed = scheduler.place(now_ns).placed
    assert [placement.ticket.request for placement in placed] == [number]
    scheduler.started(number, now_ns)


def _ticket(number: int, band: int) -> Ticket:
    return Ticket(
        request=number,
        model=MODEL,
        tenant=f"tenant-{number % TENANTS}",
        band=band,
        input_tokens=500,
        output_tokens=64,
        size_bytes=2_000,
        arrived_ns=number,
        deadline_ns=10**15 + number,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    arguments = parser.parse_args()
    report.print_facts("scheduler", facts())
    rate, traffic = random_operations(arguments.operations)
    ended = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(traffic.ended.items()))
    report.console.print(f"{arguments.operations:,} operations, {traffic.arrived:,} requests: {ended}; nothing held")
    results = Results(arguments.operations, rate, dict(traffic.ended), mass_cancel_ms(), request_us())
    report.print_verdict("random operations per second", results.operations_per_s, RATE_FLOOR, at_most=False)
    report.print_verdict(
        f"cancel of {QUEUED:,} queued requests, ms", results.cancel_ms, CANCEL_CEILING_MS, at_most=True
    )
    report.console.print(f"scheduler work per request: {results.request_us:.1f} us")
    report.console.print(f"written to {report.write('scheduler', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
