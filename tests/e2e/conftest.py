"""Real processes: `tidegate up` on free ports, once per test module."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

STARTUP_S = 200.0
POLL_S = 0.05


class Up:
    """One running `tidegate up`. Use as a context manager: it stops, and leaves nothing behind."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.captures = folder / "captures"
        self.port, self.operator_port, self.worker_port = free_ports(3)
        self._output = (folder / "up.log").open("wb")
        ports = {"--port": self.port, "--operator-port": self.operator_port, "--worker-port": self.worker_port}
        command = [sys.executable, "-m", "deploy", "up", "--log-dir", str(folder / "logs")]
        command += ["--capture-dir", str(self.captures), *(str(item) for pair in ports.items() for item in pair)]
        self.process = subprocess.Popen(
            [*command, *flags], stdout=self._output, stderr=subprocess.STDOUT, env={**os.environ, "TERM": "dumb"}
        )

    def __enter__(self) -> Up:
        try:
            self.wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return (self.folder / "up.log").read_text(errors="replace")

    def wait_ready(self) -> None:
        wait_until(lambda: self.process.poll() is not None or "ready after" in self.output, "up is ready")
        assert self.process.poll() is None, self.output

    def get(self, path: str, *, operator: bool = False) -> tuple[int, bytes]:
        """Status and body; status 0 when nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.operator_port if operator else self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def state(self) -> Any:
        return json.loads(self.get("/admin/state", operator=True)[1] or b"null")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60, **options)

    def pid_of(self, part: str) -> int:
        """pid of "gateway", of "worker-N", or of the worker at HOST:PORT."""
        part = part.rpartition(":")[2]
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                command = child.cmdline()
                if part == command[3] or (command[3] == "engine" and part in command):
                    return child.pid
        raise AssertionError(f"no process of {part} runs")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = 40) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._output.close()


def tidegate(*arguments: str, cwd: Path, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={**os.environ, **(environ or {})},
    )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]


def wait_until(condition: Any, what: str, timeout_s: float = STARTUP_S) -> None:
    """Poll a real process; the only place where these tests wait by the clock."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(POLL_S)


@pytest.fixture(scope="module")
def vllm_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Real vLLM on the processor with the small model."""
    folder = tmp_path_factory.mktemp("vllm")
    with Up(folder, "--backend", "vllm", "--capture-level", "full") as up:
        yield up


@pytest.fixture(scope="module")
def sim_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Two simulated workers, for tests that kill parts: whatever they kill comes back."""
    with Up(tmp_path_factory.mktemp("sim"), "--backend", "sim", "--workers", "2") as up:
        yield up


@pytest.fixture
def own_up(tmp_path: Path) -> Iterator[Up]:
    """One simulated worker, for a test that stops the stack."""
    with Up(tmp_path, "--backend", "sim") as up:
        yield up
