"""`python -m deploy.leash PARENT_PID NICENESS COMMAND...`: become COMMAND, and get SIGTERM when the parent dies.

So that `tidegate up` leaves no orphans even when it is killed with SIGKILL. Done here instead of in a preexec_fn, which
is unsafe in a process that has threads, as every process with gRPC in it does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_RETRY_S = 0.1
"""Linux lets those who are not root change one autogroup in so much time, of all on the machine."""
AUTOGROUP_TRIES = 20
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent_pid, niceness, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:
            raise SystemExit(1)  # it died before the line above
    if niceness:
        give_way(niceness)
    os.execv(command[0], command)


def give_way(niceness: int) -> None:
    """Run after others on this machine, with all that is started from here.

    Where Linux shares a machine out between sessions of processes (autogroups), it looks at the session's own value.
    """
    os.nice(niceness)
    for _ in range(AUTOGROUP_TRIES):
        try:
            if AUTOGROUP.exists():
                AUTOGROUP.write_text(str(niceness))
            return
        except BlockingIOError:
            time.sleep(AUTOGROUP_RETRY_S)
        except OSError:
            return  # it is only slower to answer


if __name__ == "__main__":
    main(sys.argv[1:])
