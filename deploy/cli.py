"""The `tidegate` command: every package's commands under one name, and one rule for errors.

Whatever Tidegate raises on purpose becomes one line on stderr and exit 2. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator

import typer

from deploy.demo import demo
from deploy.lifecycle import EXIT_INTERRUPTED, EXIT_MISCONFIGURED
from deploy.up import up
from engine.cli import engine_app, model_app
from gateway.cli import gateway, key_app
from protos.core.errors import TidegateError
from replay.cli import capture_app, replay_app, workload_app

app = typer.Typer(
    name="tidegate",
    help="A gateway for large language models with built-in traffic replay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(up)
app.command()(demo)
app.command()(gateway)
app.add_typer(engine_app, name="engine")
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(capture_app, name="capture")
app.add_typer(replay_app, name="replay")
app.add_typer(workload_app, name="workload")


@app.command()
def version() -> None:
    """Print the version."""
    print(importlib.metadata.version("tidegate"))


def main() -> None:
    """Entry point of `tidegate` and of `python -m deploy`."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except TidegateError as error:
        _fail([error])
    except BaseExceptionGroup as group:
        expected, bugs = group.split(TidegateError)
        if bugs is not None or expected is None:
            raise
        _fail(list(_leaves(expected)))


def _fail(errors: list[BaseException]) -> None:
    for error in errors:
        print(f"tidegate: {error}", file=sys.stderr)
    raise SystemExit(EXIT_MISCONFIGURED)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
