"""What the gateway takes a step to have computed, against what the simulated engine did."""

import random

import pytest

from engine.sim.parameters import SimParameters
from engine.sim.simulator import Limits, Sequence, Simulator
from gateway.prefills import Prefill, Prefills

SLOTS = 64
BATCH = 512


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rate", "longest", "urgent", "parts"),
    [(0.3, 800, 0.25, (40, 20)), (0.9, 150, 0.9, (40, 20)), (0.9, 800, 0.0, (BATCH, BATCH // 2))],
    ids=["few", "many", "parts-that-fill-a-step"],
)
def test_the_tokens_of_a_step_are_known_without_asking(
    seed: int, rate: float, longest: int, urgent: float, parts: tuple[int, int]
) -> None:
    draw = random.Random(seed)
    engine: Simulator[int] = Simulator(SimParameters(step_us=1_000, kv_blocks=10_000), Limits(SLOTS, BATCH))
    prefills, in_parts, now_ns = Prefills(BATCH), 0, 0
    for number in range(3_000):
        if draw.random() < rate and engine.running_count < SLOTS // 2:
            tokens, priority = draw.randint(1, longest), 0 if draw.random() < urgent else draw.choice((1, 2))
            step_tokens = draw.choice(parts) // priority if priority else 0
            engine.submit(
                number,
                prompt_tokens=tokens,
                output_tokens=draw.randint(1, 20),
                priority=priority,
                step_tokens=step_tokens,
                now_ns=now_ns,
            )
            prefills.add(number, Prefill(tokens, step_tokens, is_running=True, sent_ns=now_ns, priority=priority))
        decodes = _decodes(engine)
        expected = prefills.in_step_tokens
        step = engine.step(now_ns)
        if step is None:
            continue
        now_ns = step.ended_ns
        for sequence in step.tokens:
            if sequence.generated == 1:
                prefills.start(sequence.owner)
        computed = prefills.step(decodes, in_time_ns=now_ns)
        assert computed == step.work.prefill_tokens
        assert expected >= computed, "as much, or less where answers take some of a full step"
        in_parts += 0 < computed < BATCH and bool(prefills)
    assert in_parts > 200, "the load must make prompts wait for each other"


def _decodes(engine: Simulator[int]) -> int:
    running: list[Sequence[int]] = engine._running
    return sum(1 for sequence in running if sequence.generated and sequence.uncomputed == 1)
