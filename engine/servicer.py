"""The Engine service: Session and GetModelInfo over one Backend."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from engine.backend import Backend
from engine.session import Session
from protos.core import wire
from protos.core.contract import PROTOCOL, EngineFrame, GatewayFrame, Hello, Host, ModelInfo, Welcome
from protos.core.errors import InvalidRequest, ProtocolMismatch

_log = logging.getLogger("tidegate.engine")

Context = grpc.aio.ServicerContext[GatewayFrame, EngineFrame]


class Servicer:
    """Sessions of any number of gateways over one backend. Owns the sessions; ready once `serve` was called."""

    def __init__(self, backend: Backend, *, worker: str, version: str) -> None:
        self._backend = backend
        self._worker = worker
        self._version = version
        self._boot_id = uuid.uuid4().hex[:12]
        self._model: ModelInfo | None = None
        self._sessions: set[Session] = set()
        self._is_draining = False
        self._is_closed = False

    @property
    def open_slots(self) -> int:
        return sum(session.open_slots for session in self._sessions)

    def serve(self, model: ModelInfo) -> None:
        """The model is loaded: sessions may begin."""
        self._model = model

    def drain(self) -> None:
        """Accept no more requests, in all sessions."""
        self._is_draining = True
        for session in self._sessions:
            session.drain()

    def close(self) -> None:
        """Refuse further sessions: gRPC waits for them, however late they come, before it stops."""
        self._is_closed = True

    def beat(self, host: Host) -> None:
        """Let every session say something; call it about once a second."""
        for session in self._sessions:
            session.beat(host)

    async def quiet(self) -> None:
        """Returns when no request runs and all frames are written. Ends for sure only while draining."""
        for session in list(self._sessions):
            await session.quiet.wait()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                "Session": grpc.stream_stream_rpc_method_handler(
                    self._session,
                    request_deserializer=wire.decode_gateway_frame,
                    response_serializer=wire.encode_engine_frame,
                ),
                "GetModelInfo": grpc.unary_unary_rpc_method_handler(
                    self._get_model_info,
                    request_deserializer=wire.decode_empty,
                    response_serializer=wire.encode_model_info,
                ),
            },
        )

    async def _get_model_info(self, _: bytes, context: grpc.aio.ServicerContext[bytes, ModelInfo]) -> ModelInfo:
        if self._model is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._worker} is loading its model")
        return self._model

    async def _session(self, frames: AsyncIterator[GatewayFrame], context: Context) -> None:
        if self._model is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._worker} is loading its model")
        if self._is_closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._worker} is stopping")
        hello = await self._read_hello(frames, context)
        await context.write(EngineFrame(welcome=self._welcome(self._model), sent_ns=time.monotonic_ns()))
        _log.info("session with %s %s from %s", hello.gateway, hello.version, context.peer())
        session = Session(self._backend, self._model.names, self._is_draining)
        self._sessions.add(session)
        refusal: InvalidRequest | None = None
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(_write(session, context))
                refusal = await _read(session, frames)
                writing.cancel()
        finally:
            self._sessions.discard(session)
            aborted = session.close()
            _log.info("session with %s ended, %d requests aborted", hello.gateway, aborted)
        if refusal is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal.message)

    async def _read_hello(self, frames: AsyncIterator[GatewayFrame], context: Context) -> Hello:
        first = await anext(frames, None)
        if first is None or first.hello is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the first frame of a Session must have a hello")
        if first.hello.protocol != PROTOCOL:
            mismatch = ProtocolMismatch.between(worker=PROTOCOL, gateway=first.hello.protocol)
            _log.warning("refused %s: %s", first.hello.gateway, mismatch)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(mismatch))
        return first.hello

    def _welcome(self, model: ModelInfo) -> Welcome:
        return Welcome(
            protocol=PROTOCOL, worker=self._worker, boot_id=self._boot_id, version=self._version, model=model
        )


async def _read(session: Session, frames: AsyncIterator[GatewayFrame]) -> InvalidRequest | None:
    """Act on frames until the gateway says no more, or breaks the protocol."""
    try:
        async for frame in frames:
            session.receive(frame, time.monotonic_ns())
    except InvalidRequest as error:
        return error
    return None


async def _write(session: Session, context: Context) -> None:
    """One frame at a time: what happens while the socket is busy travels together in the next."""
    while True:
        frame = await session.next_frame()
        frame.sent_ns = time.monotonic_ns()
        await context.write(frame)
        session.wrote()
