"""What relaying costs: CPU of the proxy per token, per unary request, and memory per open stream.

The proxies have core 0, one at work at a time; source, client and trace sink share core 1. All are started before, and
take turns of a few seconds: a machine changes its speed by a quarter between minutes, so that only what was measured
side by side is compared. A turn counts only if the pace was kept (95% of the tokens that the source should have
produced) and every answer was whole.

    python -m tests.bench.relay [--rounds 5] [--only tidegate envoy]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil
import uvloop

from tests.bench import report
from tests.bench.client import Count, Load, chat_request
from tests.bench.machine import facts
from tests.bench.process import BenchError, take_priority
from tests.bench.proxies import LOAD_CORES, NAMES, PROXY_CORES, Direct, Proxy, open_proxy
from tests.bench.scheduler import request_us

STREAMS = 256
STEP_MS = 11.64
"""256 streams x one token each 11.64 ms = 22,000 tokens/s."""
LOADS = {"short": 256, "long": 1_000}
"""Tokens of an answer. As one ends the next request begins, and the starts are spread: admission, capture and tracing
are at work in both, four times as often with the short ones."""
WINDOW_S = 8.0
SETTLE_S = 1.0
PACE_FLOOR = 0.95
UNARY_CONNECTIONS = 64
UNARY_TOKENS = 8
UNARY_WINDOW_S = 4.0
OPEN_STREAMS = 2_000
OPEN_STEP_MS = 250.0
OPEN_TOKENS = 1_000
WARM_STREAMS = 64
TARGET_RATIO = 0.8
FOREIGN_CEILING = 0.10
ATTEMPTS = 3
"""Most windows for one figure: one that other processes disturbed is measured again."""
JOINED_FLOOR = 0.9
PROMPT = "Tell me, in as many words as you like, how a tide gate works and what it is good for in a river mouth. " * 3


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A proxy under steady load between two counts."""

    proxy: str
    load: str
    round: int
    tokens_per_s: float
    pace: float
    """Tokens relayed over tokens that the source should have produced."""
    cpu_us_per_token: float
    cpu_share: float
    """Of its core, by the proxy."""
    foreign_share: float
    """Of its core, by anything else."""
    answers: int
    errors: int
    error_texts: list[str]
    bytes_per_token: float
    reads_per_event: float
    """1 means that each event left by itself; less, that some were joined on the way."""
    gap_p50_ms: float
    gap_p99_ms: float

    @property
    def is_valid(self) -> bool:
        return self.pace >= PACE_FLOOR and not self.errors

    @property
    def is_clean(self) -> bool:
        return self.is_valid and self.foreign_share <= FOREIGN_CEILING


class Unary(msgspec.Struct, frozen=True, kw_only=True):
    proxy: str
    round: int
    requests_per_s: float
    requests_per_cpu_s: float
    cpu_share: float
    latency_p50_ms: float
    errors: int
    error_texts: list[str]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    proxy: str
    streams: int
    idle_bytes: int
    open_bytes: int
    kib_per_stream: float
    errors: int
    error_texts: list[str]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """That the proxy did what it is said to do besides relaying, over all answers of one process."""

    proxy: str
    answers: int
    counts: dict[str, int]


class Results(msgspec.Struct):
    facts: dict[str, str]
    direct: list[Window]
    relay: list[Window]
    unary: list[Unary]
    memory: list[Memory]
    evidence: list[Evidence]
    scheduler_request_us: float
    """Of Tidegate's own, in the figures above too: what deciding costs per request."""


class _Sample(msgspec.Struct, frozen=True):
    """Clocks read together with the load's count."""

    count: Count
    cpu_s: float
    core_busy_s: float
    core_s: float


def _sample(load: Load, proxy: Proxy | Direct) -> _Sample:
    times = psutil.cpu_times(percpu=True)[PROXY_CORES[0]]
    busy_s = sum(times[:8]) - times.idle - times.iowait
    cpu_s = 0.0 if isinstance(proxy, Direct) else proxy.process.cpu_s()
    return _Sample(load.count(), cpu_s, busy_s, sum(times[:8]))


def _chat_load(proxy: Proxy | Direct, tokens: int, connections: int, *, is_stream: bool = True) -> Load:
    request = chat_request(model=proxy.model, prompt=PROMPT, tokens=tokens, is_stream=is_stream)
    return Load(proxy.port, [request], connections)


def measure_calm_window(proxy: Proxy, load_name: str, tokens: int, number: int, patience_s: float) -> Window:
    """The first undisturbed window of ATTEMPTS, each begun when the machine is quiet; else the least disturbed one.

    Chosen by what others took of the core, never by the figure.
    """
    windows: list[Window] = []
    while len(windows) < (ATTEMPTS if patience_s else 1):
        _wait_for_quiet(patience_s)
        windows.append(uvloop.run(measure_window(proxy, load_name, tokens, number)))
        if windows[-1].is_clean:
            break
    return min(windows, key=lambda window: (not window.is_valid, window.foreign_share))


def _wait_for_quiet(patience_s: float) -> None:
    for _ in range(int(patience_s)):
        if psutil.cpu_percent(interval=1.0) <= FOREIGN_CEILING * 100:
            return


async def measure_window(proxy: Proxy | Direct, load_name: str, tokens: int, number: int) -> Window:
    load = _chat_load(proxy, tokens, STREAMS)
    await load.start(ramp_s=tokens * STEP_MS / 1e3)
    await asyncio.sleep(SETTLE_S)
    before = _sample(load, proxy)
    await asyncio.sleep(WINDOW_S)
    after = _sample(load, proxy)
    await load.stop(timeout_s=tokens * STEP_MS / 1e3 + 5.0)
    return _window(proxy.name, load_name, number, load, before, after)


def _window(name: str, load_name: str, number: int, load: Load, before: _Sample, after: _Sample) -> Window:
    whole = [answer for answer in load.answers if not answer.error]
    # Events are counted as they pass, tokens only where an answer ends. What each answer has besides tokens (role,
    # finish, usage, [DONE]) and any joined tokens are taken out with the ratio of the two over all whole answers.
    tokens_per_event = sum(answer.tokens for answer in whole) / max(1, sum(answer.events for answer in whole))
    seconds = (after.count.at_ns - before.count.at_ns) / 1e9
    events = after.count.events - before.count.events
    tokens = events * tokens_per_event
    cpu_s = after.cpu_s - before.cpu_s
    core_s = after.core_s - before.core_s
    return Window(
        proxy=name,
        load=load_name,
        round=number,
        tokens_per_s=tokens / seconds,
        pace=tokens / seconds / (STREAMS * 1e3 / STEP_MS),
        cpu_us_per_token=cpu_s / tokens * 1e6 if tokens else float("nan"),
        cpu_share=cpu_s / seconds,
        foreign_share=max(0.0, (after.core_busy_s - before.core_busy_s - cpu_s) / core_s),
        answers=len(whole),
        errors=load.errors,
        error_texts=_error_texts(load),
        bytes_per_token=(after.count.bytes - before.count.bytes) / tokens if tokens else float("nan"),
        reads_per_event=(after.count.reads - before.count.reads) / events if events else float("nan"),
        gap_p50_ms=report.quantile(load.gaps_ns, 0.5) / 1e6,
        gap_p99_ms=report.quantile(load.gaps_ns, 0.99) / 1e6,
    )


def _error_texts(load: Load) -> list[str]:
    return sorted({answer.error for answer in load.answers if answer.error})[:3]


async def measure_unary(proxy: Proxy, number: int) -> Unary:
    load = _chat_load(proxy, UNARY_TOKENS, UNARY_CONNECTIONS, is_stream=False)
    await load.start(ramp_s=0.1)
    await asyncio.sleep(SETTLE_S)
    before = _sample(load, proxy)
    await asyncio.sleep(UNARY_WINDOW_S)
    after = _sample(load, proxy)
    await load.stop(timeout_s=10.0)
    seconds = (after.count.at_ns - before.count.at_ns) / 1e9
    requests = after.count.answers - before.count.answers - (after.count.errors - before.count.errors)
    cpu_s = after.cpu_s - before.cpu_s
    latencies_ms = [(answer.last_ns - answer.sent_ns) / 1e6 for answer in load.answers if not answer.error]
    return Unary(
        proxy=proxy.name,
        round=number,
        requests_per_s=requests / seconds,
        requests_per_cpu_s=requests / cpu_s if cpu_s else float("nan"),
        cpu_share=cpu_s / seconds,
        latency_p50_ms=report.quantile(latencies_ms, 0.5),
        errors=load.errors,
        error_texts=_error_texts(load),
    )


async def measure_memory(proxy: Proxy) -> Memory:
    """Proportional set size with OPEN_STREAMS streams in progress, over that after a few were opened and closed."""
    warm = _chat_load(proxy, OPEN_TOKENS, WARM_STREAMS)
    await warm.start(ramp_s=0.2)
    await asyncio.sleep(SETTLE_S)
    warm.abort()
    await asyncio.sleep(SETTLE_S)
    idle_bytes = proxy.process.pss_bytes()
    load = _chat_load(proxy, OPEN_TOKENS, OPEN_STREAMS)
    await load.start(ramp_s=5.0)
    await _until(lambda: load.first_reads >= OPEN_STREAMS or load.errors > 0, timeout_s=20.0)
    await asyncio.sleep(2 * SETTLE_S)
    open_bytes = proxy.process.pss_bytes()
    errors = load.errors or OPEN_STREAMS - load.first_reads
    error_texts = _error_texts(load)
    load.abort()
    return Memory(
        proxy=proxy.name,
        streams=OPEN_STREAMS,
        idle_bytes=idle_bytes,
        open_bytes=open_bytes,
        kib_per_stream=(open_bytes - idle_bytes) / 1024 / OPEN_STREAMS,
        errors=errors,
        error_texts=error_texts,
    )


async def _until(is_done: Callable[[], bool], timeout_s: float) -> None:
    for _ in range(int(timeout_s / 0.1)):
        if is_done():
            return
        await asyncio.sleep(0.1)


def measure_all(names: Sequence[str], rounds: int, patience_s: float, folder: Path) -> Results:
    results = Results(facts(), [], [], [], [], [], request_us())
    direct = Direct(folder, STEP_MS)
    try:
        results.direct.append(uvloop.run(measure_window(direct, "short", LOADS["short"], 0)))
    finally:
        direct.close()
    _relay_rounds(names, rounds, patience_s, folder, results)
    for name in names:
        _unary_round(name, folder, results)
    for name in names:
        _memory_round(name, folder, results)
    return results


def _relay_rounds(names: Sequence[str], rounds: int, patience_s: float, folder: Path, results: Results) -> None:
    with contextlib.ExitStack() as stack:
        proxies = {
            name: stack.enter_context(contextlib.closing(open_proxy(name, folder / f"relay-{name}", STEP_MS)))
            for name in names
        }
        for load, tokens in LOADS.items():
            for number in range(rounds):
                # Rotated, so that no proxy always runs after the same other one.
                for name in (*names[number % len(names) :], *names[: number % len(names)]):
                    window = measure_calm_window(proxies[name], load, tokens, number, patience_s)
                    results.relay.append(window)
                    report.console.print(
                        f"  {load}, round {number}, {name}: {window.cpu_us_per_token:.1f} us/token at "
                        f"{window.tokens_per_s:,.0f} tokens/s, {window.errors} errors"
                    )
    for name, proxy in proxies.items():  # ended: what they recorded is complete
        answers = sum(window.answers for window in results.relay if window.proxy == name)
        results.evidence.append(Evidence(proxy=name, answers=answers, counts=proxy.evidence()))


def _unary_round(name: str, folder: Path, results: Results) -> None:
    proxy = open_proxy(name, folder / "unary", step_ms=1.0)
    try:
        results.unary.append(uvloop.run(measure_unary(proxy, 0)))
    finally:
        proxy.close()


def _memory_round(name: str, folder: Path, results: Results) -> None:
    proxy = open_proxy(name, folder / "memory", OPEN_STEP_MS)
    try:
        results.memory.append(uvloop.run(measure_memory(proxy)))
    finally:
        proxy.close()


def print_results(results: Results, names: Sequence[str]) -> None:
    report.print_table(
        f"Relay: {STREAMS} paced streams, {STREAMS * 1e3 / STEP_MS:,.0f} tokens/s (median of rounds, range)",
        (
            "proxy",
            "load",
            "CPU us/token",
            "pace",
            "of its core",
            "others on it",
            "bytes/token",
            "reads/event",
            "gap p99 ms",
            "errors",
        ),
        [_relay_row(results, name, load) for load in LOADS for name in names],
    )
    for direct in results.direct:
        report.console.print(
            f"Without a proxy, source and client alone: pace {direct.pace:.1%}, gap p99 {direct.gap_p99_ms:.1f} ms, "
            f"{direct.bytes_per_token:.0f} bytes/token, {direct.errors} errors"
        )
    report.console.print(
        ", ".join(f"{load}: answers of {tokens:,} tokens" for load, tokens in LOADS.items())
        + "; a new request as each ends.\n"
    )
    report.print_table(
        f"Unary: {UNARY_TOKENS} tokens per answer, {UNARY_CONNECTIONS} connections, as fast as it goes",
        ("proxy", "requests per CPU second", "requests/s", "of its core", "p50 ms", "errors"),
        [
            (
                r.proxy,
                f"{r.requests_per_cpu_s:,.0f}",
                f"{r.requests_per_s:,.0f}",
                f"{r.cpu_share:.0%}",
                f"{r.latency_p50_ms:.1f}",
                r.errors,
            )
            for r in results.unary
        ],
    )
    report.console.print(f"tidegate: the scheduler's part is {results.scheduler_request_us:.0f} us per request.\n")
    report.print_table(
        f"Memory: {OPEN_STREAMS:,} open streams (proportional set size; the kernel's socket buffers are not in it)",
        ("proxy", "KiB per stream", "idle MiB", "open MiB", "errors"),
        [
            (r.proxy, f"{r.kib_per_stream:.1f}", f"{r.idle_bytes / 2**20:.0f}", f"{r.open_bytes / 2**20:.0f}", r.errors)
            for r in results.memory
        ],
    )
    for item in results.evidence:
        if item.counts:
            counted = ", ".join(f"{count:,} {what}" for what, count in item.counts.items())
            report.console.print(f"{item.proxy}: {item.answers:,} whole answers and, counted outside it, {counted}")
    for doubt in doubts(results):
        report.console.print(f"doubt: {doubt}", style="yellow")
    for load, tokens in LOADS.items():
        what = f"CPU per token of answers of {tokens:,} tokens, Tidegate over the better of the others"
        report.print_verdict(what, ratio(results, load), TARGET_RATIO, at_most=True)


def _relay_row(results: Results, name: str, load: str) -> tuple[object, ...]:
    windows = [window for window in results.relay if (window.proxy, window.load) == (name, load)]
    good = [window for window in windows if window.is_valid]
    clean = [window for window in good if window.is_clean]
    return (
        name,
        load,
        report.spread([window.cpu_us_per_token for window in clean or good]) if good else "refused",
        _percent([window.pace for window in windows]),
        _percent([window.cpu_share for window in windows]),
        _percent([window.foreign_share for window in windows]),
        _number([window.bytes_per_token for window in windows], 0),
        _number([window.reads_per_event for window in windows], 2),
        _number([window.gap_p99_ms for window in windows], 1),
        sum(window.errors for window in windows),
    )


def _percent(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.0%}" if shares else "-"


def _number(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def ratio(results: Results, load: str) -> float | None:
    """Tidegate's CPU per token over that of the better of the others: median of rounds; None without a valid one.

    From rounds without a disturbed window where there are such: a busy core changes what each costs, and not alike.
    """
    rounds: dict[int, dict[str, Window]] = {}
    for window in results.relay:
        if window.load == load and window.is_valid:
            rounds.setdefault(window.round, {})[window.proxy] = window
    whole = [windows for windows in rounds.values() if set(windows) == set(NAMES)]
    clean = [windows for windows in whole if all(window.is_clean for window in windows.values())]
    chosen = clean or whole
    if not chosen:
        return None
    return max(
        statistics.median(windows["tidegate"].cpu_us_per_token / windows[name].cpu_us_per_token for windows in chosen)
        for name in NAMES
        if name != "tidegate"
    )


def doubts(results: Results) -> list[str]:
    """What could be wrong with the figures, as seen in them."""
    found = []
    for window in (*results.direct, *results.relay):
        where = f"{window.proxy}, {window.load}, round {window.round}"
        if window.pace < PACE_FLOOR:
            found.append(f"{where}: refused, kept only {window.pace:.1%} of the pace")
        if window.errors:
            found.append(f"{where}: refused, {window.errors} answers were not whole: {'; '.join(window.error_texts)}")
        if window.foreign_share > FOREIGN_CEILING:
            found.append(f"{where}: other processes took {window.foreign_share:.0%} of the proxy's core")
        if window.reads_per_event < JOINED_FLOOR:
            found.append(
                f"{where}: {1 - window.reads_per_event:.0%} of events arrived joined with others, which is cheaper"
            )
    for other in (*results.unary, *results.memory):
        if other.errors:
            found.append(f"{other.proxy}: {other.errors} errors: {'; '.join(other.error_texts)}")
    for item in results.evidence:
        found.extend(
            f"{item.proxy}: no {what}" for what, count in item.counts.items() if not count and "dropped" not in what
        )
    return found


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that what was started is ended
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for a quiet machine; 0: do not")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="proxies to measure")
    arguments = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        raise BenchError("the relay benchmark needs two cores: one for the proxy, one for source and client")
    has_priority = take_priority(os.getpid())
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    os.sched_setaffinity(0, LOAD_CORES)
    report.print_facts("relay", facts() | {"priority": "raised" if has_priority else "normal"})
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        results = measure_all(arguments.only, arguments.rounds, arguments.patience, Path(folder))
    print_results(results, arguments.only)
    report.console.print(f"written to {report.write('relay', results)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
