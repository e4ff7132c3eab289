from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from protos.core.contract import Sampling
from protos.core.record import Outcome
from replay.body import encode_body
from replay.text import block_text, prompt_text
from replay.workload import FullBody, Recorded, SyntheticBody, WorkloadRequest


def body_of(request: WorkloadRequest, *, is_length_pinned: bool = True) -> Any:
    return json.loads(encode_body(request, "m", is_length_pinned=is_length_pinned))


def full(fields: dict[str, Any], **changes: Any) -> WorkloadRequest:
    body = FullBody(msgspec.Raw(json.dumps(fields).encode()))
    return WorkloadRequest(at_ns=0, session="s", body=body, **{"output_tokens": 12} | changes)


def synthetic(**changes: Any) -> WorkloadRequest:
    values: dict[str, Any] = {"body": SyntheticBody(40, ("a", "b"), 32), "output_tokens": 12}
    return WorkloadRequest(at_ns=0, session="s", **values | changes)


def test_recorded_body_is_kept_but_for_model_and_length() -> None:
    recorded = {"model": "old", "messages": [{"role": "user", "content": "ä"}], "stream": True, "top_p": 0.5, "x": None}
    assert body_of(full(recorded)) == recorded | {
        "model": "m",
        "max_tokens": 12,
        "min_tokens": 12,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


def test_free_length_leaves_the_recorded_limits() -> None:
    recorded = {"messages": [], "max_completion_tokens": 99}
    assert body_of(full(recorded, is_stream=False), is_length_pinned=False) == recorded | {"model": "m"}


def test_free_length_of_a_made_up_prompt_is_not_the_recorded_one() -> None:
    """A hashed capture knows what the client had allowed; a trace of lengths has nothing but them."""
    recorded = Recorded(outcome=Outcome.FINISHED, status=200)
    for sampling, allowed in ((Sampling(max_tokens=50), 50), (Sampling(), None)):
        found = body_of(
            synthetic(body=SyntheticBody(40, ("a",), 40, sampling), recorded=recorded), is_length_pinned=False
        )
        assert (found.get("max_tokens"), "min_tokens" in found) == (allowed, False)
    assert body_of(synthetic(), is_length_pinned=False)["max_tokens"] == 12


def test_length_of_several_choices_is_shared_by_them() -> None:
    found = body_of(full({"messages": [], "n": 3, "max_completion_tokens": 99}))
    assert found["max_tokens"] == 4
    assert "max_completion_tokens" not in found


def test_generate_gets_no_field_that_it_does_not_know() -> None:
    assert body_of(full({"prompt": "a", "max_tokens": 99}, endpoint="/generate", is_stream=False)) == {
        "prompt": "a",
        "max_tokens": 12,
    }
    assert set(body_of(synthetic(endpoint="/generate", is_stream=False))) == {"prompt", "max_tokens", "temperature"}


def test_made_up_request_asks_for_the_recorded_length_greedily() -> None:
    found = body_of(synthetic())
    assert [found[key] for key in ("max_tokens", "min_tokens", "ignore_eos", "temperature")] == [12, 12, True, 0]
    assert found["stream"] is True
    assert len(found["messages"][0]["content"]) == 160
    assert "prompt" in body_of(synthetic(endpoint="/v1/completions"))
    assert "stream" not in body_of(synthetic(is_stream=False))


def test_sampling_that_costs_work_is_kept() -> None:
    sampling = Sampling(n=2, logprobs=3, max_tokens=50, temperature=0.8)
    body = SyntheticBody(4, ("a",), 4, sampling)
    found = body_of(synthetic(body=body, output_tokens=None))
    assert (found["n"], found["top_logprobs"], found["max_tokens"], found["temperature"]) == (2, 3, 50, 1.0)


@given(st.text(max_size=10), st.integers(1, 50_000), st.integers(0, 3000))
def test_shorter_block_is_the_start_of_a_longer_one(name: str, tokens: int, more: int) -> None:
    short = block_text(name, tokens)
    assert len(short) == 4 * tokens
    assert len(short.split()) == tokens
    assert block_text(name, tokens + more).startswith(short)


def test_blocks_of_other_names_differ_at_once() -> None:
    starts = {block_text(f"r{number}", 8) for number in range(20_000)}
    assert len(starts) == 20_000


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
)
def test_prompts_share_text_as_far_as_they_share_blocks(one: list[str], other: list[str]) -> None:
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    texts = [prompt_text(blocks, 20, 20 * len(blocks)) for blocks in (one, other)]
    assert texts[0][: shared * 80] == texts[1][: shared * 80]
    if shared < min(len(one), len(other)):
        assert texts[0][: shared * 80 + 48] != texts[1][: shared * 80 + 48]


@given(st.integers(1, 8), st.integers(1, 64), st.integers(0, 600))
def test_prompt_has_the_tokens_that_were_asked_for(blocks: int, block_tokens: int, tokens: int) -> None:
    text = prompt_text([str(number) for number in range(blocks)], block_tokens, tokens)
    assert len(text.split()) == max(1, tokens)
