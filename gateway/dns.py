"""Workers behind a name, such as a Kubernetes headless service: asked again and again, since pods come and go."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from gateway.members import Sightings
from protos.core import address

log = logging.getLogger("tidegate.gateway")

INTERVAL_SECONDS = 5.0
ANSWER_SECONDS = 10.0

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """HOST:PORT of each address behind a name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({address.join(str(info[4][0]), port) for info in found})


async def watch(
    name: str, tell: Callable[[list[str]], None], resolve: Resolve = resolve, interval_s: float = INTERVAL_SECONDS
) -> None:
    """Tell the addresses behind HOST:PORT after each answer. A resolver that fails changes nothing."""
    host, _, port = name.rpartition(":")
    sightings = Sightings()
    was_answered = True
    while True:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                addresses = await resolve(host, int(port))
        except OSError as error:  # a TimeoutError is one
            if was_answered:
                log.warning("workers at %s: %s; those known stay", name, error or "the resolver does not answer")
            was_answered = False
        else:
            was_answered = True
            tell(sightings.answered(addresses))
        await asyncio.sleep(interval_s)
