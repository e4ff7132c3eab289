"""`python -m deploy.leash PARENT_PID COMMAND...`: become COMMAND, and get SIGTERM when the parent dies.

So that `tidegate up` leaves no orphans even when it is killed with SIGKILL. Done here instead of in a preexec_fn, which
is unsafe in a process that has threads, as every process with gRPC in it does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:
            raise SystemExit(1)  # it died before the line above
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
