"""Real processes, small ones."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.process import Process, describe_exit

SLEEPER = "import time; time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _has_autogroups() -> bool:
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return switch.exists() and switch.read_text().strip() == "1"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Process]]:
    started: list[Process] = []

    def begin(code: str) -> Process:
        process = Process(python(code), tmp_path / "logs" / "part.log")
        started.append(process)
        process.start()
        return process

    yield begin
    for process in started:
        process.kill()


def test_tail_shows_the_current_run_only(start: Callable[[str], Process]) -> None:
    process = start("print('first'); print(); print('second')")
    wait_until(lambda: process.exit_code() == 0)
    assert process.tail(5) == ["first", "second"]
    assert process.tail(1) == ["second"]
    process.command = python("print('third')")
    process.start()
    wait_until(lambda: process.exit_code() == 0)
    assert process.tail(5) == ["third"]


def test_what_a_dead_process_leaves_of_its_group_is_killed(start: Callable[[str], Process]) -> None:
    process = start(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    wait_until(lambda: bool(process.tail(1)))
    grandchild = psutil.Process(int(process.tail(1)[0]))
    assert process.pid is not None
    psutil.Process(process.pid).kill()
    wait_until(lambda: process.exit_code() == -9)
    wait_until(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_child_is_told_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    parent = subprocess.Popen(
        python(
            "import time\nfrom pathlib import Path\nfrom deploy.process import Process\n"
            f"child = Process({python(SLEEPER)!r}, Path({str(log)!r}))\n"
            "child.start()\nprint(child.pid, flush=True)\ntime.sleep(60)"
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: "deploy.leash" not in child.cmdline())
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_niceness_holds_for_what_the_command_starts(tmp_path: Path) -> None:
    assert _told_by_grandchild("os.nice(0)", tmp_path) == str(os.nice(0) + 7)


@pytest.mark.skipif(not _has_autogroups(), reason="nice values count among all processes here")
def test_niceness_holds_against_other_sessions(tmp_path: Path) -> None:
    assert _told_by_grandchild("open('/proc/self/autogroup').read().split()[-1]", tmp_path) == "7"


def _told_by_grandchild(expression: str, folder: Path) -> str:
    shown = shlex.join(python(f"import os; print({expression}, flush=True)"))
    process = Process(python(f"import os; os.system({shown!r})"), folder / "part.log", niceness=7)
    process.start()
    wait_until(lambda: process.exit_code() == 0)
    return process.tail(1)[0]


@pytest.mark.parametrize(("code", "text"), [(0, "exit 0"), (2, "exit 2"), (-9, "killed by SIGKILL")])
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text
