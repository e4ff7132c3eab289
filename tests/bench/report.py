"""Printed tables and the JSON beside them, in reports/bench/."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

FOLDER = Path("reports/bench")
console = Console(width=140, highlight=False, soft_wrap=True)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    console.rule(title)
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()))
    console.print("Figures are comparable within this run only.", style="dim")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def print_verdict(what: str, value: float | None, target: float, *, at_most: bool) -> None:
    """One line: the figure, its target and whether it holds. None means that it could not be measured."""
    bound = f"target at {'most' if at_most else 'least'} {target:g}"
    if value is None:
        console.print(f"{what}: not measured ({bound})", style="bold red")
        return
    holds = value <= target if at_most else value >= target
    console.print(
        f"{what}: {value:.2f} ({bound}): {'holds' if holds else 'MISSED'}", style="green" if holds else "bold red"
    )


def write(name: str, content: Any) -> Path:
    """`reports/bench/<name>-<UTC time>.json`."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
    return path


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and the range where there is one: "24.8 (24.1-25.3)"."""
    if not values:
        return "-"
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest rank; NaN of nothing."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")
