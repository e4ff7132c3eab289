"""The gateway process: settings in, parts wired, listeners open, drained on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import ipaddress
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.app import operator_app, public_app
from gateway.fleet import Fleet
from gateway.metrics import Metrics, StateCollector
from gateway.pipeline import Pipeline
from gateway.recorder import Recorder
from gateway.reload import Reload
from gateway.sampling import TailSampler
from gateway.scheduler import Scheduler
from gateway.server import BACKLOG, Server
from gateway.settings import Capture, GatewaySettings, Tracing
from gateway.tenants import TenantTable
from gateway.tracing import SpanBuilder, TraceWriter
from protos.core import address
from protos.core.capture import CaptureWriter
from protos.core.clock import SYSTEM_CLOCK
from protos.core.errors import ConfigError, ProtocolMismatch, TidegateError
from protos.core.open_files import allow_open_files

log = logging.getLogger("tidegate.gateway")

SWITCH_SECONDS = 0.0005
"""How long a writer thread may hold the interpreter while streams wait; Python's own 5 ms is a token's time."""
GARBAGE_THRESHOLD = 50_000
"""New containers until a collection: most of them are requests in flight, and few of those ever are cycles."""


def run(settings: GatewaySettings, read: Callable[[], GatewaySettings], file: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError when it cannot start.

    `read` gives the settings anew; it is called on SIGHUP and when `file` changes.
    """
    tenants = TenantTable(settings.bands, settings.tenants)
    _check_exposure(settings, tenants)
    version = importlib.metadata.version("tidegate")
    allow_open_files()
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.ExitStack() as stack:
        public = stack.enter_context(_listen(settings.host, settings.port, "--port"))
        operator = stack.enter_context(_listen(settings.operator_host, settings.operator_port, "--operator-port"))
        capture = _open_capture(settings, version)
        if capture is not None:
            stack.callback(capture.close)
        traces = _open_traces(settings.tracing, settings.name, version)
        if traces is not None:
            stack.callback(traces.close)
        metrics = Metrics()
        recorder = Recorder(metrics, capture, traces)
        stack.callback(recorder.flush)
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                reload = Reload(read, file)
                runner.run(_serve(settings, tenants, reload, version, public, operator, metrics, recorder))
        except* TidegateError as group:
            raise _first(group) from None


async def _serve(
    settings: GatewaySettings,
    tenants: TenantTable,
    reload: Reload,
    version: str,
    public: socket.socket,
    operator: socket.socket,
    metrics: Metrics,
    recorder: Recorder,
) -> None:
    stop = asyncio.Event()
    _on_signal(stop.set)
    token_s = settings.limits.token_s
    scheduler = Scheduler(None if token_s is None else int(token_s * 1e9))
    fleet = Fleet(settings.workers, gateway=settings.name, version=version, clock=SYSTEM_CLOCK, scheduler=scheduler)
    metrics.registry.register(
        StateCollector(
            scheduler, fleet, recorder.capture_stats, recorder.trace_counts, SYSTEM_CLOCK, metrics.tenant_names
        )
    )
    async with asyncio.TaskGroup() as tasks:
        pipeline = Pipeline(
            limits=settings.limits,
            tenants=tenants,
            scheduler=scheduler,
            fleet=fleet,
            recorder=recorder,
            tasks=tasks,
            clock=SYSTEM_CLOCK,
        )
        background = [tasks.create_task(fleet.run()), tasks.create_task(reload.run(pipeline, fleet))]
        refusal = tasks.create_task(_refusal(fleet, stop))
        servers = clients, _ = (
            Server(public_app(pipeline, fleet, scheduler, settings.limits)),
            Server(operator_app(pipeline, fleet, scheduler, recorder, metrics.registry)),
        )
        running = [
            tasks.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, (public, operator), strict=True)
        ]
        # What exists now stays: without it each full collection walks all modules, and every stream waits for that.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD)
        log.info("%s: serving on %s, operators on %s", settings.name, _address(public), _address(operator))
        await stop.wait()
        clients.part()
        log.info("%s: draining %d requests", settings.name, pipeline.active)
        _on_signal(pipeline.hurry)
        await pipeline.drain(settings.limits.drain_s)
        for server in servers:
            server.should_exit = True
        await asyncio.wait(running)
        for task in (*background, refusal):
            task.cancel()
    if not refusal.cancelled() and (mismatch := refusal.result()):
        raise mismatch
    log.info("%s: stopped", settings.name)


async def _refusal(fleet: Fleet, stop: asyncio.Event) -> ProtocolMismatch | None:
    """A gateway none of whose workers speaks its protocol stops, and says why."""
    await fleet.first_answer()
    mismatch = fleet.mismatch()
    if mismatch is not None:
        stop.set()
    return mismatch


def _check_exposure(settings: GatewaySettings, tenants: TenantTable) -> None:
    """Without keys everybody who reaches the port is served, so only this machine may reach it."""
    if tenants.has_keys:
        return
    if _is_loopback(settings.host):
        log.info("no API keys are configured: everybody on this machine is served, nobody else is")
    elif settings.allow_anonymous:
        log.warning("no API keys are configured: everybody who reaches %s is served", settings.host)
    else:
        raise ConfigError(
            f"gateway.host: {settings.host} is reachable from other machines and no API keys are configured; "
            "make one with 'tidegate key new', or set gateway.allow_anonymous = true"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int, flag: str) -> socket.socket:
    """Bind before anything else starts, so that a port in use is one line."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with {flag}") from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{address.join(host, port)}"


def _open_capture(settings: GatewaySettings, version: str) -> CaptureWriter | None:
    capture = settings.capture
    if capture.dir is None:
        return None
    return CaptureWriter(
        Path(capture.dir),
        id=f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{settings.name}-{secrets.token_hex(2)}",
        writer=f"tidegate {version}",
        level=capture.level,
        key=_hash_key(capture),
    )


def _hash_key(capture: Capture) -> bytes:
    if capture.key_file is None:
        return secrets.token_bytes(32)
    try:
        key = Path(capture.key_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"gateway.capture.key_file: {capture.key_file}: {error.strerror}") from None
    if not 16 <= len(key) <= 64:
        raise ConfigError(f"gateway.capture.key_file: {capture.key_file}: must hold 16 to 64 bytes")
    return key


def _open_traces(tracing: Tracing, name: str, version: str) -> TraceWriter | None:
    if not tracing.otlp_endpoint:
        return None
    # Imported here: without an endpoint the exporter's half a second of imports is not paid.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(
        endpoint=tracing.otlp_endpoint, insecure=not tracing.otlp_endpoint.startswith("https://"), timeout=5
    )
    sampler = TailSampler(tracing.keep_ratio, tracing.keep_per_s)
    return TraceWriter(exporter, sampler, SpanBuilder(name, version), SYSTEM_CLOCK)


def _on_signal(act: Callable[[], None]) -> None:
    """What SIGINT and SIGTERM do from now on."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, act)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
