"""When an engine counts as hanging, with time passed in."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from engine.stall import IDLE_NS, SECOND_NS, SUSPENDED_NS, Look, Stall

TICK_NS = SECOND_NS // 2


def watch(
    stall: Stall, ticks: int, *, start_ns: int = 0, cpu_share: float = 0.0, **look: bool | int
) -> list[str | None]:
    """Verdicts of so many looks in a row."""
    facts: dict[str, Any] = {"stepped_ns": 1, "has_requests": True, "is_suspended": False, **look}
    return [
        stall.observe(Look(now_ns=start_ns + tick * TICK_NS, cpu_s=cpu_share * tick / 2, **facts))
        for tick in range(ticks)
    ]


def test_long_step_that_computes_is_no_stall() -> None:
    assert not any(watch(Stall(), 600, cpu_share=0.5))


def test_engine_without_requests_may_rest() -> None:
    assert not any(watch(Stall(), 600, has_requests=False, is_suspended=True))


def test_suspended_engine_is_noticed_within_five_seconds() -> None:
    verdicts = watch(Stall(), 11, is_suspended=True)
    assert "is suspended" in verdicts
    assert verdicts.index("is suspended") == SUSPENDED_NS / TICK_NS


def test_engine_that_computes_nothing_is_noticed_later() -> None:
    verdicts = watch(Stall(), 60)
    at = next(number for number, verdict in enumerate(verdicts) if verdict)
    assert at == IDLE_NS / TICK_NS


def test_step_begins_the_count_anew() -> None:
    stall = Stall()
    ticks = IDLE_NS // TICK_NS
    assert not any(watch(stall, ticks))
    assert not any(watch(stall, ticks, start_ns=ticks * TICK_NS, stepped_ns=2))


def test_time_in_which_the_worker_was_suspended_too_does_not_count() -> None:
    stall = Stall()
    assert not any(watch(stall, 2))
    assert not any(watch(stall, 2, start_ns=3600 * SECOND_NS))


SCRIPT = """
import os, signal, subprocess, sys
from engine.backends.vllm_processes import EngineProcesses

child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
processes = EngineProcesses()
before, _ = processes.look()
child.send_signal(signal.SIGSTOP)
os.waitid(os.P_PID, child.pid, os.WSTOPPED)
after, cpu_s = processes.look()
processes.kill()
print(before, after, cpu_s >= 0, child.wait(10))
"""


def test_processes_are_seen_and_killed_even_when_suspended() -> None:
    """In a process of its own: it kills all its children."""
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30)
    assert said.stdout.split() == ["False", "True", "True", "-9"], said.stderr
