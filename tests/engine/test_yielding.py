"""What a step may compute, and who sits it out."""

from engine.yielding import Plan, Yielding, limit_of


def test_prompts_that_yield_share_a_few_tokens_of_a_step() -> None:
    assert Yielding(8192, 512).plan(decode_tokens=40, urgent_tokens=0) == Plan(552)


def test_urgent_prompts_are_computed_whole_and_alone() -> None:
    assert Yielding(8192, 512).plan(decode_tokens=40, urgent_tokens=3000) == Plan(3040, is_urgent=True)


def test_no_step_computes_more_than_the_engine_can() -> None:
    assert Yielding(2048, 512).plan(decode_tokens=40, urgent_tokens=3000) == Plan(2048, is_urgent=True)


def test_others_go_on_where_an_urgent_prompt_did_not() -> None:
    yielding = Yielding(8192, 512)
    plans = [yielding.plan(decode_tokens=0, urgent_tokens=3000) for _ in range(4)]
    assert [plan.is_urgent for plan in plans] == [True, False, True, False]


def test_without_a_setting_it_is_a_share_of_the_step_and_0_is_off() -> None:
    assert [limit_of(setting, 8192) for setting in (None, 100, 0)] == [256, 100, 0]
    assert not Yielding(8192, 0).is_on
