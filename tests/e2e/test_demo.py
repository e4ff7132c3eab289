"""The tour, from the command line, with a simulated engine; `make demo` is the same with a real one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import tidegate


def test_demo_serves_captures_replays_and_ends_well(tmp_path: Path) -> None:
    result = tidegate("demo", "--backend", "sim", "-o", "tour", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Recorded against replayed" in result.stdout
    assert "Slowest request" in result.stdout
    assert "died" not in result.stdout
    summary = json.loads((tmp_path / "tour" / "replayed" / "summary.json").read_text())
    assert summary["sum_check"]["broken"] == 0
    assert summary["is_simulated"] is True
