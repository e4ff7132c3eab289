"""The parts of one machine, kept alive: workers and the gateway as processes, restarted when they die.

    while True: observe each part -> its Lifecycle decides -> do it -> tell the view

Stopping goes from the client inwards, so that no stream is cut: the gateway finishes its streams, then the workers end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from deploy.lifecycle import BecameReady, Decision, Died, GaveUp, Lifecycle, Start, State
from deploy.process import describe_exit
from protos.core.clock import SYSTEM_CLOCK, Clock
from protos.core.errors import ConfigError

TICK_S = 0.2
PROBE_READY_NS = 1_000_000_000
LAST_WORDS = 3
OWN = "tidegate: "
"""Begins what a Tidegate process says when it cannot go on."""
STARTING_PATIENCE_S = 2.0
HURRY_S = 5.0
"""What a part gets to end in good order without draining."""


class Child(Protocol):
    """What a part runs in; `deploy.process.Process` for real."""

    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def exit_code(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def tail(self, lines: int) -> list[str]: ...


class Part:
    """One process of the stack."""

    def __init__(self, name: str, address: str, child: Child, probe: Callable[[], bool]) -> None:
        self.name, self.address, self.child, self.probe = name, address, child, probe
        self.life = Lifecycle()
        self.is_stopping = False
        self._probed_ns = 0
        self._answers = False

    def observe(self, now_ns: int) -> Decision | None:
        exit_code = self.child.exit_code() if self.life.state is not State.WAITING else None
        return self.life.observe(now_ns, exit_code=exit_code, answers=exit_code is None and self._probe(now_ns))

    def status(self) -> PartStatus:
        state = "stopping" if self.is_stopping else str(self.life.state)
        return PartStatus(self.name, state, self.child.pid, self.address, self.life.restarts)

    def _probe(self, now_ns: int) -> bool:
        """A ready part is asked once a second, a starting one at every tick."""
        if self.life.state is State.WAITING:
            return False
        if self.life.state is not State.READY or now_ns - self._probed_ns >= PROBE_READY_NS:
            self._probed_ns, self._answers = now_ns, self.probe()
        return self._answers


class PartStatus(msgspec.Struct, frozen=True):
    name: str
    state: str
    pid: int | None
    address: str
    restarts: int


class Listener(Protocol):
    """Where the stack tells what happens. `event` is one line for the log, `show` the state now."""

    def event(self, line: str) -> None: ...
    def show(self, parts: Sequence[PartStatus]) -> None: ...


class Stack:
    """Owner of all parts. `parts` are in the order in which they stop."""

    def __init__(self, parts: Sequence[Part], listener: Listener, clock: Clock = SYSTEM_CLOCK) -> None:
        self.parts = parts
        self._listener, self._clock = listener, clock

    @property
    def is_ready(self) -> bool:
        return all(part.life.state is State.READY for part in self.parts)

    def run(self, until: Callable[[], bool]) -> None:
        """Keep the parts alive until `until()`. Raises ConfigError when one of them cannot be started."""
        while not until():
            self.tick()
            time.sleep(TICK_S)

    def tick(self) -> None:
        for part in self.parts:
            decision = part.observe(self._clock.mono_ns())
            if decision is not None:
                self._perform(part, decision)
        self._show()

    def stop(self, drain_s: float, is_hurried: Callable[[], bool]) -> None:
        """Drain part by part. After `drain_s` for one of them, or as soon as `is_hurried()`, it is to end at once."""
        for part in self.parts:
            # What never became ready has nothing to drain, and may be deep in loading a model.
            patience_s = (
                drain_s if part.life.state in (State.READY, State.SILENT) else min(drain_s, STARTING_PATIENCE_S)
            )
            part.is_stopping = True
            part.child.terminate()
            if not self._await_end(part, patience_s, is_hurried):
                # The second SIGTERM ends the drain: a gateway tells its clients so, and completes its capture.
                part.child.terminate()
                self._await_end(part, HURRY_S, lambda: False)
            part.child.kill()

    def _await_end(self, part: Part, patience_s: float, is_hurried: Callable[[], bool]) -> bool:
        """False where it still runs."""
        deadline_ns = self._clock.mono_ns() + int(patience_s * 1e9)
        while part.child.pid is not None and part.child.exit_code() is None:
            if is_hurried():
                return False
            if self._clock.mono_ns() > deadline_ns:
                self._listener.event(f"{part.name} did not end within {patience_s:.0f} s: ending it")
                return False
            self._show()
            time.sleep(TICK_S)
        return True

    def kill(self) -> None:
        """Leave nothing behind, at once. Safe to call again."""
        for part in self.parts:
            part.child.kill()

    def _perform(self, part: Part, decision: Decision) -> None:
        match decision:
            case Start():
                part.child.start()
            case BecameReady(took_ns):
                self._listener.event(f"{part.name} is ready on {part.address} after {took_ns / 1e9:.1f} s")
            case Died(exit_code, ran_ns, delay_ns):
                how = f"{describe_exit(exit_code)} after {ran_ns / 1e9:.0f} s"
                self._listener.event(f"{part.name} died ({how}); starting it again in {delay_ns / 1e9:.1f} s")
                self._quote(part, part.child.tail(LAST_WORDS))
            case GaveUp(exit_code):
                # What vLLM says of a failed start is above its own last line.
                self._quote(part, [line for line in part.child.tail(LAST_WORDS) if not line.startswith(OWN)])
                raise ConfigError(_last_words(part, exit_code))

    def _quote(self, part: Part, lines: Sequence[str]) -> None:
        for line in lines:
            self._listener.event(f"    {part.name}: {line}")

    def _show(self) -> None:
        self._listener.show([part.status() for part in self.parts])


def _last_words(part: Part, exit_code: int) -> str:
    """One line that says why a part could not be started: its own error line where it printed one."""
    lines = part.child.tail(LAST_WORDS)
    own = [line.removeprefix(OWN) for line in lines if line.startswith(OWN)]
    reason = own[-1] if own else (lines[-1].strip() if lines else "it printed nothing")
    return f"{part.name} cannot start ({describe_exit(exit_code)}): {reason}"
