"""What a step may compute, and who sits it out."""

from engine.yielding import Plan, Yielding


def test_prompts_that_make_way_share_a_few_tokens_of_a_step() -> None:
    assert Yielding(8192).plan(40, [(3000, 256), (100, 512), (700, 128)]) == Plan(552)


def test_urgent_prompts_are_computed_whole_and_alone() -> None:
    assert Yielding(8192).plan(40, [(2000, 0), (500, 512), (1000, 0)]) == Plan(3040, is_urgent=True)


def test_no_step_computes_more_than_the_engine_can() -> None:
    assert Yielding(2048).plan(40, [(3000, 0)]) == Plan(2048, is_urgent=True)


def test_others_go_on_where_an_urgent_prompt_did_not() -> None:
    yielding = Yielding(8192)
    plans = [yielding.plan(0, [(3000, 0), (100, 512)]) for _ in range(4)]
    assert [plan.is_urgent for plan in plans] == [True, False, True, False]
