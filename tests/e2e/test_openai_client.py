"""The official OpenAI client against the running stack with a real model."""

from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.e2e.conftest import Up, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is the capital of France?"}
]


@pytest.fixture
def client(vllm_up: Up) -> openai.OpenAI:
    return vllm_up.client()


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_streamed_answer_about_france_contains_paris(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        stream=True,
        temperature=0,
        max_tokens=32,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "Paris" in text_of(chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    usage = chunks[-1].usage
    assert usage is not None
    assert chunks[-1].choices == []
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_unstreamed_answer_is_the_streamed_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16)
    chunks = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stream=True)
    assert whole.choices[0].message.content == text_of(list(chunks))
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 16


def test_models_are_listed(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert MODEL in models
    assert client.models.retrieve(MODEL) == models[MODEL]
    extra = models[MODEL].model_extra or {}
    assert extra["tidegate"]["simulated"] is False
    assert extra["tidegate"]["backend"] == "vllm"


def test_two_choices_are_two_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, temperature=1.0, seed=7, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content for choice in answer.choices)


def test_streamed_choices_keep_their_index(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, temperature=1.0, seed=7, max_tokens=8, stream=True
    )
    choices = [choice for chunk in stream for choice in chunk.choices]
    assert {choice.index for choice in choices} == {0, 1}
    assert len([choice for choice in choices if choice.finish_reason]) == 2


def test_stop_word_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5, 6,", stop=[" 9", "9"], temperature=0, max_tokens=40
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "9" not in answer.choices[0].text


def test_length_limit_is_the_finish_reason(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_max_completion_tokens_is_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=3, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    first, second = (
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.0, seed=11, max_tokens=12)
        for _ in range(2)
    )
    assert first.choices[0].message.content == second.choices[0].message.content


def test_chat_logprobs_have_their_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, logprobs=True, top_logprobs=2, temperature=0, max_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in logprobs.content)


def test_streamed_logprobs_are_one_per_token(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, logprobs=True, top_logprobs=1, temperature=0, max_tokens=4, stream=True
    )
    tokens = [
        token
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert len(tokens) == 4


def test_completion_takes_text_and_tokens(client: openai.OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=4, temperature=0)
    tokens = client.completions.create(model=MODEL, prompt=[504, 6376, 314], max_tokens=4, temperature=0)
    assert text.choices[0].text
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=3, temperature=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == 3


def test_streamed_completion(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=6, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]


def test_logit_bias_forces_a_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, logit_bias={"28": 100}, max_tokens=3, temperature=0
    )
    content = answer.choices[0].message.content or ""
    assert content
    assert len(set(content)) == 1


def test_conversation_over_several_turns(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You answer with one word."},
            *QUESTION,
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
        ],
        temperature=0,
        max_tokens=16,
    )
    assert answer.choices[0].message.content


def test_usage_counts_cached_tokens(client: openai.OpenAI) -> None:
    long = "Tell me about the sea. " * 40
    answers = [
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": long}], max_tokens=2, temperature=0
        )
        for _ in range(2)
    ]
    usage = answers[1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 0


# ---------------------------------------------------------------- errors, as the client's exceptions


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-nope", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert "gpt-nope" in caught.value.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10_000_000}, "max_tokens"),
        ({"temperature": 9.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"extra_body": {"max_tokens": "many"}}, "max_tokens"),
    ],
)
def test_bad_value_is_a_bad_request_naming_the_field(
    client: openai.OpenAI, options: dict[str, object], param: str
) -> None:
    arguments: dict[str, object] = {"model": MODEL, "messages": QUESTION, **options}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    assert caught.value.status_code == 400
    assert (caught.value.param or "").startswith(param)
    assert caught.value.type == "invalid_request_error"


def test_prompt_longer_than_the_context_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="tide " * 20_000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


# ---------------------------------------------------------------- leaving early


def test_cancelled_stream_leaves_nothing_running(client: openai.OpenAI, vllm_up: Up) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    assert next(iter(stream)).id
    stream.close()
    wait_until(lambda: is_idle(vllm_up.state()), "leases return to zero after a cancel", 10)


def is_idle(state: dict[str, object]) -> bool:
    return state["leases"] == 0 and state["queued"] == 0


def test_client_timeout_is_its_own_exception(client: openai.OpenAI) -> None:
    impatient = client.with_options(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=200, extra_body={"ignore_eos": True}
        )


async def test_async_client_runs_many_at_once(vllm_up: Up) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{vllm_up.url}/v1", api_key="unused", max_retries=0) as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8)
                for _ in range(8)
            )
        )
    assert {answer.choices[0].message.content for answer in answers} == {answers[0].choices[0].message.content}


def test_request_id_and_worker_are_told(client: openai.OpenAI, vllm_up: Up) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "req-e2e-1"}
    )
    assert raw.headers["x-request-id"] == "req-e2e-1"
    assert raw.headers["x-tidegate-worker"] == f"127.0.0.1:{vllm_up.worker_port}"


def test_timing_is_told_on_request_and_sums_up(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_headers={"x-tidegate-timing": "1"}
    )
    timing = (answer.model_extra or {})["tidegate"]
    assert sum(timing["phases_ns"].values()) + timing["unattributed_ns"] == timing["total_ns"]
    assert timing["unattributed_ns"] <= 0.01 * timing["total_ns"]
