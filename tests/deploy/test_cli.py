"""The command line as people meet it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from protos.core.errors import ConfigError


def help_of(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return re.sub(r"\s+", " ", shown.output)


def test_help_names_sections_of_the_settings_file() -> None:
    """Brackets are not markup."""
    assert "section [engine]." in help_of("engine")
    assert "section [gateway]." in help_of("gateway")
    assert "[gateway.tenants.NAME] keys" in help_of("key", "new")


@pytest.mark.parametrize("option", [("--step-log", "x.jsonl"), ("--port", "0"), ("--lora", "a=b"), ("--verbose",)])
def test_options_of_the_worker_before_a_command_beside_it_are_refused(option: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["engine", *option, "calibrate", "log.jsonl"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{option[0]} is before 'calibrate'")


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_calibration_runs_for_a_time_that_there_is(seconds: str) -> None:
    result = CliRunner().invoke(app, ["engine", "calibrate", "--run", "--backend", "sim", "--seconds", seconds])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--seconds")


def test_place_of_a_profile_is_tried_before_the_engine_is(tmp_path: Path) -> None:
    """The log is missing as well, which is found later."""
    arguments = ["engine", "calibrate", str(tmp_path / "log.jsonl"), "-o"]
    nowhere = CliRunner().invoke(app, [*arguments, str(tmp_path / "missing" / "mine.toml")])
    assert "mine.toml: No such file" in str(nowhere.exception)
    somewhere = CliRunner().invoke(app, [*arguments, str(tmp_path / "mine.toml")])
    assert "log.jsonl: No such file" in str(somewhere.exception)
    assert list(tmp_path.iterdir()) == []
