"""Processes killed, suspended and restarted under load. `tests/bench/faults.py` does it at length."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from gateway.session import SILENCE_NS
from protos.core.record import Outcome
from tests.gateway.faults import Load, Stack, judge, outcomes, stack
from tests.gateway.processes import wait_for

WORKERS, CLIENTS, TOKENS, STEP_MS = 3, 24, 40, 20.0


@pytest.fixture(scope="module")
def s(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("faults"), WORKERS, STEP_MS) as it:
        yield it


async def test_no_fault_of_a_worker_costs_an_answer_or_a_token(s: Stack) -> None:
    """One of three killed, then one suspended, then all restarted one by one; a third of the answers are no streams."""
    load = Load(s.gateway.port, CLIENTS, TOKENS, is_stream=lambda number: number % 3 > 0)
    noticed_s = 0.0

    def faults() -> None:
        nonlocal noticed_s
        s.kill(0)
        s.start(0)
        noticed_s = s.suspend(1)
        s.go_on(1)
        s.roll()

    await load.run(faults)
    records = s.records(len(load.answers))
    verdict = judge(load, records)
    assert verdict.wrong == []
    assert verdict.lost_or_twice == 0
    assert outcomes(records) == {Outcome.FINISHED}
    assert verdict.resumed > 0
    assert verdict.amplification <= 1.2
    assert noticed_s <= 5.5, "5 s, and a look at the state"
    state = s.gateway.state()
    assert (state["active"], state["queued"], state["leases"]) == (0, 0, 0)
    assert "Traceback" not in s.gateway.output


async def test_gateway_that_was_suspended_keeps_its_workers(s: Stack) -> None:
    """On waking it has heard nobody for longer than it would wait; the answers of that time come all at once."""
    load = Load(s.gateway.port, 4, TOKENS, is_stream=lambda _: True)

    def faults() -> None:
        wait_for(lambda: s.gateway.state()["leases"], "something runs")
        s.gateway.process.send_signal(signal.SIGSTOP)
        time.sleep(SILENCE_NS / 1e9 + 2)
        s.gateway.process.send_signal(signal.SIGCONT)
        wait_for(lambda: len(load.answers) >= 8, "answers come again")

    lost_before = s.gateway.output.count("silent for")
    await load.run(faults)
    assert load.errors == []
    assert s.gateway.output.count("silent for") == lost_before
