"""`tidegate up`: the whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.lifecycle import EXIT_INTERRUPTED
from deploy.plan import LOOPBACK, TIDEGATE, Command, choose_backend, has_vllm, plan
from deploy.settings import UpSettings
from engine.cli import load_settings as load_engine_settings
from engine.settings import DEFAULT_MODEL, EngineSettings
from protos.core import address
from protos.core import settings as core_settings
from protos.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.stack import Stack
    from deploy.view import View


LAST_PORT = 65535


def up(
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, vllm or sim.")] = None,
    workers: Annotated[int | None, typer.Option(help="How many engine workers.")] = None,
    model: Annotated[str | None, typer.Option(help="Pulled model, hub name or path.")] = None,
    profile: Annotated[str | None, typer.Option(help="Ready-made engine settings: a file of engine/profiles.")] = None,
    host: Annotated[str | None, typer.Option(help="Address for clients.")] = None,
    port: Annotated[int | None, typer.Option(help="Port for clients.")] = None,
    operator_port: Annotated[int | None, typer.Option(help="Port for metrics and state, on 127.0.0.1.")] = None,
    worker_port: Annotated[int | None, typer.Option(help="Port of the first worker.")] = None,
    capture_level: Annotated[str | None, typer.Option(help="full, hashed or off.")] = None,
    capture_dir: Annotated[str | None, typer.Option(help="Where captures go.")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="http://HOST:4317 for traces.")] = None,
    log_dir: Annotated[str | None, typer.Option(help="Where the parts' logs go.")] = None,
    started_at: Annotated[float | None, typer.Option(hidden=True, help="Unix time to count from.")] = None,
) -> None:
    """Serve a model on this machine: workers and the gateway, restarted when they die, drained on Ctrl-C."""
    flags = {
        "backend": backend, "workers": workers, "model": model, "profile": profile, "host": host, "port": port,
        "operator_port": operator_port, "worker_port": worker_port, "capture_level": capture_level,
        "capture_dir": capture_dir, "otlp_endpoint": otlp_endpoint, "log_dir": log_dir,
    }  # fmt: skip
    serve(load_settings(config, flags), config, started_at or time.time())


def load_settings(config: Path | None, flags: Mapping[str, Any]) -> UpSettings:
    return core_settings.load(UpSettings, "up", file=config, environ=os.environ, flags=flags)


def serve(settings: UpSettings, config: Path | None, started_at_unix_s: float) -> None:
    """Run until SIGINT or SIGTERM, then drain. Raises ConfigError when the stack cannot be started."""
    from rich.console import Console

    console = Console(highlight=False)
    with asked_to_stop() as times_asked:
        commands, engine = prepare(settings, config, console)
        with running(settings, commands, console) as (stack, view):
            view.event(f"starting {len(commands)} parts; their logs are in {settings.log_dir}/")
            stack.run(until=lambda: stack.is_ready or times_asked() > 0)
            if not times_asked():
                view.event(f"\nready after {time.time() - started_at_unix_s:.0f} s; stop with Ctrl-C\n")
                view.event(next_steps(settings, engine.names[0]))
            stack.run(until=lambda: times_asked() > 0)
            view.event("stopping: running streams may finish; Ctrl-C again ends them now")
            stack.stop(settings.drain_s, is_hurried=lambda: times_asked() > 1)
            view.event("stopped")


def prepare(settings: UpSettings, config: Path | None, console: Console) -> tuple[list[Command], EngineSettings]:
    """Everything that can be wrong or missing before a process is started. Raises ConfigError."""
    engine = load_engine(settings, config)
    backend = choose_backend(settings.backend, engine.backend, has_vllm())
    commands = plan(settings, backend, config)
    check_ports(commands, settings)
    make_log_folder(Path(settings.log_dir))
    if backend == "sim":
        console.print(SIMULATED if has_vllm() else f"{SIMULATED} {INSTALL}", soft_wrap=True, style="bold red")
    else:
        ensure_model(engine.model)
    return commands, engine


@contextlib.contextmanager
def running(settings: UpSettings, commands: list[Command], console: Console) -> Iterator[tuple[Stack, View]]:
    """A stack that is not started yet, and of which nothing is left afterwards."""
    from deploy.load import LoadReader
    from deploy.parts import make_parts
    from deploy.stack import Stack
    from deploy.view import View

    load = LoadReader(operator_url(settings), {command.address: command.name for command in commands})
    with View(console, load.read) as view:
        stack = Stack(make_parts(commands, settings), view)
        try:
            yield stack, view
        finally:
            stack.kill()


SIMULATED = "!! SIMULATED ENGINE: the tokens are made up, not a model's."
INSTALL = "For real ones install vLLM: make clean install."


def load_engine(settings: UpSettings, config: Path | None) -> EngineSettings:
    """What the workers will read from the same places. Raises ConfigError before any of them is started."""
    backend = None if settings.backend == "auto" else settings.backend
    flags = {"backend": backend, "model": settings.model, "profile": settings.profile}
    return load_engine_settings(config, dict(os.environ), flags)


def operator_url(settings: UpSettings) -> str:
    return f"http://{LOOPBACK}:{settings.operator_port}"


def ensure_model(model: str) -> None:
    """Fetch the default model where it is missing, with its own progress; any other has to be there or on the hub."""
    from engine.model import pulled_models, resolve

    if model != DEFAULT_MODEL:
        resolve(model)
    elif model not in {pulled.name for pulled in pulled_models()}:
        pulling = subprocess.run([*TIDEGATE, "model", "pull", model])
        if pulling.returncode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # which only counts here, and went to both
        if pulling.returncode != 0:
            raise ConfigError(f"the model {model} could not be fetched: see above, or serve another with --model")


def check_ports(commands: list[Command], settings: UpSettings) -> None:
    """Raises ConfigError for the first port that is none, that two parts share, or that cannot be had."""
    from deploy.probe import bind_error, port_owner

    wanted = [("operator", LOOPBACK, settings.operator_port)] + [(part.name, part.host, part.port) for part in commands]
    seen: dict[int, str] = {}
    for name, host, port in wanted:
        flag = {"gateway": "--port", "operator": "--operator-port"}.get(name, "--worker-port")
        if port in seen:
            raise ConfigError(f"{name} and {seen[port]} both want port {port}: choose another with {flag}")
        if port > LAST_PORT:
            raise ConfigError(f"port {port}, wanted for {name}, does not exist: choose a lower one with {flag}")
        seen[port] = name
        error = bind_error(host, port)
        if error is not None and error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host}, wanted for {name}, is in use{port_owner(port)}: "
                f"stop that, or choose another with {flag}"
            )
        if error is not None:
            raise ConfigError(
                f"{name} cannot listen on port {port} of {host} ({error.strerror}): "
                f"choose another with --host or {flag}"
            )


def make_log_folder(folder: Path) -> None:
    """Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write logs to {folder}: {error.strerror}; choose another with --log-dir") from None


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """How often SIGINT or SIGTERM came; they do nothing else inside the block."""
    times = 0

    def count(*_: object) -> None:
        nonlocal times
        times += 1

    before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: times
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def next_steps(settings: UpSettings, model: str) -> str:
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(settings.host, settings.host)
    url = f"http://{address.join(host, settings.port)}"
    captures = settings.capture_dir
    return f"""\
Try next, in another terminal:

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "stream": true, "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  .venv/bin/tidegate capture ls {captures}

  .venv/bin/tidegate replay run {captures}/<ID> --target {url} --speed 10
"""
