"""`tidegate demo`: the tour, unattended. Serve, send prompts as a few users, capture, replay at 10x, compare."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from deploy.plan import LOOPBACK, TIDEGATE
from deploy.up import asked_to_stop, load_settings, prepare, running
from protos.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.stack import Stack

PROMPTS = Path(__file__).parent / "prompts.txt"
MAX_TOKENS = 32
USERS = 6
SPEED = 10
CAPTURE_WAIT_S = 10.0
MAX_UNATTRIBUTED_SHARE = 0.01
FAILED = 1


def demo(
    backend: Annotated[str | None, typer.Option(help="auto, vllm or sim.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for captures, reports and logs.")
    ] = None,
) -> None:
    """Take the tour: serve, send prompts as a few users, capture, replay at 10x, compare."""
    folder = output or Path("reports") / time.strftime("demo-%Y%m%d-%H%M%S")
    problems = tour(folder, backend)
    for problem in problems:
        print(f"demo: FAILED: {problem}")
    if problems:
        raise typer.Exit(FAILED)
    print(f"demo: all requests answered, all phases sum to end-to-end; everything is in {folder}/")


def tour(folder: Path, backend: str | None) -> list[str]:
    """Returns what did not hold. Raises ConfigError when the stack or a step of the tour cannot run."""
    from rich.console import Console

    console = Console(highlight=False)
    settings = load_settings(None, settings_of(folder, backend))
    url = f"http://{LOOPBACK}:{settings.port}"
    workload, captures = folder / "prompts.jsonl.zst", Path(settings.capture_dir)
    with asked_to_stop() as times_asked:
        commands, _ = prepare(settings, None, console)
        with running(settings, commands, console) as (stack, view):
            step = Steps(stack, lambda: times_asked() > 0, folder)
            view.event("demo 1/4: starting a gateway and a worker")
            stack.run(until=lambda: stack.is_ready or times_asked() > 0)
            view.event(f"demo 2/4: {USERS} users send the prompts of {PROMPTS}; the gateway captures everything")
            step("workload", "import", "prompts", str(PROMPTS), "--max-tokens", str(MAX_TOKENS), "-o", str(workload))
            step("replay", "run", str(workload), "--target", url, "--lengths", "free", "--users", str(USERS),
                 "--spawn-rate", "2", "--think-time", "0.5", "-o", str(folder / "recorded"))  # fmt: skip
            capture = await_capture(stack, captures, read_summary(folder / "recorded").sent)
            view.event(f"demo 3/4: replaying {capture} at {SPEED}x")
            step("replay", "run", str(capture), "--target", url, "--speed", str(SPEED), "-o", str(folder / "replayed"))
            view.event("demo 4/4: the report\n")
            view.event((folder / "replayed" / "report.txt").read_text())
            step("capture", "verify", str(capture))
            stack.stop(settings.drain_s, is_hurried=lambda: times_asked() > 1)
    return [problem for name in ("recorded", "replayed") for problem in judge(name, read_summary(folder / name))]


def settings_of(folder: Path, backend: str | None) -> dict[str, object]:
    from deploy.probe import free_port

    return {
        "backend": backend,
        "port": free_port(),
        "operator_port": free_port(),
        "worker_port": free_port(),
        "capture_dir": str(folder / "captures"),
        "capture_level": "full",
        "log_dir": str(folder / "logs"),
    }


class Steps:
    """Runs `tidegate` commands one after another while the stack is kept alive; their output goes to the log folder."""

    def __init__(self, stack: Stack, is_interrupted: Callable[[], bool], folder: Path) -> None:
        self._stack, self._is_interrupted, self._log = stack, is_interrupted, folder / "logs" / "tour.log"

    def __call__(self, *arguments: str) -> None:
        """Raises ConfigError when the command fails or the user stops the tour."""
        if self._is_interrupted():
            raise ConfigError("the demo was interrupted")
        with self._log.open("ab") as log:
            process = subprocess.Popen([*TIDEGATE, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._stack.run(until=lambda: process.poll() is not None or self._is_interrupted())
        finally:
            process.terminate()
            process.wait()
        if process.returncode != 0:
            raise ConfigError(f"`tidegate {' '.join(arguments[:2])}` ended with {process.returncode}: see {self._log}")


class SumCheck(msgspec.Struct, frozen=True):
    checked: int
    broken: int
    max_unattributed_share: float


class Summary(msgspec.Struct, frozen=True):
    """What the demo needs of a replay's summary.json."""

    planned: int
    sent: int
    fates: dict[str, int]
    sum_check: SumCheck


def read_summary(run: Path) -> Summary:
    return msgspec.json.decode((run / "summary.json").read_bytes(), type=Summary)


def judge(name: str, summary: Summary) -> list[str]:
    """What a run promised and did not keep."""
    check, problems = summary.sum_check, []
    if summary.fates.get("finished", 0) != summary.planned:
        problems.append(f"{name}: {summary.fates} of {summary.planned} requests")
    if check.checked != summary.planned or check.broken:
        problems.append(f"{name}: phases sum to end-to-end for {check.checked - check.broken} of {summary.planned}")
    if check.max_unattributed_share >= MAX_UNATTRIBUTED_SHARE:
        problems.append(f"{name}: {check.max_unattributed_share:.1%} of a request's time is unattributed")
    return problems


def await_capture(stack: Stack, captures: Path, entries: int) -> Path:
    """The capture that holds all that was sent; the gateway writes it out within a second. Raises ConfigError."""
    from protos.core.capture import read_capture

    deadline_s = time.monotonic() + CAPTURE_WAIT_S
    found = 0
    while time.monotonic() < deadline_s:
        stack.tick()
        for capture in captures.iterdir():
            found = sum(1 for _ in read_capture(capture))
            if found >= entries:
                return capture
        time.sleep(0.2)
    raise ConfigError(f"{captures} holds {found} of {entries} requests after {CAPTURE_WAIT_S:.0f} s")
