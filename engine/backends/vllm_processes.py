"""The processes that vLLM starts for its engine."""

from __future__ import annotations

import psutil


class EngineProcesses:
    """All children of this process, and theirs."""

    def __init__(self) -> None:
        self._found: list[psutil.Process] = []

    def look(self) -> tuple[bool, float]:
        """(one of them is stopped by a signal, their CPU seconds so far)."""
        if not all(process.is_running() for process in self._found) or not self._found:
            self._found = psutil.Process().children(recursive=True)
        is_suspended, cpu_s = False, 0.0
        for process in self._found:
            try:
                is_suspended |= process.status() == psutil.STATUS_STOPPED
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu_s += times.user + times.system
        return is_suspended, cpu_s

    def kill(self) -> None:
        """However they are: a suspended process dies of it too."""
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
