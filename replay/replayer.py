"""The root of a replay: learn the target, send the workload, write the run's folder."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from protos.core.errors import ConfigError
from protos.core.open_files import allow_open_files
from replay import progress, report, run, stats
from replay.client import Client
from replay.driver import Driver
from replay.pacer import OpenPacer, Pacer, UserPacer
from replay.result import Result
from replay.scale import compress, measure
from replay.settings import ReplaySettings
from replay.slo import parse_slo
from replay.target import ServedModel, Target, parse_models, parse_target
from replay.workload import SyntheticBody, Workload, WorkloadRequest, first_part

SWITCH_SECONDS = 0.0005
"""The journal's thread may keep the loop from running for so long; Python's own 5 ms made the loop 5 ms late at p50."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A run, decided but not begun."""

    settings: ReplaySettings
    target: Target
    requests: Sequence[WorkloadRequest]
    facts: run.RunFacts
    served: frozenset[str]

    def model_of(self, recorded: str) -> str:
        return recorded if self.settings.model is None and recorded in self.served else self.facts.model


def new_run_id() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


async def make_plan(workload: Workload, settings: ReplaySettings, run_id: str) -> Plan:
    """Asks the target what it serves. Raises ConfigError when it is not there or the workload is empty."""
    target, slo = parse_target(settings.target), parse_slo(settings.slo)
    source = workload if settings.limit_duration is None else first_part(workload, round(settings.limit_duration * 1e9))
    if not source.requests:
        raise ConfigError(f"{workload.facts.source}: nothing to replay{_why_empty(workload)}")
    scaled = compress(source, settings.speed)
    models = await ask_models(target, settings)
    model = _choose_model(models, settings, source.requests[0].model)
    facts = run.RunFacts(
        id=run_id,
        started_unix_ns=time.time_ns(),
        target=target.url,
        model=model.id,
        is_simulated=model.tidegate is not None and model.tidegate.simulated,
        driver="open" if settings.users is None else "users",
        speed=settings.speed,
        users=settings.users,
        is_length_pinned=settings.lengths == "recorded",
        planned=len(scaled.requests),
        slo=slo,
        workload=source.facts,
        source_shape=measure(source.requests),
        scaled_shape=measure(scaled.requests),
        notes=tuple(_notes(source.requests, models, model, settings)),
    )
    served = frozenset(each.id for each in models)
    return Plan(settings=settings, target=target, requests=scaled.requests, facts=facts, served=served)


def _why_empty(workload: Workload) -> str:
    reasons = ", ".join(f"{count} requests: {why}" for why, count in workload.facts.skipped.items())
    return f" ({reasons})" if reasons else ""


async def ask_models(target: Target, settings: ReplaySettings) -> tuple[ServedModel, ...]:
    """GET /v1/models. Raises ConfigError when nothing answers, or not with models."""
    client = Client(target, connect_timeout_s=settings.connect_timeout, timeout_s=settings.connect_timeout)
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    exchange = await client.get("/v1/models", headers)
    client.close()
    if not exchange.status:
        raise ConfigError(
            f"nothing answers at {target.url} ({exchange.error}); start a gateway with `tidegate up` or pass --target"
        )
    return parse_models(target, exchange.status, exchange.body)


def _choose_model(models: Sequence[ServedModel], settings: ReplaySettings, recorded: str) -> ServedModel:
    by_name = {model.id: model for model in models}
    if settings.model is not None:
        if settings.model not in by_name:
            raise ConfigError(f"--model {settings.model!r}: {settings.target} serves {', '.join(by_name)}")
        return by_name[settings.model]
    return by_name.get(recorded, models[0])


def _notes(
    requests: Sequence[WorkloadRequest], models: Sequence[ServedModel], model: ServedModel, settings: ReplaySettings
) -> list[str]:
    notes = []
    served = {each.id for each in models}
    foreign = sorted({request.model for request in requests if request.model} - served)
    if foreign and settings.model is None:
        notes.append(f"recorded with {', '.join(foreign)}, which the target does not serve: replayed with {model.id}")
    context_tokens = model.tidegate.context_tokens if model.tidegate else 0
    too_long = sum(_tokens(request) > context_tokens for request in requests) if context_tokens else 0
    if too_long:
        notes.append(f"{too_long} requests are longer than the model's context of {context_tokens} tokens")
    return notes


def _tokens(request: WorkloadRequest) -> int:
    prompt_tokens = request.body.prompt_tokens if isinstance(request.body, SyntheticBody) else 0
    return prompt_tokens + (request.output_tokens or 0)


def _make_pacer(plan: Plan) -> Pacer:
    settings = plan.settings
    if settings.users is None:
        return OpenPacer(plan.requests)
    think_ns = None if settings.think_time is None else round(settings.think_time * 1e9)
    return UserPacer(plan.requests, users=settings.users, spawn_rate=settings.spawn_rate, think_ns=think_ns)


async def perform(plan: Plan, directory: Path, console: Console) -> stats.Summary:
    """Send everything, then write the report. SIGINT and SIGTERM, also repeated, end the sending, not the report."""
    journal = run.open_journal(directory, plan.facts)
    settings = plan.settings
    client = Client(plan.target, connect_timeout_s=settings.connect_timeout, timeout_s=settings.timeout)
    driver = Driver(
        plan.requests,
        _make_pacer(plan),
        client,
        model_of=plan.model_of,
        api_key=settings.api_key,
        is_length_pinned=plan.facts.is_length_pinned,
        # Of its own for each run: else a run finds the prompts of the one before in the target's prefix cache.
        salt=plan.facts.id,
        on_result=_offer_to(journal.offer),
    )
    with _signals_to(driver.interrupt):
        started_ns = time.monotonic_ns()
        try:
            await _drive(driver, console)
        finally:
            client.close()
            journal.close()
        run.write_end(
            directory,
            run.RunEnd(
                is_interrupted=driver.is_interrupted,
                sent=driver.progress.sent,
                stalled_ns=driver.stalls.stalled_ns,
                longest_stall_ns=driver.stalls.longest_ns,
                duration_ns=time.monotonic_ns() - started_ns,
            ),
        )
        return write_report(directory)


@contextlib.contextmanager
def _signals_to(interrupt: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _offer_to(offer: Callable[[Result], bool]) -> Callable[[Result], None]:
    def on_result(result: Result) -> None:
        offer(result)

    return on_result


async def _drive(driver: Driver, console: Console) -> None:
    allow_open_files()
    sys.setswitchinterval(SWITCH_SECONDS)
    # What is loaded lives until the end: without this the collector walks the whole workload while requests are due.
    gc.collect()
    gc.freeze()
    try:
        async with asyncio.TaskGroup() as tasks:
            display = tasks.create_task(progress.show(driver.progress, console))
            # Its first drawing on a terminal takes tens of milliseconds: before the schedule starts, not in it.
            await asyncio.sleep(0)
            await driver.run()
            display.cancel()
    finally:
        gc.unfreeze()


def write_report(directory: Path) -> stats.Summary:
    """summary.json, report.txt and requests.parquet out of the run's journal. Raises CaptureError."""
    found = run.read_run(directory)
    summary = stats.summarize(found)
    run.write_file(directory / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=1))
    run.write_file(directory / "report.txt", report.render(summary).encode())
    report.write_parquet(found.results, directory / "requests.parquet")
    return summary
