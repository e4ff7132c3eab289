"""Admission in settings that nobody has chosen: whatever engine and traffic meet, who is admitted is mostly in time."""

import random

import msgspec
import pytest

from tests.virtual.harness import SECOND_NS
from tests.virtual.workload import Engine, Slo, engine, gateway, poisson

REQUESTS = 1_500
LEARNING = 0.25
"""Share of the run in which a cold gateway learns."""
OVERLOADED = 4.0
PRESETS = (None, "azure-2023-code", "azure-2023-conv", "mooncake-synthetic", "arena")


class Setting(msgspec.Struct, frozen=True):
    model: Engine
    preset: str | None
    patience_s: int
    workers: int
    rate: float
    """Requests per second: far more than the workers carry."""
    has_fixed_output: bool


def draw(seed: int) -> Setting:
    chance = random.Random(seed)
    model = msgspec.structs.replace(
        engine(chance.choice(("qwen3-14b-a100", "qwen3-14b-h100"))),
        max_sequences=chance.choice((4, 16, 64, 256)),
        max_batch_tokens=chance.choice((512, 2_048, 8_192)),
    )
    workers = chance.choice((1, 3))
    return Setting(
        model=model,
        preset=chance.choice(PRESETS),
        patience_s=chance.choice((1, 3, 10)),
        workers=workers,
        rate=workers * OVERLOADED * (3.0 if model.max_sequences > 16 else 1.0),
        has_fixed_output=chance.random() < 0.3,
    )


@pytest.mark.parametrize("seed", range(16))
def test_who_is_admitted_is_mostly_in_time(seed: int) -> None:
    it = draw(seed)
    slo = Slo(ttft_ns=it.patience_s * SECOND_NS)
    seconds = max(8.0 * it.patience_s, REQUESTS / it.rate)
    arrivals = [
        msgspec.structs.replace(one, has_fixed_output=it.has_fixed_output)
        for one in poisson(it.rate, seconds, seed=seed + 1, slo=slo, preset=it.preset)
    ]
    results = gateway(it.model, slo, workers=it.workers).run(arrivals)
    admitted = [one for one in results if one.arrival.at_ns > LEARNING * seconds * SECOND_NS and not one.is_refused]
    in_time = sum(bool(one.first_token_ns) and one.ttft_ns <= slo.ttft_ns for one in admitted)
    assert in_time >= 0.85 * len(admitted) > 50, it
