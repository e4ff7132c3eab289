"""What `tidegate up` shows: one live line per part on a terminal, and events as plain lines everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from deploy.stack import PartStatus

REFRESH_S = 0.5
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
            self._live.update(status_lines(parts, self._details()), refresh=True)


def status_lines(parts: Sequence[PartStatus], details: Mapping[str, str]) -> Group:
    """One line per part; a narrow terminal cuts it rather than wrapping it."""
    name_width = max((len(part.name) for part in parts), default=0)
    return Group(*(_line(part, name_width, details.get(part.name, "")) for part in parts))


def _line(part: PartStatus, name_width: int, details: str) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{part.name:<{name_width}}  ", "bold")
    line.append(f"{part.state:<8}  ", STYLES.get(part.state, ""))
    line.append(f"{f'pid {part.pid}' if part.pid else '':<11}  {part.address:<15}  {details}")
    if part.restarts:
        line.append(f"  {part.restarts} restarts", "red")
    return line
