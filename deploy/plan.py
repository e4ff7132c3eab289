"""From settings to parts: which processes one machine runs, with which commands. Starts nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import msgspec

from deploy.settings import UpSettings
from protos.core import address
from protos.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
TIDEGATE = (sys.executable, "-m", "deploy")
WORKER_NICENESS = 10
"""An engine on the CPU takes all of it, in threads that compute for long. The gateway takes a few hundredths, and is to
have them at once: with vLLM on two cores at twice what it can carry it waits 60 us for its turn instead of 280, and its
refusals' p99 is 5 ms instead of 116. The engine is as fast: 358 tokens/s, and 351 without."""


class Command(msgspec.Struct, frozen=True):
    """One process of the stack."""

    name: str
    host: str
    port: int
    arguments: tuple[str, ...]
    niceness: int = 0

    @property
    def address(self) -> str:
        return address.join(self.host, self.port)


def choose_backend(wanted: str, configured: str, has_vllm: bool) -> str:
    """ "vllm" or "sim". `configured` is what the [engine] section or a profile says; it decides where `auto` is wanted.

    Raises ConfigError when vLLM was asked for by name and is not there.
    """
    if wanted == "auto":
        return "vllm" if configured == "vllm" and has_vllm else "sim"
    if wanted == "vllm" and not has_vllm:
        raise ConfigError("vLLM is not installed: run `make clean install`, or pass --backend sim")
    return wanted


def has_vllm() -> bool:
    """Found, not imported: importing vLLM takes seconds."""
    return importlib.util.find_spec("vllm") is not None


def plan(settings: UpSettings, backend: str, config: Path | None) -> list[Command]:
    """The gateway first, then the workers: the order in which they stop."""
    workers = [_worker(settings, backend, number, config) for number in range(1, settings.workers + 1)]
    return [_gateway(settings, workers, config), *workers]


def _worker(settings: UpSettings, backend: str, number: int, config: Path | None) -> Command:
    name, port = f"worker-{number}", settings.worker_port + number - 1
    flags = ["--backend", backend, "--name", name, "--host", LOOPBACK, "--port", str(port)]
    flags += ["--model", settings.model] if settings.model else []
    flags += ["--profile", settings.profile] if settings.profile else []
    return Command(name, LOOPBACK, port, (*TIDEGATE, "engine", *flags, *_config(config)), WORKER_NICENESS)


def _gateway(settings: UpSettings, workers: list[Command], config: Path | None) -> Command:
    flags = ["--host", settings.host, "--port", str(settings.port)]
    flags += ["--operator-host", LOOPBACK, "--operator-port", str(settings.operator_port)]
    flags += ["--capture-dir", settings.capture_dir, "--capture-level", settings.capture_level]
    for worker in workers:
        flags += ["--worker", worker.address]
    if settings.otlp_endpoint:
        flags += ["--otlp-endpoint", settings.otlp_endpoint]
    return Command("gateway", settings.host, settings.port, (*TIDEGATE, "gateway", *flags, *_config(config)))


def _config(config: Path | None) -> list[str]:
    return ["--config", str(config)] if config is not None else []
