"""What a step may compute, and who sits it out."""

from engine.yielding import Plan, Prompt, Yielding
from protos.core.contract import SIT_OUT_STEPS


def test_prompts_that_make_way_share_a_few_tokens_of_a_step() -> None:
    assert Yielding(8192).plan(40, _prompts((3000, 256), (100, 512), (700, 128))) == Plan(552)


def test_urgent_prompts_are_computed_whole_and_alone() -> None:
    assert Yielding(8192).plan(40, _prompts((2000, 0), (500, 512), (1000, 0))) == Plan(3040, is_urgent=True)


def test_no_step_computes_more_than_the_engine_can() -> None:
    assert Yielding(2048).plan(40, _prompts((3000, 0))) == Plan(2048, is_urgent=True)


def test_others_go_on_where_an_urgent_prompt_did_not() -> None:
    yielding = Yielding(8192)
    plans = [yielding.plan(0, _prompts((3000, 0), (100, 512))) for _ in range(4)]
    assert [plan.is_urgent for plan in plans] == [True, False, True, False]


def test_one_that_comes_after_another_is_not_taken_for_it() -> None:
    yielding = Yielding(8192)
    yielding.plan(0, [Prompt("first", 300, 0), Prompt("other", 100, 512)])
    assert yielding.plan(0, [Prompt("second", 300, 0), Prompt("other", 100, 512)]).is_urgent


def test_one_that_is_held_up_is_so_whoever_comes_meanwhile() -> None:
    yielding = Yielding(8192)
    yielding.plan(0, [Prompt("first", 300, 0), Prompt("other", 100, 512)])
    again = [Prompt("first", 300, 0), Prompt("second", 20, 0), Prompt("other", 100, 512)]
    assert yielding.plan(0, again) == Plan(512)


def test_others_do_not_starve_where_urgent_prompts_come_all_the_time() -> None:
    yielding = Yielding(8192)
    other = Prompt("other", 100, 512)
    plans = [yielding.plan(0, [Prompt(number, 100, 0), other]) for number in range(2 * SIT_OUT_STEPS + 2)]
    assert [plan.is_urgent for plan in plans] == 2 * (SIT_OUT_STEPS * [True] + [False])
    assert plans[SIT_OUT_STEPS] == Plan(512)


def test_nobody_sits_out_where_all_are_urgent() -> None:
    yielding = Yielding(8192)
    plans = [yielding.plan(0, [Prompt(number, 100, 0)]) for number in range(3 * SIT_OUT_STEPS)]
    assert all(plan.is_urgent for plan in plans)


def _prompts(*prompts: tuple[int, int]) -> list[Prompt]:
    return [Prompt(number, tokens, step_tokens) for number, (tokens, step_tokens) in enumerate(prompts)]
