"""vLLM's processes end with the worker that started them, however it ended, and not before.

vLLM loads the entry points of `vllm.general_plugins` in each of its processes. Without this one a worker killed with
SIGKILL leaves an engine behind that holds gigabytes and a core, for ever; and Ctrl-C in the worker's terminal, which
asks the worker to drain, reaches the engine too, which aborts what it runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

WORKER_PID = "TIDEGATE_WORKER_PID"
"""Set by the worker for its children; vLLM on its own is left alone."""


def follow_worker() -> None:
    """Kill this process when the worker is gone; until then signals to the worker's group are not for it.

    Does nothing in the worker itself, or without one.
    """
    worker_pid = int(os.environ.get(WORKER_PID, "0"))
    if worker_pid in (0, os.getpid()) or not hasattr(os, "pidfd_open"):
        return
    with contextlib.suppress(PermissionError):  # it leads a session of its own
        os.setpgid(0, 0)
    threading.Thread(target=_follow, args=(worker_pid,), name="follow-worker", daemon=True).start()


def _follow(worker_pid: int) -> None:
    try:
        worker = os.pidfd_open(worker_pid)
    except ProcessLookupError:
        pass
    else:
        select.select([worker], [], [])
    os.kill(os.getpid(), signal.SIGKILL)
