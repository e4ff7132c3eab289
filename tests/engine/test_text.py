"""What the simulated engine says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.sim.parameters import SimParameters
from engine.sim.prompt import TOKEN_BYTES
from engine.sim.text import VOCABULARY, VOCABULARY_SIZE, Script, fake_logprob, write_script
from protos.core.contract import Sampling, TextPrompt

PARAMETERS = SimParameters(mean_output_tokens=32)


def script(prompt: str = "hello", limit: int = 64, choice: int = 0, **sampling: object) -> Script:
    return write_script(TextPrompt(prompt), Sampling(**sampling), choice, limit, PARAMETERS)  # type: ignore[arg-type]


def text(of: Script) -> str:
    return "".join(of.text(index) for index in range(of.output_tokens))


def test_vocabulary_has_no_word_twice() -> None:
    assert len(set(VOCABULARY)) == VOCABULARY_SIZE


def test_tokens_are_four_bytes_as_those_of_a_prompt_are() -> None:
    assert {len(word.encode()) for word in VOCABULARY} == {TOKEN_BYTES}


def test_prompt_seed_and_choice_each_decide_the_text() -> None:
    texts = [text(script(ignore_eos=True, **changed)) for changed in ({}, {"seed": 1}, {"choice": 1}, {"prompt": "b"})]
    assert len(set(texts)) == 4
    assert texts[0] == text(script(ignore_eos=True))


def test_answers_end_by_themselves_at_the_mean_length() -> None:
    lengths = [script(str(number), limit=1000).output_tokens for number in range(400)]
    assert 28 < sum(lengths) / len(lengths) < 36
    assert script("0", limit=1000).finish_reason == "stop"


def test_min_tokens_holds_the_end_back() -> None:
    assert script(limit=200, min_tokens=150).output_tokens == 150


@given(st.text(max_size=20), st.integers(1, 80), st.integers(0, 100), st.lists(st.sampled_from("aeiou."), max_size=3))
def test_script_keeps_its_limits(prompt: str, limit: int, min_tokens: int, stop: list[str]) -> None:
    said = script(prompt, limit, min_tokens=min_tokens, stop=tuple(stop), ignore_eos=True)
    assert 1 <= said.output_tokens <= limit
    assert said.finish_reason in ("stop", "length")
    assert said.output_tokens > min(min_tokens, limit) or said.finish_reason == "length"
    whole = text(script(prompt, limit, ignore_eos=True))
    assert whole.startswith(text(said))


@given(st.text(max_size=20), st.text("aeioubcd", min_size=1, max_size=3))
def test_stop_string_is_found_across_tokens_and_cut_off(prompt: str, stop: str) -> None:
    whole = text(script(prompt, ignore_eos=True))
    said = script(prompt, ignore_eos=True, stop=(stop,))
    assert text(said) == whole.split(stop)[0]
    assert (said.finish_reason == "stop") == (stop in whole)


def test_logprobs_fall_with_rank() -> None:
    logprob = fake_logprob(script(), 0, 4)
    assert [item.logprob for item in logprob.top] == sorted((item.logprob for item in logprob.top), reverse=True)
    assert logprob.top[0].token == logprob.token
    assert len({item.token for item in logprob.top}) == 4
