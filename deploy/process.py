"""A child process with a log file, in a process group of its own that dies with it and with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class Process:
    """Starts one command any number of times. The log is appended to; `tail` shows only the current run."""

    def __init__(self, command: list[str], log_path: Path, niceness: int = 0) -> None:
        self.command, self.log_path, self.niceness = command, log_path, niceness
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen is not None and self._popen.returncode is None else None

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(self.command)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            # A session of its own: Ctrl-C in the terminal reaches only us, so that parts stop in order.
            self._popen = subprocess.Popen(
                leashed(self.command, self.niceness),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """None while it runs or before it was started. What the dead process left of its group is killed."""
        if self._popen is None:
            return None
        code = self._popen.poll()
        if code is not None:
            self._signal_group(signal.SIGKILL)
        return code

    def terminate(self) -> None:
        """Ask it to drain and end."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self._signal_group(signal.SIGKILL)
        if self._popen is not None:
            self._popen.wait()

    def tail(self, lines: int) -> list[str]:
        """The last non-empty lines of the current run."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 16_384))
            text = log.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def _signal_group(self, number: signal.Signals) -> None:
        if self._popen is not None:
            try:
                os.killpg(self._popen.pid, number)
            except ProcessLookupError:
                pass


def leashed(command: Sequence[str], niceness: int = 0) -> list[str]:
    """The command as a child of this process that does not outlive it. Start it in a session of its own."""
    return [sys.executable, "-m", "deploy.leash", str(os.getpid()), str(niceness), *command]


def describe_exit(code: int) -> str:
    """
    >>> describe_exit(2), describe_exit(-9)
    ('exit 2', 'killed by SIGKILL')
    """
    return f"exit {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
