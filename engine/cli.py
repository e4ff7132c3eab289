"""`tidegate engine` and `tidegate model`."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from engine import profile as profiles
from engine.adapters import read_flag
from engine.backend import Backend
from engine.model import pull as pull_model
from engine.model import pulled_models, resolve
from engine.settings import DEFAULT_MODEL, EngineSettings
from protos.core import settings as settings_loader
from protos.core.errors import ConfigError

if TYPE_CHECKING:
    from engine.calibrate import Sample

SHORTEST_RUN_S = 1

engine_app = typer.Typer(invoke_without_command=True)
model_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)


@engine_app.callback()
def engine(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML), section \\[engine].")] = None,
    profile: Annotated[str | None, typer.Option(help="Ready-made settings: a file of engine/profiles.")] = None,
    backend: Annotated[str | None, typer.Option(help="vllm, or sim for a simulated engine.")] = None,
    model: Annotated[str | None, typer.Option(help=f"Pulled model, path or hub name; default {DEFAULT_MODEL}.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name for clients; repeatable.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a LoRA adapter; repeatable.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of this worker in logs, headers and traces.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context length in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences that run at once.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="GPUs that share the model.")] = None,
    step_log: Annotated[Path | None, typer.Option(help="Write each step to this file, for calibrate.")] = None,
    verbose: Annotated[bool | None, typer.Option("--verbose", help="Log what the engine says.")] = None,
) -> None:
    """Run a worker: one engine behind gRPC, for a gateway."""
    if context.invoked_subcommand is not None:
        _refuse_options_before(context, context.invoked_subcommand)
        return
    flags = {
        "backend": backend,
        "model": model,
        "served_model_name": served_model_name,
        "lora": read_flag(lora or []),
        "host": host,
        "port": port,
        "name": name,
        "profile": profile,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        "step_log": str(step_log) if step_log is not None else None,
        "is_verbose": verbose,
    }
    settings = load_settings(config, dict(os.environ), flags)
    _configure_logging(settings)
    raise typer.Exit(_run(settings))


def _refuse_options_before(context: typer.Context, command: str) -> None:
    """They are the worker's, and a command beside it would go on without them. Raises ConfigError."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            name = parameter.opts[0]
            raise ConfigError(f"{name} is before '{command}', where it is the worker's and has no effect: put it after")


@engine_app.command()
def calibrate(
    log: Annotated[Path | None, typer.Argument(help="Step log to fit to; with --run, where to write one.")] = None,
    held_out: Annotated[
        str, typer.Option(help="What to check with: another step log, or the share of LOG's time at its end.")
    ] = "0.3",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a profile for the simulated engine.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Start an engine here and drive it, to write the log.")] = False,
    seconds: Annotated[float, typer.Option(help="How long --run drives it.")] = 240.0,
    seed: Annotated[int, typer.Option(help="Of the lengths and arrivals of --run.")] = 1,
    config: Annotated[Path | None, typer.Option(help="Settings of the engine of --run.")] = None,
    profile: Annotated[str | None, typer.Option(help="Ready-made settings for --run.")] = None,
    backend: Annotated[str | None, typer.Option(help="Engine of --run: vllm, or sim.")] = None,
    model: Annotated[str | None, typer.Option(help="Model of --run.")] = None,
) -> None:
    """Fit a simulated engine to the step log of a real one, and say how far off it is."""
    from engine import calibrate as calibration
    from engine import step_log

    if output is not None:
        _require_writable(output)
    if run:
        if not seconds >= SHORTEST_RUN_S:
            raise ConfigError(f"--seconds {seconds:g}: --run takes {SHORTEST_RUN_S} s or more")
        flags = {"backend": backend, "model": model, "profile": profile}
        sample = _run_calibration(load_settings(config, dict(os.environ), flags), log, seconds, seed)
    elif log is None:
        raise ConfigError("give a step log (tidegate engine --step-log FILE writes one), or --run")
    elif (share := _share(held_out)) is not None:
        sample = calibration.split(step_log.read(log), share)
    else:
        sample = calibration.join(step_log.read(log), step_log.read(Path(held_out)))
    result = calibration.calibrate(sample)
    typer.echo("\n".join(calibration.report(result)))
    if output is not None:
        write_profile(output, calibration.profile(result))


def _require_writable(path: Path) -> None:
    """Before minutes of driving an engine are spent on it. Raises ConfigError."""
    was_there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    if not was_there:
        path.unlink()


def write_profile(path: Path, text: str) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _share(text: str) -> float | None:
    """A share of the time, or None for a path. Raises ConfigError."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ConfigError(f"--held-out {text}: a share of the log's time lies between 0 and 1")
    return share


def _run_calibration(settings: EngineSettings, log: Path | None, seconds: float, seed: int) -> Sample:
    """Drive an engine in this process; the second part of the workload is held out."""
    import uvloop

    from engine import calibrate as calibration
    from engine import calibrate_run, step_log

    _configure_logging(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = log or Path(folder) / "steps.jsonl"
        settings = msgspec.structs.replace(settings, step_log=str(path))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            held_out_ns = runner.run(calibrate_run.run(_make_backend(settings), seconds, seed, _progress))
        return calibration.split_at(step_log.read(path), held_out_ns)


def _progress(text: str) -> None:
    typer.echo(text, err=True)


def _configure_logging(settings: EngineSettings) -> None:
    logging.basicConfig(
        level=logging.INFO if settings.is_verbose else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


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
        raise ConfigError("vLLM is not installed; run: make clean install, or start with --backend sim")
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
