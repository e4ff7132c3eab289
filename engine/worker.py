"""The root of a worker process: settings in, exit status out."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import signal

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.backend import Backend
from engine.host import HostSampler
from engine.servicer import Servicer
from engine.settings import EngineSettings
from protos.core import wire
from protos.core.contract import ModelInfo
from protos.core.errors import ConfigError

_log = logging.getLogger("tidegate.engine")

BEAT_S = 1.0
FLUSH_S = 2.0
GRACE_S = 1.0
SERVER_OPTIONS = (
    *wire.CHANNEL_OPTIONS,
    # Without this two workers could share a port, each getting some of the sessions.
    ("grpc.so_reuseport", 0),
    # A gateway that vanished without a word is noticed, and its requests are aborted.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class Worker:
    """One backend behind one port. `port` is the real one where 0 was asked for."""

    def __init__(self, settings: EngineSettings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self._servicer = Servicer(backend, worker=settings.name, version=_version())
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._stop = asyncio.Event()
        self.port = 0

    @property
    def open_slots(self) -> int:
        return self._servicer.open_slots

    def stop(self) -> None:
        """Drain, then end `run`."""
        self._stop.set()

    async def open(self) -> ModelInfo | None:
        """Bind the port, then load the model: until `run`, health says NOT_SERVING.

        None where `stop` was called meanwhile. Raises ConfigError.
        """
        self._server.add_generic_rpc_handlers((self._servicer.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = (wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.port = self._bind()
        await self._server.start()
        loading = asyncio.ensure_future(self._backend.start())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
            return loading.result() if loading.done() else None
        finally:
            loading.cancel()
            stopping.cancel()

    async def run(self, model: ModelInfo) -> int:
        """Serve until `stop` or until the engine dies. Returns the exit status."""
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._beat())
            death = group.create_task(self._backend.run())
            stopping = group.create_task(self._stop.wait())
            self._servicer.serve(model)
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            await asyncio.wait([death, stopping], return_when=asyncio.FIRST_COMPLETED)
            await self._drain(death)
            for task in (beat, death, stopping):
                task.cancel()
        if stopping.cancelled():
            _log.error("%s: the engine died: %s", self._settings.name, death.result())
        return 1 if stopping.cancelled() else 0

    async def close(self) -> None:
        """Release port and engine; what still runs is aborted."""
        self._servicer.close()
        stopping = asyncio.ensure_future(self._server.stop(GRACE_S))
        await asyncio.wait([stopping], timeout=GRACE_S + FLUSH_S)
        await self._backend.stop()

    async def _drain(self, death: asyncio.Task[str]) -> None:
        """Take no more requests and let the running ones finish, or fail where the engine is dead."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._servicer.drain()
        if self.open_slots:
            _log.info("%s: draining %d requests", self._settings.name, self.open_slots)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S if death.done() else self._settings.drain_s):
                await self._servicer.quiet()

    async def _beat(self) -> None:
        sampler = HostSampler()
        try:
            while True:
                await asyncio.sleep(BEAT_S)
                self._servicer.beat(sampler.sample())
        finally:
            sampler.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", wire.SERVICE):
            await self._health.set(service, status)

    def _bind(self) -> int:
        address = f"{self._settings.host}:{self._settings.port}"
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {address}: the port is in use or the address is not this machine's; "
                "choose another with --port or --host"
            ) from None


async def serve(settings: EngineSettings, backend: Backend) -> int:
    """Run a worker until SIGTERM, SIGINT or the engine's death; a second signal ends it without draining."""
    worker = Worker(settings, backend)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _stop_once, worker)
    try:
        model = await worker.open()
        if model is None:
            return 0
        _log.warning("%s", ready_line(settings, model, worker.port))
        return await worker.run(model)
    finally:
        await worker.close()


def ready_line(settings: EngineSettings, model: ModelInfo, port: int) -> str:
    """One line for people: who serves what, on what, and where."""
    engine = "a SIMULATED engine" if model.simulated else f"vLLM {model.backend_version} ({model.device})"
    return f"{settings.name}: {model.names[0]} on {engine}, {settings.host}:{port}"


def _stop_once(worker: Worker) -> None:
    worker.stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


def _version() -> str:
    try:
        return importlib.metadata.version("tidegate")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
