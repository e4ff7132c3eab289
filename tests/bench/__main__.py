"""All benchmarks, one after another: `make bench`. One alone: `python -m tests.bench.relay`, `... .engine`."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("relay", "engine", "scheduler", "overload")


def main() -> int:
    # A process each: the relay benchmark pins itself to a core, which the engine's must not inherit.
    codes = [subprocess.run([sys.executable, "-m", f"tests.bench.{name}"]).returncode for name in BENCHMARKS]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
