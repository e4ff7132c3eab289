"""What a request held is freed as it ends: cycles would pile up until the collector stops everybody to find them."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from uvicorn.server import ServerState

from gateway.app import public_app
from gateway.connection import Connection
from gateway.settings import Limits
from tests.gateway.fakes import chat_body, gateway

REQUESTS = 5
OF_A_REQUEST = {"Exchange", "TokenStream", "Outlet", "Wire", "RequestResponseCycle"}


@contextmanager
def garbage() -> Iterator[Counter[str]]:
    """Names of the types whose instances only the collector would have freed, once the block has ended."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(it).__name__ for it in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def serve(bodies: list[bytes]) -> Counter[str]:
    """One connection that sends `bodies` in turn to a gateway whose worker answers each with one token."""
    async with gateway() as g:
        app = public_app(g.pipeline, g.fleet, g.scheduler, Limits())  # type: ignore[arg-type]
        config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
        config.load()
        connect = functools.partial(Connection, config, ServerState(), {})
        server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        with garbage() as found:
            for number, body in enumerate(bodies, 1):
                head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
                writer.write(head + body)
                while not g.leases:  # noqa: ASYNC110 nobody tells
                    await asyncio.sleep(0.001)
                worker = g.fleet.workers["worker-0"]
                worker.token(number)
                worker.finish(number, output_tokens=1)
                while "[DONE]" not in (await reader.readline()).decode():
                    pass
                await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        server.close()
    return found


def test_requests_leave_nothing_for_the_collector() -> None:
    bodies = [chat_body(stream=True, max_tokens=8)] * REQUESTS
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(asyncio.wait_for(serve(bodies), 20))
    assert not OF_A_REQUEST & found.keys(), found
