"""How long before a step ends a prompt has to be sent to be in the next one: learned from which step it was in."""

import random

import pytest

from gateway.handover import FIRST_NS, GROWTH, LEAST_NS, Handover

MS = 1_000_000
STEP_NS = 20 * MS


def run(handover: Handover, needed_ns: float, prompts: int, late_share: float = 0.0) -> None:
    """Prompts are sent at any time in a step; some are late for other reasons."""
    draw = random.Random(1)
    for request in range(prompts):
        early_ns = draw.randrange(STEP_NS)
        handover.sent(request, 0)
        handover.stepped(early_ns, step=1)
        is_late = early_ns < needed_ns or draw.random() < late_share
        if is_late:
            handover.stepped(early_ns + STEP_NS, step=2)
        handover.started(request, step=1 + is_late)


@pytest.mark.parametrize("needed_ms", [0.2, 0.5, 2, 10])
@pytest.mark.parametrize("late_share", [0.0, 0.03])
def test_what_it_takes_is_learned(needed_ms: float, late_share: float) -> None:
    handover = Handover()
    run(handover, needed_ms * MS, 3_000, late_share)
    assert handover.needed_ns == pytest.approx(needed_ms * MS + late_share * STEP_NS, rel=0.35)


def test_worker_where_everybody_is_a_step_late_needs_a_step() -> None:
    handover = Handover()
    run(handover, 2 * STEP_NS, 3_000)
    assert STEP_NS / GROWTH < handover.needed_ns < STEP_NS * GROWTH


def test_wire_that_takes_no_time_leaves_a_little() -> None:
    handover = Handover()
    run(handover, 0, 30_000)
    assert handover.needed_ns == LEAST_NS


def test_prompts_that_say_nothing_change_nothing() -> None:
    handover = Handover()
    handover.started(1, step=1)  # of an idle worker
    handover.sent(2, 0)
    handover.stepped(STEP_NS // 2, step=1)
    handover.dropped(2)
    handover.sent(3, STEP_NS)
    handover.dropped(3)
    for step in range(2, 5):
        handover.stepped(step * STEP_NS, step)
    for request in (2, 3):
        handover.started(request, step=4)
    assert handover.needed_ns == FIRST_NS
