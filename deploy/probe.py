"""Questions to running parts. Each takes at most TIMEOUT_S and answers "no" instead of raising."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from typing import Any

import grpc
import msgspec
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 1.0


class WorkerProbe:
    """grpc.health.v1 of one worker, over one channel."""

    def __init__(self, address: str) -> None:
        # A worker that takes a minute to load must not leave the channel in a minute's backoff.
        options = (("grpc.max_reconnect_backoff_ms", 500), ("grpc.min_reconnect_backoff_ms", 100))
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    def __call__(self) -> bool:
        try:
            answer = self._stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()


def fetch(url: str) -> bytes | None:
    """Body of a 200 answer, else None."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return bytes(response.read())
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return None


def fetch_json(url: str) -> Any:
    """Decoded body of a 200 answer, else None."""
    body = fetch(url)
    try:
        return None if body is None else msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None


def bind_error(host: str, port: int) -> OSError | None:
    """Why nothing could listen there now; None where it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def port_owner(port: int) -> str:
    """ " by NAME (pid N)" of what listens on a port, or "" where the system does not tell."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and address and address.port == port and connection.pid:
            try:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return ""
    return ""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
