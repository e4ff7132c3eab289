"""How long a prompt is, before a worker has counted."""

import random

import pytest

from gateway.fit import WARM
from gateway.lengths import BYTES_PER_TOKEN, PromptLengths


def test_tokens_of_a_prompt_are_learned_with_what_its_template_adds() -> None:
    lengths, draw = PromptLengths(), random.Random(1)
    assert lengths.predict("m", 400) == 400 // BYTES_PER_TOKEN + 1
    for _ in range(10 * WARM):
        size = draw.randint(40, 4_000)
        lengths.learn("m", size, 30 + round(size / 5.5 + draw.gauss(0, 3)))
    for size in (60, 1_000, 20_000):
        assert lengths.predict("m", size) == pytest.approx(30 + size / 5.5, rel=0.05)
    assert lengths.predict("another", 400) == 400 // BYTES_PER_TOKEN + 1


def test_a_few_prompts_say_nothing_and_none_has_no_token() -> None:
    lengths = PromptLengths()
    for _ in range(WARM - 1):
        lengths.learn("m", 1_000, 10)
    assert lengths.predict("m", 1_000) == 1_000 // BYTES_PER_TOKEN + 1
    lengths.learn("m", 1_000, 10)
    assert lengths.predict("m", 1_000) == 10
    assert lengths.predict("m", 0) >= 1
