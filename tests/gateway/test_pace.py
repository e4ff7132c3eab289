"""Running answers keep their pace, and prompts are never held for ever."""

from gateway.pace import SAVED_STEPS, SHARE, Pace

MS = 1_000_000
TARGET_NS = 100 * MS


def test_without_a_target_every_prompt_may_start() -> None:
    pace = Pace()
    pace.stepped(10**12, has_prefill=True)
    assert pace.allows(10**12, 10**12)


def test_answers_get_a_token_per_target_on_average_whatever_the_prompts() -> None:
    pace, steps, elapsed_ns = Pace(TARGET_NS), 0, 0
    while elapsed_ns < 600 * 1_000 * MS:
        has_prefill = pace.allows(0, 0)
        step_ns = (30 + 300 * has_prefill) * MS
        pace.stepped(step_ns, has_prefill=has_prefill)
        elapsed_ns += step_ns
        steps += 1
    assert 0.98 * SHARE * TARGET_NS <= elapsed_ns / steps <= 1.02 * SHARE * TARGET_NS


def test_prompts_that_are_not_computed_yet_use_up_the_credit() -> None:
    pace = Pace(TARGET_NS)
    saved_ns = SAVED_STEPS * SHARE * TARGET_NS
    assert pace.allows(saved_ns, 0)
    assert not pace.allows(saved_ns + MS, 0)


def test_a_step_takes_several_prompts_only_while_it_stays_short() -> None:
    pace = Pace(TARGET_NS)
    assert pace.allows(0, 80 * MS)
    assert not pace.allows(0, 120 * MS)


def test_an_engine_that_misses_the_target_by_itself_still_gets_prompts() -> None:
    pace, prompts = Pace(TARGET_NS), 0
    for _ in range(10_000):
        has_prefill = pace.allows(0, 0)
        prompts += has_prefill
        pace.stepped(500 * MS, has_prefill=has_prefill)
    assert prompts > 10_000 / 60


def test_rest_forgives_what_was_owed() -> None:
    pace = Pace(TARGET_NS)
    for _ in range(20):
        pace.stepped(10**9, has_prefill=True)
    assert not pace.allows(0, 0)
    pace.rest()
    assert pace.allows(0, 0)


def test_a_step_may_take_what_the_youngest_answer_has_saved() -> None:
    pace = Pace(TARGET_NS)
    part_ns = SHARE * TARGET_NS - 20 * MS
    assert pace.part_ns(20 * MS) == part_ns
    pace.started()
    pace.stepped(10 * MS, has_prefill=True)
    assert pace.slack_ns == 0, "that step was over when it began"
    for steps in range(1, 4):
        pace.stepped(20 * MS, has_prefill=False)
        assert pace.slack_ns == steps * part_ns
    pace.stepped(500 * MS, has_prefill=True)
    assert pace.slack_ns == 0
    pace.started()
    pace.stepped(20 * MS, has_prefill=True)
    pace.stepped(20 * MS, has_prefill=False)
    assert pace.slack_ns == 0, "an older one is still behind"
    pace.rest()
    pace.stepped(20 * MS, has_prefill=False)
    assert pace.slack_ns == part_ns


def test_an_engine_that_misses_the_target_by_itself_computes_a_little_of_a_prompt_in_a_step() -> None:
    assert 0 < Pace(TARGET_NS).part_ns(10 * TARGET_NS) <= 0.1 * TARGET_NS
