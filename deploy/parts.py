"""From commands to running parts: processes, their logs and their probes."""

from __future__ import annotations

from pathlib import Path

from deploy.plan import LOOPBACK, Command
from deploy.probe import WorkerProbe, fetch
from deploy.process import Process
from deploy.settings import UpSettings
from deploy.stack import Part


def make_parts(commands: list[Command], settings: UpSettings) -> list[Part]:
    ready_url = f"http://{LOOPBACK}:{settings.operator_port}/ready"
    return [_part(command, Path(settings.log_dir), ready_url) for command in commands]


def _part(command: Command, log_dir: Path, ready_url: str) -> Part:
    child = Process(list(command.arguments), log_dir / f"{command.name}.log", command.niceness)
    if command.name == "gateway":
        return Part(command.name, command.address, child, lambda: fetch(ready_url) is not None)
    return Part(command.name, command.address, child, WorkerProbe(command.address))
