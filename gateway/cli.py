"""`tidegate gateway`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from protos.core import settings as settings_loader

SPELLED = {"workers": "--worker", "tracing.otlp_endpoint": "--otlp-endpoint"}
"""Flags that are not called as their key."""

key_app = typer.Typer(help="API keys of tenants.", no_args_is_help=True)


@key_app.callback()
def keys() -> None:
    """API keys of tenants."""


def gateway(
    config: Annotated[Path | None, typer.Option(help="TOML file; section \\[gateway].")] = None,
    name: Annotated[str | None, typer.Option(help="Name in logs, captures and traces.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that clients reach. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default 8000.")] = None,
    operator_host: Annotated[str | None, typer.Option(help="Address of metrics and state. Default 127.0.0.1.")] = None,
    operator_port: Annotated[int | None, typer.Option(help="Default 8001.")] = None,
    worker: Annotated[list[str] | None, typer.Option(help="HOST:PORT of a worker; repeat for each.")] = None,
    capture_dir: Annotated[str | None, typer.Option(help="Write captures into this folder.")] = None,
    capture_level: Annotated[str | None, typer.Option(help="full, hashed (default) or off.")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Export traces, such as http://127.0.0.1:4317.")] = None,
) -> None:
    """Serve the OpenAI API in front of engine workers."""
    from gateway.root import run
    from gateway.settings import GatewaySettings

    flags = {
        "name": name,
        "host": host,
        "port": port,
        "operator_host": operator_host,
        "operator_port": operator_port,
        "workers": worker or None,
        "capture.dir": capture_dir,
        "capture.level": capture_level,
        "tracing.otlp_endpoint": otlp_endpoint,
    }

    def read() -> GatewaySettings:
        return settings_loader.load(
            GatewaySettings, "gateway", file=config, environ=os.environ, flags=flags, spelled=SPELLED
        )

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    run(read(), read, config)


@key_app.command("new")
def new() -> None:
    """Make an API key: give the key to the client, put the hash into [gateway.tenants.NAME] keys."""
    from gateway.tenants import new_key

    key, key_hash = new_key()
    typer.echo(f"key   {key}")
    typer.echo(f"hash  {key_hash}")
