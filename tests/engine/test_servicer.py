"""The Engine service over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.backend import Cancel, Sink
from engine.backends.sim import SimBackend
from engine.failure import failed
from engine.settings import EngineSettings
from engine.sim.parameters import SimParameters
from engine.worker import Worker
from protos.core import wire
from protos.core.contract import (
    PROTOCOL,
    FailureKind,
    GatewayFrame,
    Hello,
    Host,
    Load,
    ModelInfo,
    Submit,
    TextPrompt,
)
from protos.core.errors import ConfigError
from tests.engine.peer import Running, connect, open_call, running_worker, submit


async def refused(address: str, *frames: GatewayFrame) -> grpc.aio.AioRpcError:
    """The error that ends a call after these frames."""
    async with open_call(address) as call:
        for frame in frames:
            await call.write(frame)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    return caught.value


HELLO = GatewayFrame(hello=Hello(PROTOCOL, "test", "0"))


async def test_welcome_introduces_the_worker(worker: Running) -> None:
    async with connect(worker.address) as peer:
        welcome = peer.frames[0].welcome
    assert welcome is not None
    assert (welcome.protocol, welcome.worker) == (PROTOCOL, "worker-1")
    assert len(welcome.boot_id) == 12
    assert welcome.model.simulated
    assert welcome.model.backend == "sim"


async def test_other_protocol_version_is_refused_with_what_to_do(worker: Running) -> None:
    error = await refused(worker.address, GatewayFrame(hello=Hello(PROTOCOL + 1, "test", "9")))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "upgrade the worker" in (error.details() or "")


async def test_session_must_begin_with_hello(worker: Running) -> None:
    error = await refused(worker.address, GatewayFrame(submits=[submit(1)]))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "frame", [HELLO, GatewayFrame(submits=[submit(3), submit(3)]), GatewayFrame(submits=[submit(3), submit(2)])]
)
async def test_breach_of_protocol_ends_the_session_and_aborts_its_requests(
    worker: Running, frame: GatewayFrame
) -> None:
    error = await refused(worker.address, HELLO, GatewayFrame(submits=[submit(1, max_tokens=10_000)]), frame)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert worker.worker.open_slots == 0


async def test_ping_is_answered_with_the_time_it_was_read(worker: Running) -> None:
    async with connect(worker.address) as peer:
        before_ns = time.monotonic_ns()
        await peer.send(ping_sent_ns=before_ns)
        await peer.until(lambda: peer.frames[-1].pong is not None)
        assert peer.frames[-1].pong is not None
        echoed_ns, received_ns = peer.frames[-1].pong
    assert echoed_ns == before_ns
    assert before_ns <= received_ns <= time.monotonic_ns()


async def test_idle_session_sends_its_load_about_once_a_second(worker: Running) -> None:
    async with connect(worker.address) as peer:
        await peer.until(lambda: len(peer.frames) == 3)
    assert all(frame.load is not None and frame.load.host is not None for frame in peer.frames[1:])
    host = peer.frames[-1].load.host  # type: ignore[union-attr]
    assert host is not None
    assert 0 < host.memory_used_bytes < host.memory_total_bytes
    assert 0.5e9 < peer.frames[2].sent_ns - peer.frames[1].sent_ns < 3e9


async def test_drained_session_takes_no_more_and_finishes_what_runs(worker: Running) -> None:
    async with connect(worker.address) as peer, connect(worker.address) as other:
        (running,) = await peer.submit(submit(1, max_tokens=300, ignore_eos=True))
        await peer.send(drain=True)
        (late,) = await peer.ask(submit(2))
        await running.done.wait()
        (elsewhere,) = await other.ask(submit(1, max_tokens=1))
        assert peer.frames[-1].draining
        assert not other.frames[-1].draining
    assert late.failed is not None
    assert late.failed.kind == FailureKind.UNAVAILABLE
    assert running.finished is not None
    assert running.finished.reasons == ("length",)
    assert elsewhere.finished is not None


async def test_stopped_worker_finishes_its_streams_in_all_sessions_and_exits_with_0(worker: Running) -> None:
    async with connect(worker.address) as peer:
        (answer,) = await peer.submit(submit(1, max_tokens=1000, ignore_eos=True))
        await peer.until(lambda: answer.deltas > 0)
        worker.worker.stop()
        await peer.until(lambda: peer.frames[-1].draining)
        assert await worker.exit_status == 0
        await answer.done.wait()
        assert answer.finished is not None
        assert answer.finished.output_tokens == 1000


async def test_worker_stops_while_gateways_keep_coming_back(worker: Running) -> None:
    async def come_back() -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with open_call(worker.address) as call:
                    await call.write(HELLO)
                    async for _ in call:
                        pass

    async with asyncio.TaskGroup() as gateways:
        returning = [gateways.create_task(come_back()) for _ in range(4)]
        async with open_call(worker.address) as call:  # which ends in one way or another
            await call.write(HELLO)
            await call.read()
            await call.write(GatewayFrame(submits=[submit(1, max_tokens=10_000, ignore_eos=True)]))
            async with asyncio.timeout(5):
                await worker.worker.close()
        for gateway in returning:
            gateway.cancel()


async def test_health_says_serving_once_the_model_is_loaded(worker: Running) -> None:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", wire.SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_worker_that_loads_says_so(worker: Running) -> None:
    settings = EngineSettings(backend="sim", port=0)
    loading = Loading()
    waiting = Worker(settings, loading)
    opening = asyncio.ensure_future(waiting.open())
    await loading.is_loading.wait()
    address = f"127.0.0.1:{waiting.port}"
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    error = await refused(address, HELLO)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    waiting.stop()
    assert await opening is None
    await waiting.close()


async def test_model_info_and_reflection_answer(worker: Running) -> None:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        ask = channel.unary_unary(
            wire.MODEL_INFO_METHOD,
            request_serializer=wire.encode_empty,
            response_deserializer=wire.decode_model_info,
        )
        info = await ask(None)
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await reflect.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = (await reflect.read()).list_services_response.service
        reflect.cancel()
    assert info.names == ("SmolLM2-135M-Instruct",)
    assert wire.SERVICE in {service.name for service in services}


async def test_worker_says_that_its_prompts_make_no_way() -> None:
    settings = EngineSettings(backend="sim", port=0, profile="test", makes_way=False)
    async with running_worker(settings, SimBackend(settings)) as running, connect(running.address) as peer:
        welcome = peer.frames[0].welcome
        assert welcome is not None
        assert not welcome.model.makes_way


async def test_port_in_use_is_one_line(worker: Running) -> None:
    settings = EngineSettings(backend="sim", port=worker.worker.port)
    second = Worker(settings, SimBackend(settings))
    with pytest.raises(ConfigError, match="in use"):
        await second.open()
    await second.close()


async def test_dead_engine_fails_its_requests_and_ends_the_worker_with_1() -> None:
    engine = Dying()
    settings = EngineSettings(backend="sim", port=0)
    async with running_worker(settings, engine) as running, connect(running.address) as peer:
        (answer,) = await peer.submit(submit(1))
        await peer.until(lambda: answer.is_accepted)
        engine.die.set()
        await answer.done.wait()
        assert answer.failed is not None
        assert answer.failed.kind == FailureKind.UNAVAILABLE
        assert await running.exit_status == 1


async def test_stalled_gateway_holds_up_nobody_else(worker: Running) -> None:
    async with open_call(worker.address) as stalled, connect(worker.address) as peer:
        await stalled.write(HELLO)
        many = [submit(slot, max_tokens=2000, ignore_eos=True) for slot in range(40)]
        await stalled.write(GatewayFrame(submits=many))
        (answer,) = await peer.ask(submit(1, max_tokens=100, ignore_eos=True))
        assert answer.finished is not None


class Loading:
    """An engine that never gets ready."""

    def __init__(self) -> None:
        self.is_loading = asyncio.Event()

    async def start(self) -> ModelInfo:
        self.is_loading.set()
        await asyncio.Event().wait()
        raise AssertionError

    def submit(self, submit: Submit, received_ns: int, sink: Sink) -> Cancel:
        raise AssertionError

    def load(self) -> Load:
        raise AssertionError

    async def run(self) -> str:
        raise AssertionError

    async def stop(self) -> None:
        """Nothing to release."""


class Dying(Loading):
    """An engine that answers nothing, and dies when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.die = asyncio.Event()
        self.open: list[tuple[Submit, Sink]] = []

    async def start(self) -> ModelInfo:
        return await SimBackend(EngineSettings(backend="sim")).start()

    def submit(self, submit: Submit, received_ns: int, sink: Sink) -> Cancel:
        self.open.append((submit, sink))
        return lambda: None

    def load(self) -> Load:
        return Load(host=Host(0.0, 0, 0))

    async def run(self) -> str:
        await self.die.wait()
        for request, sink in self.open:
            sink.failed(failed(request, 0, FailureKind.UNAVAILABLE, "the engine died"))
        return "it was told to"


async def test_frame_tells_how_long_the_step_of_its_tokens_took() -> None:
    """Not the one that runs when the frame is written."""
    settings = EngineSettings(
        backend="sim", port=0, profile="test", sim=SimParameters(step_us=5_000, prefill_token_us=100)
    )
    async with running_worker(settings, SimBackend(settings)) as running, connect(running.address) as peer:
        await peer.ask(submit(1, TextPrompt("Once " * 400), max_tokens=4, ignore_eos=True))
        first, *others = [frame.load.step_ns / 1e6 for frame in peer.frames if frame.deltas is not None and frame.load]
        assert first > 50, "its prompt"
        assert others == [pytest.approx(5, abs=1)] * 3
