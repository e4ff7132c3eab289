"""`tidegate engine` and `tidegate model`."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import profile as profiles
from engine.backend import Backend
from engine.model import pull as pull_model
from engine.model import pulled_models, resolve
from engine.settings import DEFAULT_MODEL, EngineSettings
from protos.core import settings as settings_loader
from protos.core.errors import ConfigError

model_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)


def engine(
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML), section [engine].")] = None,
    profile: Annotated[str | None, typer.Option(help="Ready-made settings: a file of engine/profiles.")] = None,
    backend: Annotated[str | None, typer.Option(help="vllm, or sim for a simulated engine.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Pulled model, path or hub name; default {DEFAULT_MODEL}.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name for clients; repeatable.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of this worker in logs, headers and traces.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences that run at once.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="GPUs that share the model.")] = None,
    verbose: Annotated[bool | None, typer.Option("--verbose", help="Log what the engine says.")] = None,
) -> None:
    """Run a worker: one engine behind gRPC, for a gateway."""
    flags = {
        "backend": backend,
        "model": model,
        "served_model_name": served_model_name,
        "host": host,
        "port": port,
        "name": name,
        "profile": profile,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        "is_verbose": verbose,
    }
    settings = load_settings(config, dict(os.environ), flags)
    logging.basicConfig(
        level=logging.INFO if settings.is_verbose else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    raise typer.Exit(_run(settings))


def load_settings(config: Path | None, environ: dict[str, str], flags: dict[str, Any]) -> EngineSettings:
    """Settings with their profile under them; a simulated engine always has one. Raises ConfigError."""
    asked = settings_loader.load(EngineSettings, "engine", file=config, environ=environ, flags=flags)
    name = asked.profile or (profiles.DEFAULT_SIM_PROFILE if asked.backend == "sim" else "")
    if not name:
        return asked
    flags = {**flags, "profile": name}
    return settings_loader.load(
        EngineSettings, "engine", file=config, environ=environ, flags=flags, profile=profiles.find(name)
    )


def _run(settings: EngineSettings) -> int:
    import uvloop

    from engine.worker import serve

    async def main() -> int:
        return await serve(settings, _make_backend(settings))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _make_backend(settings: EngineSettings) -> Backend:
    if settings.backend == "sim":
        from engine.backends.sim import SimBackend

        return SimBackend(settings)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed; run: make install, or start with --backend sim")
    from engine.backends.vllm import VllmBackend

    return VllmBackend(settings, resolve(settings.model))


@model_app.command()
def pull(name: Annotated[str, typer.Argument(help="The default model, or a hub name.")] = DEFAULT_MODEL) -> None:
    """Make a model ready in the cache folder."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>26}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("looking", total=None)

        def advance(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total or None)

        folder = pull_model(name, advance)
    typer.echo(folder)


@model_app.command()
def ls() -> None:
    """List the models of the cache folder."""
    for model in pulled_models():
        typer.echo(f"{model.name}\t{model.size_bytes / 1e6:.0f} MB\t{model.path}")
