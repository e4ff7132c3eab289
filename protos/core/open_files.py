"""How many files a process may have open: a connection is one."""

from __future__ import annotations

import resource

OPEN_MAX = 10240
"""The most on macOS, which calls it unlimited, but refuses to set that: setrlimit(2)."""


def allow_open_files() -> None:
    """Use what the system allows, not its cautious default."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(now, OPEN_MAX) if most == resource.RLIM_INFINITY else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
