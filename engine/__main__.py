"""`python -m engine`: the same as `tidegate engine`."""

import typer

from engine.cli import engine

typer.run(engine)
