"""What every backend promises, asked over a real Session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import step_log
from engine.sim.parameters import Work
from protos.core.contract import ChatPrompt, FailureKind, TextPrompt, TokenPrompt
from tests.engine.conftest import ADAPTER, CONTEXT_TOKENS
from tests.engine.peer import Answer, connect, submit

CHAT = ChatPrompt(b'[{"role": "user", "content": "Tell me about the sea."}]')


async def ask_one(address: str, prompt: object = None, **sampling: object) -> Answer:
    async with connect(address) as peer:
        (answer,) = await peer.ask(submit(1, prompt, **sampling))
    return answer


async def test_answer_is_accepted_started_told_and_finished(address: str) -> None:
    answer = await ask_one(address, CHAT, max_tokens=8, ignore_eos=True)
    assert answer.is_accepted
    assert answer.started is not None
    assert answer.finished is not None
    assert answer.finished.reasons == ("length",)
    assert answer.finished.output_tokens == len(answer.token_ids[0]) == 8
    assert answer.finished.prompt_tokens == answer.started.prompt_tokens > 0
    assert len(answer.text) > 8


async def test_stamps_are_in_order_on_the_clock_of_the_worker(address: str) -> None:
    answer = await ask_one(address, max_tokens=4, ignore_eos=True)
    assert answer.finished is not None
    assert answer.started is not None
    stamps = answer.finished.stamps
    order = [stamps.received_ns, stamps.queued_ns, stamps.scheduled_ns, stamps.first_token_ns, stamps.last_token_ns]
    assert order == sorted(order)
    assert 0 < stamps.last_token_ns - stamps.received_ns < 60e9
    assert answer.started.stamps.first_token_ns == stamps.first_token_ns
    assert answer.accepted_ns == stamps.received_ns


async def test_greedy_answers_are_the_same_each_time(address: str) -> None:
    first, second = [await ask_one(address, CHAT, max_tokens=8, temperature=0.0) for _ in range(2)]
    assert first.text == second.text
    assert first.token_ids == second.token_ids


async def test_seed_decides_a_sampled_answer(address: str) -> None:
    sampling = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    first = await ask_one(address, CHAT, seed=7, **sampling)
    again = await ask_one(address, CHAT, seed=7, **sampling)
    other = await ask_one(address, CHAT, seed=8, **sampling)
    assert first.text == again.text != other.text


async def test_choices_are_told_apart_and_end_together(address: str) -> None:
    answer = await ask_one(address, CHAT, n=3, max_tokens=6, temperature=1.0, ignore_eos=True)
    assert answer.finished is not None
    assert answer.finished.reasons == ("length",) * 3
    assert answer.finished.output_tokens == 18
    assert [len(answer.token_ids[choice]) for choice in range(3)] == [6, 6, 6]
    assert len(set(answer.texts.values())) > 1


async def test_text_ends_before_a_stop_string(address: str) -> None:
    whole = (await ask_one(address, CHAT, max_tokens=24, temperature=0.0, ignore_eos=True)).text
    stop = whole.split()[3]
    cut = await ask_one(address, CHAT, max_tokens=24, temperature=0.0, ignore_eos=True, stop=(stop,))
    kept = await ask_one(
        address, CHAT, max_tokens=24, temperature=0.0, ignore_eos=True, stop=(stop,), include_stop_in_output=True
    )
    assert cut.finished is not None
    assert cut.finished.reasons == ("stop",)
    assert cut.text == whole[: whole.index(stop)]
    assert kept.text == whole[: whole.index(stop) + len(stop)]


async def test_stop_token_ends_the_answer(address: str) -> None:
    sampling = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    whole = await ask_one(address, CHAT, **sampling)
    stop = whole.token_ids[0][5]
    answer = await ask_one(address, CHAT, stop_token_ids=(stop,), **sampling)
    assert answer.finished is not None
    assert answer.finished.reasons == ("stop",)
    assert answer.token_ids[0] == whole.token_ids[0][: whole.token_ids[0].index(stop) + 1]


async def test_logprobs_come_one_per_token_with_as_many_alternatives_as_were_asked_for(address: str) -> None:
    """Also where the token itself is none of the likeliest."""
    answer = await ask_one(address, CHAT, max_tokens=8, ignore_eos=True, logprobs=1, temperature=2.0, seed=1)
    assert len(answer.logprobs) == 8
    for logprob in answer.logprobs:
        assert logprob.logprob <= 0
        assert len(logprob.top) == 1
        assert logprob.token_bytes == logprob.token.encode()
    own = await ask_one(address, CHAT, max_tokens=2, ignore_eos=True, logprobs=0)
    assert [logprob.top for logprob in own.logprobs] == [(), ()]


async def check_resumed(address: str, prompt: object, cuts: Iterable[int], **sampling: Any) -> Answer:
    """Cut an answer after some of its deltas: what is resumed there ends as the whole one does. Returns that."""
    whole = await ask_one(address, prompt, **sampling)
    assert whole.finished is not None
    submits = []
    for slot, cut in enumerate(cuts, 1):
        token_ids = tuple(token_id for _, ids in whole.rows[:cut] for token_id in ids)
        submits.append(msgspec.structs.replace(submit(slot, prompt, **sampling), resumed_token_ids=token_ids))
    async with connect(address) as peer:
        answers = await peer.ask(*submits)
    for cut, answer in zip(cuts, answers, strict=True):
        assert answer.finished is not None, answer.failed
        rest = whole.rows[cut:]
        assert answer.text == "".join(text for text, _ in rest), f"cut after {cut}"
        assert answer.token_ids.get(0, []) == [token_id for _, ids in rest for token_id in ids], f"cut after {cut}"
        assert answer.finished.reasons == whole.finished.reasons
        assert answer.finished.prompt_tokens == whole.finished.prompt_tokens
        assert answer.finished.output_tokens == len(answer.token_ids.get(0, []))
    return whole


async def test_resumed_answer_goes_on_where_it_was_cut(address: str) -> None:
    """Wherever that is: before the last token nothing is left but the end."""
    await check_resumed(address, CHAT, range(1, 17), max_tokens=16, temperature=0.0, ignore_eos=True, min_tokens=6)


async def test_resumed_answer_has_the_text_that_was_held_back(address: str) -> None:
    """Characters of several tokens: a cut may fall between them. A stop string holds back what may begin it."""
    prompt = TextPrompt("日本語の文章を続けてください。むかしむかし、")
    sampling: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    plain = await check_resumed(address, prompt, range(1, 25), **sampling)
    stop = plain.text[len(plain.text) // 2 :][:6]
    assert stop
    for is_included in (False, True):
        stopping = sampling | {"stop": (stop,), "include_stop_in_output": is_included}
        cut = await ask_one(address, prompt, **stopping)
        assert cut.finished is not None
        assert cut.finished.reasons == ("stop",)
        await check_resumed(address, prompt, range(1, len(cut.rows) + 1), **stopping)


async def test_answer_that_was_over_when_it_was_cut_only_ends(address: str) -> None:
    """The last token had come, the word of the end had not: neither a token more nor another reason."""
    sampling: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    whole = await ask_one(address, CHAT, **sampling)
    stop = whole.token_ids[0][5]
    ended = await ask_one(address, CHAT, stop_token_ids=(stop,), **sampling)
    await check_resumed(address, CHAT, [len(ended.rows)], stop_token_ids=(stop,), **sampling)


async def test_only_one_choice_can_be_resumed(address: str) -> None:
    async with connect(address) as peer:
        (answer,) = await peer.ask(msgspec.structs.replace(submit(1, CHAT, n=2), resumed_token_ids=(5,)))
    assert answer.failed is not None
    assert answer.failed.kind == FailureKind.INVALID


async def test_answer_without_max_tokens_may_fill_the_context(address: str) -> None:
    prompt = TokenPrompt((100,) * (CONTEXT_TOKENS - 9))
    answer = await ask_one(address, prompt, ignore_eos=True)
    assert answer.finished is not None
    assert answer.finished.prompt_tokens == CONTEXT_TOKENS - 9
    assert answer.finished.output_tokens == 9
    assert answer.finished.reasons == ("length",)


async def test_prompt_over_the_context_is_refused_with_its_name(address: str) -> None:
    text = await ask_one(address, TextPrompt("water " * 4 * CONTEXT_TOKENS), max_tokens=1)
    tokens = await ask_one(address, TokenPrompt((100,) * CONTEXT_TOKENS), max_tokens=1)
    chat = ChatPrompt(b'[{"role": "user", "content": "%s"}]' % (b"water " * 4 * CONTEXT_TOKENS))
    messages = await ask_one(address, chat)
    for answer, param in ((text, "prompt"), (tokens, "prompt"), (messages, "messages")):
        assert answer.failed is not None
        assert answer.failed.kind == FailureKind.CONTEXT_EXCEEDED
        assert answer.failed.param == param
        assert str(CONTEXT_TOKENS) in answer.failed.message


async def test_max_tokens_over_the_context_is_refused_by_name(address: str) -> None:
    answer = await ask_one(address, max_tokens=CONTEXT_TOKENS)
    assert answer.failed is not None
    assert answer.failed.kind == FailureKind.CONTEXT_EXCEEDED
    assert answer.failed.param == "max_tokens"


async def test_prompts_with_nothing_in_them_are_invalid(address: str) -> None:
    for prompt, param in (
        (TextPrompt(""), "prompt"),
        (TokenPrompt(()), "prompt"),
        (ChatPrompt(b"[]"), "messages"),
        (ChatPrompt(b"not json"), "messages"),
        (ChatPrompt(b'[{"content": "hi"}]'), "messages"),
        (ChatPrompt(b'[{"role": "user", "content": 5}]'), "messages"),
        (ChatPrompt(b'[{"role": "user", "content": "\xff"}]'), "messages"),
    ):
        async with connect(address) as peer:
            (answer,) = await peer.ask(submit(1, prompt, max_tokens=1))
        assert answer.failed is not None, prompt
        assert answer.failed.kind == FailureKind.INVALID
        assert answer.failed.param == param


@pytest.mark.parametrize(
    "arguments", [b'{"chat_template": "{{ 1/0 }}"}', b'{"padding": "max_length", "max_length": 99}']
)
async def test_clients_bring_variables_for_the_template_and_no_template(address: str, arguments: bytes) -> None:
    messages = b'[{"role": "user", "content": "hi"}]'
    taken = await ask_one(address, ChatPrompt(messages, b'{"enable_thinking": false}'), max_tokens=1)
    assert taken.finished is not None
    refused = await ask_one(address, ChatPrompt(messages, arguments), max_tokens=1)
    assert refused.failed is not None
    assert refused.failed.kind == FailureKind.INVALID
    assert refused.failed.param == "chat_template_kwargs"
    assert "the worker's own" in refused.failed.message


async def test_unknown_model_is_named(address: str) -> None:
    async with connect(address) as peer:
        (answer,) = await peer.ask(submit(1, model="gpt-9"))
    assert answer.failed is not None
    assert answer.failed.kind == FailureKind.UNKNOWN_MODEL
    assert "gpt-9" in answer.failed.message


async def test_cancelled_request_ends_once_and_frees_the_engine(address: str) -> None:
    async with connect(address) as peer:
        answers = await peer.submit(*(submit(slot, max_tokens=400, ignore_eos=True) for slot in range(8)))
        await peer.until(lambda: all(answer.deltas for answer in answers))
        await peer.send(cancels=range(8))
        for answer in answers:
            await answer.done.wait()
            assert answer.finished is not None
            assert answer.finished.reasons == ("cancelled",)
            assert 0 < answer.finished.output_tokens < 400
        await peer.until(lambda: is_idle(peer))


async def test_request_cancelled_at_once_ends_as_cancelled(address: str) -> None:
    async with connect(address) as peer:
        answers = [submit(slot, max_tokens=400, ignore_eos=True) for slot in range(4)]
        peer.expect(*answers)
        await peer.send(submits=answers, cancels=range(4))
        for answer in peer.answers.values():
            await answer.done.wait()
            assert answer.finished is not None
            assert answer.finished.reasons == ("cancelled",)
        await peer.until(lambda: is_idle(peer))


async def test_lost_session_aborts_its_requests_and_no_others(address: str) -> None:
    async with connect(address) as watcher:
        async with connect(address) as leaver:
            answers = await leaver.submit(*(submit(slot, max_tokens=400, ignore_eos=True) for slot in range(4)))
            await leaver.until(lambda: all(answer.deltas for answer in answers))
            (kept,) = await watcher.submit(submit(1, max_tokens=40, ignore_eos=True))
        await kept.done.wait()
        assert kept.finished is not None
        assert kept.finished.reasons == ("length",)
        await watcher.until(lambda: is_idle(watcher))


async def test_requests_that_run_together_share_frames(address: str) -> None:
    async with connect(address) as peer:
        answers = await peer.ask(*(submit(slot, max_tokens=24, ignore_eos=True) for slot in range(12)))
        rows = [len(frame.deltas.slots) for frame in peer.frames if frame.deltas is not None]
        assert sum(rows) == 12 * 24
        assert sum(count == 12 for count in rows) >= 12
        assert all(answer.finished is not None for answer in answers)
        assert all(frame.load is not None for frame in peer.frames[1:])
        steps = [frame.step for frame in peer.frames if frame.deltas is not None]
        assert steps == list(range(1, len(steps) + 1))


async def test_repeated_prompt_is_found_in_the_prefix_cache(address: str) -> None:
    prompt = TokenPrompt(tuple(range(1000, 1400)))
    async with connect(address) as peer:
        (first,) = await peer.ask(submit(1, prompt, max_tokens=1))
        (second,) = await peer.ask(submit(2, prompt, max_tokens=1))
        before, after = loads(peer)[0], loads(peer)[-1]
    assert first.finished is not None
    assert first.finished.cached_tokens == 0
    assert second.finished is not None
    assert second.started is not None
    assert 256 <= second.finished.cached_tokens == second.started.cached_tokens < 400
    assert after.prefix_queries >= 800
    assert after.prefix_hits - before.prefix_hits == second.finished.cached_tokens


async def test_next_turn_finds_the_answer_before_it_in_the_prefix_cache(address: str) -> None:
    prompt = tuple(range(2000, 2300))
    first = await ask_one(address, TokenPrompt(prompt), max_tokens=100, ignore_eos=True)
    turn = await ask_one(address, TokenPrompt((*prompt, *first.token_ids[0], *prompt[:50])), max_tokens=1)
    assert turn.finished is not None
    assert len(prompt) < turn.finished.cached_tokens < len(prompt) + 100


async def test_adapter_has_its_own_answers_and_its_own_part_of_the_prefix_cache(address: str) -> None:
    prompt = TokenPrompt(tuple(range(4000, 4200)))
    sampling = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    async with connect(address) as peer:
        welcome = peer.frames[0].welcome
        assert welcome is not None
        assert (welcome.model.names[-1:], welcome.model.adapters) == ((ADAPTER,), (ADAPTER,))
        base, adapter, again = [
            (await peer.ask(submit(slot, prompt, model=model, **sampling)))[0]
            for slot, model in enumerate(("", ADAPTER, ADAPTER), 1)
        ]
    assert base.token_ids != adapter.token_ids == again.token_ids
    assert adapter.finished is not None
    assert again.finished is not None
    assert adapter.finished.cached_tokens == 0 < again.finished.cached_tokens


async def test_step_log_holds_the_steps_and_the_request(address: str, step_log_path: Path) -> None:
    before = step_log.read(step_log_path)
    answer = await ask_one(address, TokenPrompt(tuple(range(3000, 3300))), max_tokens=5, ignore_eos=True)
    assert answer.finished is not None
    after = step_log.read(step_log_path)
    assert after.engine.max_batch_tokens == 512
    steps = after.steps[len(before.steps) :]
    assert [step.work for step in steps] == [Work(300, 45_000, 0, 0), *(Work(0, 0, 1, 300 + n) for n in range(4))]
    assert all(a.start_ns + a.duration_ns == b.start_ns for a, b in pairwise(steps)), "a busy engine has no gaps"
    (request,) = after.requests[len(before.requests) :]
    assert (request.prompt_tokens, request.output_tokens, request.cached_tokens) == (300, 5, 0)
    assert request.arrived_ns <= request.scheduled_ns < request.first_token_ns < request.ended_ns
    assert request.ended_ns == steps[-1].start_ns + steps[-1].duration_ns
    assert len(request.blocks) == 304 // after.engine.kv_block_tokens
    assert not request.is_cancelled


async def test_prompts_that_yield_are_computed_in_small_parts_and_urgent_ones_whole(
    address: str, step_log_path: Path
) -> None:
    before = step_log.read(step_log_path)
    yielding = submit(1, TokenPrompt(tuple(range(20_000, 20_400))), max_tokens=2, ignore_eos=True)
    urgent = submit(2, TokenPrompt(tuple(range(21_000, 21_300))), max_tokens=2, ignore_eos=True)
    async with connect(address) as peer:
        welcome = peer.frames[0].welcome
        assert welcome is not None
        assert welcome.model.makes_way
        await peer.ask(msgspec.structs.replace(yielding, priority=1, step_tokens=16), urgent)
    after = step_log.read(step_log_path)
    prefills = [step.work.prefill_tokens for step in after.steps[len(before.steps) :] if step.work.prefill_tokens]
    assert sum(prefills) == 700
    assert prefills.count(300) == 1, "the urgent prompt has a step for itself"
    assert sorted(prefills)[-2] <= 16
    yielded, first = sorted(after.requests[len(before.requests) :], key=lambda request: -request.prompt_tokens)
    assert first.first_token_ns < yielded.first_token_ns


async def test_load_counts_what_runs_and_what_waits(address: str) -> None:
    async with connect(address) as peer:
        answers = await peer.submit(*(submit(slot, max_tokens=200, ignore_eos=True) for slot in range(20)))
        await peer.until(lambda: any(load.running == 16 and load.waiting == 4 for load in loads(peer)))
        await peer.until(lambda: any(load.kv_blocks_used >= 16 for load in loads(peer)))
        assert all(load.kv_blocks_total > 0 for load in loads(peer))
        await peer.send(cancels=range(20))
        await asyncio.gather(*(answer.done.wait() for answer in answers))


def loads(peer):  # type: ignore[no-untyped-def]
    return [frame.load for frame in peer.frames[1:]]


def is_idle(peer) -> bool:  # type: ignore[no-untyped-def]
    load = peer.frames[-1].load
    return load is not None and (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
