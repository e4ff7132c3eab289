from __future__ import annotations

import io

from rich.console import Console

from deploy.stack import PartStatus
from deploy.view import View, status_lines

PARTS = [
    PartStatus("gateway", "ready", 12345, "127.0.0.1:8000", 0),
    PartStatus("worker-1", "waiting", None, "127.0.0.1:9101", 3),
]
DETAILS = {"gateway": "12 running, 3 queued, 10.5 req/s, 1234 tok/s"}


def test_every_part_is_one_line_however_narrow_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(status_lines(PARTS, DETAILS))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines] == ["gateway", "worker-1"]


def test_without_a_terminal_only_events_are_shown_and_never_cut() -> None:
    file = io.StringIO()
    with View(Console(file=file, width=20, force_terminal=False), dict) as view:
        view.show(PARTS)
        view.event("worker-1 died (killed by SIGKILL after 3 s)")
    assert file.getvalue() == "worker-1 died (killed by SIGKILL after 3 s)\n"
