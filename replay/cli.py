"""`tidegate capture`, `tidegate replay` and `tidegate workload`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protos.core import settings as settings_loader
from replay.settings import DEFAULT_TARGET, ReplaySettings

if TYPE_CHECKING:
    from replay.workload import Workload

capture_app = typer.Typer(help="What the gateway recorded.", no_args_is_help=True)
replay_app = typer.Typer(help="Send recorded or made-up traffic, and say where the time went.", no_args_is_help=True)
workload_app = typer.Typer(help="Traffic to replay, made up or imported.", no_args_is_help=True)
import_app = typer.Typer(help="Make a workload of a public trace or of prompts.", no_args_is_help=True)
workload_app.add_typer(import_app, name="import")

DAMAGED = 1
UNANSWERED = 1
INTERRUPTED = 130
Output = Annotated[Path, typer.Option("-o", "--output", help="Workload file to write; .zst compresses it.")]


# ---------------------------------------------------------------- capture


@capture_app.command("ls")
def capture_ls(directory: Annotated[Path, typer.Argument(help="Folder of captures.")] = Path("captures")) -> None:
    """List the captures in a folder."""
    from replay import inspection

    for line in inspection.list_journals(directory):
        typer.echo(line)


@capture_app.command("show")
def capture_show(
    capture: Annotated[Path, typer.Argument(help="One capture's folder.")],
    limit: Annotated[int, typer.Option(min=0, help="Requests to show.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per request.")] = False,
) -> None:
    """Show what a capture holds."""
    from replay import inspection

    for line in inspection.capture_json(capture, limit) if json else inspection.show_capture(capture, limit):
        typer.echo(line)


@capture_app.command("verify")
def capture_verify(path: Annotated[Path, typer.Argument(help="Folder of a capture or of a replay.")]) -> None:
    """Read everything and compare it with the manifest; exit 1 when something is damaged or missing."""
    from replay import inspection

    verdict = inspection.verify(path)
    for line in inspection.verdict_lines(path, verdict):
        typer.echo(line)
    if not verdict.is_sound:
        raise typer.Exit(DAMAGED)


# ---------------------------------------------------------------- replay


@replay_app.command("run")
def replay_run(
    source: Annotated[Path, typer.Argument(help="A capture's folder or a workload file.")],
    target: Annotated[str | None, typer.Option(help=f"Address of the server; default {DEFAULT_TARGET}.")] = None,
    speed: Annotated[float | None, typer.Option(help="Sessions start so many times as fast.")] = None,
    limit_duration: Annotated[float | None, typer.Option(help="Seconds of the source to replay.")] = None,
    users: Annotated[int | None, typer.Option(help="Closed loop with so many users, not the recorded times.")] = None,
    spawn_rate: Annotated[float | None, typer.Option(help="Users who start per second.")] = None,
    think_time: Annotated[float | None, typer.Option(help="Seconds between two requests of a user.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for instead of the recorded one.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="recorded: as many tokens as recorded; free: the model's.")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="For goodput; default ttft=1s,tpot=100ms.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for a whole answer.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The run's folder; must not exist.")] = None,
    config: Annotated[Path | None, typer.Option(help=r"Settings file (TOML), section \[replay].")] = None,
) -> None:
    """Replay a capture or a workload and report on it; exit 1 when no request was answered."""
    flags = {
        "target": target,
        "speed": speed,
        "limit_duration": limit_duration,
        "users": users,
        "spawn_rate": spawn_rate,
        "think_time": think_time,
        "model": model,
        "lengths": lengths,
        "slo": slo,
        "timeout": timeout,
    }
    settings = settings_loader.load(ReplaySettings, "replay", file=config, environ=os.environ, flags=flags)
    workload = open_source(source)
    raise typer.Exit(_run(workload, settings, output))


def _run(workload: Workload, settings: ReplaySettings, output: Path | None) -> int:
    import uvloop
    from rich.console import Console

    from replay import replayer, report
    from replay.result import Fate

    run_id = replayer.new_run_id()
    directory = output or Path("replays") / run_id
    console = Console(stderr=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        plan = runner.run(replayer.make_plan(workload, settings, run_id))
        for line in (*report.shape_lines(plan.facts.source_shape, plan.facts.scaled_shape), *plan.facts.notes):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        summary = runner.run(replayer.perform(plan, directory, console))
    typer.echo(report.render(summary))
    typer.echo(f"written to {directory}")
    if summary.is_interrupted:
        return INTERRUPTED
    if summary.errors and not summary.fates.get(Fate.FINISHED):
        console.print("no request was answered; the report says why", highlight=False)
        return UNANSWERED
    return 0


@replay_app.command("report")
def replay_report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Make a run's report again from its journal; works for a run that was killed."""
    from replay import replayer, report

    typer.echo(report.render(replayer.write_report(run)))


# ---------------------------------------------------------------- workload


@workload_app.command("synth")
def workload_synth(
    output: Output,
    rate: Annotated[float, typer.Option(help="Mean requests per second.")] = 1.0,
    duration: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    arrivals: Annotated[str, typer.Option(help="poisson, constant, gamma:CV or weibull:CV.")] = "poisson",
    preset: Annotated[str, typer.Option(help="Lengths of a published trace.")] = "azure-2023-conv",
    seed: Annotated[int, typer.Option(help="The same seed makes the same workload.")] = 1,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer prompts to it.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer answers to it.")] = None,
) -> None:
    """Make a workload from a rate, an arrival process and the lengths of a published trace."""
    from replay.synth import SynthSettings, synthesize

    settings = SynthSettings(
        rate=rate,
        duration_s=duration,
        arrivals=arrivals,
        preset=preset,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
    )
    _write(synthesize(settings), output)


@import_app.command("azure")
def import_azure(
    file: Annotated[Path, typer.Argument(help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens.")],
    output: Output,
    start: Annotated[float, typer.Option(min=0, help="Seconds after the first row.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds from there; default all.")] = None,
) -> None:
    """Import an Azure LLM inference trace."""
    from replay.importers import from_azure

    _write(from_azure(file, start_s=start, duration_s=duration), output)


@import_app.command("prompts")
def import_prompts(
    file: Annotated[Path, typer.Argument(help="One prompt per line: text, or JSON with prompt, messages or turns.")],
    output: Output,
    rate: Annotated[float, typer.Option(min=1e-6, max=1e6, help="Requests per second.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Make a workload of your own prompts."""
    from replay.importers import from_prompts

    _write(from_prompts(file, rate=rate, output_tokens=max_tokens), output)


@workload_app.command("show")
def workload_show(source: Annotated[Path, typer.Argument(help="A workload file or a capture's folder.")]) -> None:
    """Print a workload's rate, burstiness and lengths."""
    from replay import inspection

    for line in inspection.show_workload(open_source(source)):
        typer.echo(line)


def _write(workload: Workload, output: Path) -> None:
    from replay import inspection
    from replay.workload import save

    save(workload, output)
    for line in inspection.show_workload(workload):
        typer.echo(line)
    typer.echo(f"written to {output}")


def open_source(path: Path) -> Workload:
    """A capture's folder or a workload file. Raises CaptureError."""
    from replay import inspection
    from replay.importers import from_capture
    from replay.workload import load

    if not path.is_dir():
        return load(path)
    inspection.check_is_capture(path)
    return from_capture(path)
