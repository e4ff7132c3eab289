"""A process under measurement: pinned to cores, waited for, its CPU time and memory read, its whole tree ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

STOP_S = 15.0
HIGHEST_PRIORITY = -20


class BenchError(Exception):
    """The measurement could not be made; `str(error)` says why in one line."""


class Process:
    """A started command. Its output goes to `log`, of which the tail is quoted when the command dies early."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cores: Sequence[int],
        log: Path,
        env: Mapping[str, str] | None = None,
        is_first: bool = True,
    ) -> None:
        """`is_first`: it runs before others of the machine, where the system lets us."""
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                # However this process ends, what it started is told to end too.
                ["setpriv", "--pdeathsig", "TERM", "taskset", "--cpu-list", ",".join(map(str, cores)), *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self._root = psutil.Process(self._popen.pid)
        if is_first:
            take_priority(self._popen.pid)

    def check(self) -> None:
        """Raises BenchError with the last lines of the log when the process has ended."""
        code = self._popen.poll()
        if code is not None:
            tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise BenchError(f"{self.name} ended with exit code {code}: {tail}")

    def wait_until(self, is_ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} was not ready after {timeout_s:.0f} s; see {self.log}")
            time.sleep(0.1)

    def cpu_s(self) -> float:
        """User and system CPU seconds of the tree since its start, ended threads included; 10 ms resolution."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
            except psutil.NoSuchProcess:
                continue
        return total

    def pss_bytes(self) -> int:
        """Proportional set size of the tree: shared pages are counted once, split among those who share them."""
        return sum(_pss_bytes(process.pid) for process in self._tree())

    def threads(self) -> int:
        return sum(process.num_threads() for process in self._tree())

    def stop(self) -> None:
        """SIGTERM to the tree's process group, SIGKILL to what is left after STOP_S."""
        tree = self._tree()
        self._signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._popen.wait()
        for process in psutil.wait_procs(tree, timeout=2.0)[1]:
            process.kill()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._popen.pid, number)
        except ProcessLookupError:
            pass

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def take_priority(pid: int) -> bool:
    """Run a process, and what it starts, before others of the machine where the system lets us.

    Linux gives each session of processes an equal share (autogroups), whatever the nice values in it: both are raised.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, pid, HIGHEST_PRIORITY)
        Path(f"/proc/{pid}/autogroup").write_text(str(HIGHEST_PRIORITY))
    except OSError:
        return False
    return True


def _pss_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))


def answers(url: str) -> bool:
    """Whether a GET gives 200 now."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
