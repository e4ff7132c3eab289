"""Which prompts a step computes, as far as that is known without asking."""

from gateway.prefills import Prefill, Prefills

BATCH = 1_000
PART = 100


def prefills(*given: tuple[int, int]) -> Prefills:
    """(tokens, step_tokens) of prompts in the running step, numbered from 0."""
    result = Prefills(BATCH)
    for number, (tokens, step_tokens) in enumerate(given):
        result.add(number, Prefill(tokens, step_tokens, is_running=True, sent_ns=0))
    return result


def test_a_prompt_of_more_than_a_step_is_computed_in_parts() -> None:
    given = prefills((2_500, 0))
    assert (given.in_step_tokens, given.ahead_urgent_tokens) == (1_000, 1_500)
    assert [given.step(200, in_time_ns=10), given.step(200, in_time_ns=10)] == [800, 800]
    given.start(0)
    assert given.step(0, in_time_ns=10) == 900
    assert given.unstarted_tokens == 0


def test_prompts_that_make_way_share_a_part_of_a_step() -> None:
    given = prefills((150, PART), (80, PART))
    assert (given.in_step_tokens, given.ahead_tokens) == (100, 130)
    assert given.step(500, in_time_ns=10) == PART
    given.start(0)
    assert given.step(500, in_time_ns=10) == PART, "50 of the first, 50 of the second"
    given.start(1)
    assert given.step(500, in_time_ns=10) == 30


def test_they_sit_out_a_step_that_computes_another_prompt() -> None:
    given = prefills((150, PART), (300, 0))
    assert (given.in_step_tokens, given.ahead_tokens) == (300, 150)
    given.start(1)
    assert given.step(0, in_time_ns=10) == 300
    assert given.unstarted_tokens == 150
    assert given.step(0, in_time_ns=10) == PART


def test_an_urgent_prompt_waits_for_others_like_it_alone() -> None:
    given = prefills((150, PART))
    given.add(1, Prefill(300, 0, is_running=False, sent_ns=5))
    assert (given.ahead_urgent_tokens, given.ahead_tokens) == (300, 350)


def test_a_prompt_that_was_held_up_is_unknown_until_its_first_token() -> None:
    given = prefills((200, 0), (300, 0))
    given.start(0)
    assert given.step(0, in_time_ns=10) is None, "there was room for it"
    given.start(1)
    assert given.step(0, in_time_ns=10) is None
    assert given.step(0, in_time_ns=10) == 0


def test_books_that_are_ahead_of_the_engine_do_not_get_further_ahead() -> None:
    given = prefills((150, PART), (150, PART), (150, PART))
    assert given.step(0, in_time_ns=10) == PART
    for _ in range(3):
        assert given.step(0, in_time_ns=10) is None, "the 50 of the first would have been computed"
        assert given.unstarted_tokens == 350
    given.start(0)
    assert given.step(0, in_time_ns=10) is None
    assert given.step(0, in_time_ns=10) is None
    assert given.unstarted_tokens == 250, "50 of the second were computed beside the end of the first"


def test_a_cancelled_prompt_is_not_waited_for() -> None:
    given = prefills((150, PART), (300, 0))
    given.forget(1)
    assert (given.in_step_tokens, given.unstarted_tokens) == (PART, 150)
    assert given.forget(1) is None


def test_a_prompt_that_was_sent_when_the_step_before_ended_came_too_late() -> None:
    given = prefills((400, 0))
    given.add(1, Prefill(300, 0, is_running=False, sent_ns=10))
    given.add(2, Prefill(200, 0, is_running=False, sent_ns=11))
    given.add(3, Prefill(150, PART, is_running=False, sent_ns=11))
    assert (given.joining, given.ahead_urgent_tokens) == (2, 500)
    given.start(0)
    assert given.step(0, in_time_ns=10) == 400
    assert (given.in_step_tokens, given.joining, given.ahead_urgent_tokens, given.ahead_tokens) == (300, 1, 200, 350)
    given.start(1)
    assert given.step(0, in_time_ns=20) == 300
    assert (given.in_step_tokens, given.joining, given.ahead_tokens) == (200, 0, 150)


def test_a_prompt_that_was_not_too_late_is_counted_in_its_step() -> None:
    given = prefills((400, 0))
    given.add(1, Prefill(300, 0, is_running=False, sent_ns=11))
    given.start(0)
    given.step(0, in_time_ns=10)
    given.start(1)
    assert given.joining == 0
    assert given.step(0, in_time_ns=20) == 300
    assert given.unstarted_tokens == 0


def test_a_cancelled_prompt_delays_nobody() -> None:
    given = prefills((400, 0))
    given.add(1, Prefill(300, 0, is_running=False, sent_ns=5))
    given.add(2, Prefill(300, PART, is_running=False, sent_ns=5))
    assert given.joining == 1
    given.forget(1)
    assert given.joining == 0
