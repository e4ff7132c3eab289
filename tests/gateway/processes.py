"""Workers and gateways as processes of their own, and raw HTTP to them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 60.0


def wait_for(is_true: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """Poll another process; returns the first true value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := is_true():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s until {what}")


class Process:
    """`tidegate ...`, ready when its log says so."""

    def __init__(self, folder: Path, *arguments: str, ready: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{arguments[0]}.log"
        self._ready = ready
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE__")}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environ
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, seconds: float = START_SECONDS) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            assert self.process.poll() is None, self.output
            return re.search(self._ready, self.output)

        found = wait_for(find, f"{self.log.name} says {self._ready}", seconds)
        assert isinstance(found, re.Match)
        return found

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class WorkerProcess(Process):
    """A simulated engine with steps of `step_ms`, on any free port or, after another one, on the same."""

    def __init__(
        self, folder: Path, model: str, step_ms: float, port: int = 0, *, adapters: Sequence[str] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "engine.toml"
        config.write_text(f"[engine.sim]\nstep_ms = {step_ms}\n")
        flags = {"--backend": "sim", "--profile": "instant", "--served-model-name": model, "--port": str(port)}
        arguments = [item for pair in flags.items() for item in pair]
        arguments += [item for name in adapters for item in ("--lora", f"{name}=simulated")]
        super().__init__(folder, "engine", "--config", str(config), *arguments, ready=r"127\.0\.0\.1:(\d+)")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.wait_ready()[1]}"


class GatewayProcess(Process):
    """`flags` by name, `config` as the text of its [gateway] section."""

    def __init__(self, folder: Path, *workers: str, config: str = "", **flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.captures = folder / "captures"
        file = folder / "gateway.toml"
        file.write_text(f"[gateway]\n{config}")
        given = {"port": "0", "operator_port": "0", "capture_dir": str(self.captures), **flags}
        arguments = [item for name, value in given.items() for item in (f"--{name.replace('_', '-')}", value)]
        arguments += [item for worker in workers for item in ("--worker", worker)]
        ready = r"serving on http://127\.0\.0\.1:(\d+), operators on http://127\.0\.0\.1:(\d+)"
        super().__init__(folder, "gateway", "--config", str(file), *arguments, ready=ready)

    def start(self, workers: int) -> GatewayProcess:
        """Wait until it serves and its workers are connected."""
        found = self.wait_ready()
        self.port, self.operator_port = int(found[1]), int(found[2])
        wait_for(lambda: [w["state"] for w in self.state()["workers"]].count("ready") == workers, "workers are ready")
        return self

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *, operator: bool = False
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.operator_port if operator else self.port, timeout=20)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def state(self) -> Any:
        return json.loads(self.request("GET", "/admin/state", operator=True)[2])

    @property
    def capture(self) -> Path:
        (folder,) = self.captures.iterdir()
        return folder

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection


def http_request(path: str, body: Any, *headers: str) -> bytes:
    """The bytes of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    connection.close()
    return b"".join(parts)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = connection.recv(65536)
        assert part, f"closed before {mark!r}: {data!r}"
        data += part
    return data
