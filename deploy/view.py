"""What `tidegate up` shows: one live line per part on a terminal, and events as plain lines everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.stack import PartStatus

REFRESH_S = 0.5
COLUMNS = 6
STYLES = {"ready": "green", "starting": "yellow", "waiting": "red", "silent": "red", "stopping": "yellow"}


class View:
    """A stack's Listener. `details` gives one phrase per part name: load, rates."""

    def __init__(self, console: Console, details: Callable[[], Mapping[str, str]]) -> None:
        self._console, self._details = console, details
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._shown_s = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, line: str) -> None:
        # soft_wrap: a pipe gets whole lines, not lines cut at 80 columns.
        self._console.print(Text(line), soft_wrap=True)

    def show(self, parts: Sequence[PartStatus]) -> None:
        now_s = time.monotonic()
        if self._live is not None and now_s - self._shown_s >= REFRESH_S:
            self._shown_s = now_s
            self._live.update(status_table(parts, self._details()), refresh=True)


def status_table(parts: Sequence[PartStatus], details: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(COLUMNS):
        table.add_column(no_wrap=True)
    for part in parts:
        restarts = f"{part.restarts} restarts" if part.restarts else ""
        table.add_row(
            Text(part.name, style="bold"),
            Text(part.state, style=STYLES.get(part.state, "")),
            f"pid {part.pid}" if part.pid else "",
            part.address,
            details.get(part.name, ""),
            Text(restarts, style="red"),
        )
    return table
