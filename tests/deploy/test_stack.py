from __future__ import annotations

from collections.abc import Sequence

import pytest

from deploy.stack import Part, PartStatus, Stack
from protos.core.errors import ConfigError


class FakeChild:
    """Runs from `start` until told otherwise; `obeys` says which SIGTERM ends it, the first one or a later one."""

    def __init__(self, name: str, log: list[str], *, obeys: int = 1) -> None:
        self.name, self.log, self.obeys = name, log, obeys
        self.pid: int | None = None
        self.code: int | None = None
        self.lines: list[str] = []

    def start(self) -> None:
        self.pid, self.code = 4242, None
        self.log.append(f"start {self.name}")

    def die(self, code: int) -> None:
        self.pid, self.code = None, code

    def exit_code(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.log.append(f"terminate {self.name}")
        self.obeys -= 1
        if not self.obeys:
            self.die(0)

    def kill(self) -> None:
        if self.pid is not None:
            self.log.append(f"kill {self.name}")
            self.die(-9)

    def tail(self, lines: int) -> list[str]:
        return self.lines[-lines:]


class FakeClock:
    """Moves one second with every look."""

    def __init__(self) -> None:
        self.now = 0

    def mono_ns(self) -> int:
        self.now += 1_000_000_000
        return self.now

    wall_ns = mono_ns


class Ear:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.parts: Sequence[PartStatus] = ()

    def event(self, line: str) -> None:
        self.events.append(line)

    def show(self, parts: Sequence[PartStatus]) -> None:
        self.parts = parts


class World:
    def __init__(self, *, obeys: int = 1) -> None:
        self.log: list[str] = []
        self.ear = Ear()
        self.gateway = FakeChild("gateway", self.log)
        self.worker = FakeChild("worker-1", self.log, obeys=obeys)
        parts = [Part(c.name, f"127.0.0.1:{n}", c, lambda c=c: c.pid is not None) for n, c in enumerate(self.children)]
        self.stack = Stack(parts, self.ear, FakeClock())

    @property
    def children(self) -> tuple[FakeChild, FakeChild]:
        return self.gateway, self.worker

    def tick(self, times: int) -> None:
        for _ in range(times):
            self.stack.tick()


def test_all_parts_start_and_become_ready() -> None:
    world = World()
    world.tick(2)
    assert world.log == ["start gateway", "start worker-1"]
    assert world.stack.is_ready
    assert [part.state for part in world.ear.parts] == ["ready", "ready"]


def test_dead_worker_is_named_with_its_last_words_and_started_again() -> None:
    world = World()
    world.tick(2)
    world.worker.lines = ["loading", "RuntimeError: out of memory"]
    world.worker.die(-9)
    world.tick(3)
    assert world.log.count("start worker-1") == 2
    assert any("worker-1 died (killed by SIGKILL" in line for line in world.ear.events)
    assert any("RuntimeError: out of memory" in line for line in world.ear.events)
    assert world.ear.parts[1].restarts == 1


def test_part_that_cannot_start_is_one_line_with_its_own_reason() -> None:
    world = World()
    world.tick(1)
    world.worker.lines = ["tidegate: no model called nope: run `tidegate model ls`"]
    world.worker.die(2)
    with pytest.raises(ConfigError) as caught:
        world.tick(1)
    assert str(caught.value) == "worker-1 cannot start (exit 2): no model called nope: run `tidegate model ls`"


def test_what_a_part_printed_before_it_gave_up_is_shown() -> None:
    world = World()
    world.tick(1)
    world.worker.lines = ["ValueError: no memory", "tidegate: the engine did not start: see above"]
    world.worker.die(2)
    with pytest.raises(ConfigError, match="the engine did not start"):
        world.tick(1)
    assert world.ear.events[-1] == "    worker-1: ValueError: no memory"


def test_gateway_ends_before_the_workers() -> None:
    world = World()
    world.tick(2)
    world.stack.stop(10.0, is_hurried=lambda: False)
    assert world.log[2:] == ["terminate gateway", "terminate worker-1"]


NEVER = 99


def test_part_that_does_not_drain_in_time_is_told_to_hurry_and_then_killed() -> None:
    world = World(obeys=NEVER)
    world.tick(2)
    world.stack.stop(2.0, is_hurried=lambda: False)
    assert world.log[2:] == ["terminate gateway", "terminate worker-1", "terminate worker-1", "kill worker-1"]
    assert any("worker-1 did not end within 2 s" in line for line in world.ear.events)


def test_second_interrupt_lets_a_part_end_in_good_order() -> None:
    """A gateway that is killed breaks its streams off, and its capture."""
    world = World(obeys=2)
    world.tick(2)
    world.stack.stop(1e6, is_hurried=lambda: True)
    assert world.log[2:] == ["terminate gateway", "terminate worker-1", "terminate worker-1"]


def test_second_interrupt_kills_what_does_not_end() -> None:
    world = World(obeys=NEVER)
    world.tick(2)
    world.stack.stop(1e6, is_hurried=lambda: True)
    assert world.log[-1] == "kill worker-1"
