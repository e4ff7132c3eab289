"""The pipeline between fakes: each way a request can end, at each place where it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.settings import Limits
from protos.core.contract import FailureKind
from protos.core.record import Outcome
from tests.gateway.fakes import FakeClient, Gateway, chat_body, gateway, in_virtual_time, settle_down

UNARY = chat_body(max_tokens=8)


# ---------------------------------------------------------------- the good road


@in_virtual_time
async def test_stream_relays_tokens_as_they_come() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post(x_request_id="mine")
        assert client.messages == []
        worker.accept()
        worker.token(text="Once ")
        assert client.text == "Once "
        worker.token(text="upon")
        assert client.text == "Once upon"
        worker.finish(output_tokens=2)
        await client.task
        assert client.events[-1] == "[DONE]"
        assert client.events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert client.headers["content-type"].startswith("text/event-stream")
        assert client.headers["x-request-id"] == "mine"
        assert client.headers["x-tidegate-worker"] == "worker-0"
        assert client.is_complete
    assert g.record.outcome is Outcome.FINISHED
    assert (g.record.status, g.record.output_tokens, g.record.prompt_tokens) == (200, 2, 7)
    assert worker.cancelled == []


@in_virtual_time
async def test_every_phase_of_a_finished_request_is_there() -> None:
    async with gateway(max_sequences=1) as g:
        worker = g.fleet.workers["worker-0"]
        await g.post(UNARY)
        waiting = await g.post(UNARY, x_tidegate_timing="1")
        await asyncio.sleep(1.0)
        worker.finish(1)
        await settle_down()
        await asyncio.sleep(0.1)
        worker.accept(2)
        await asyncio.sleep(0.2)
        worker.token(2)
        await asyncio.sleep(0.4)
        worker.finish(2, output_tokens=1)
        await waiting.task
    phases = g.records[1].phases
    assert phases.queue == 1_000_000_000
    assert phases.decode == 400_000_000
    assert g.records[1].total_ns == 1_700_000_000
    timing = waiting.json["tidegate"]
    assert timing["total_ns"] == sum(timing["phases_ns"].values()) + timing["unattributed_ns"]
    assert timing["phases_ns"]["queue"] == 1_000_000_000
    assert timing["worker"] == "worker-0"
    assert timing["is_simulated"] is True


@in_virtual_time
async def test_unary_answer_is_one_json_body() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post(chat_body(n=2))
        worker.token(text="a", choice=0)
        worker.token(text="b", choice=1)
        worker.finish(1, "stop", "length", output_tokens=2)
        await client.task
        assert [choice["message"]["content"] for choice in client.json["choices"]] == ["a", "b"]
        assert [choice["finish_reason"] for choice in client.json["choices"]] == ["stop", "length"]
        assert client.json["usage"]["completion_tokens"] == 2
        assert client.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@in_virtual_time
async def test_worker_gets_the_request_with_our_span_as_parent() -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post(traceparent=f"00-{trace_id}-00f067aa0ba902b7-01")
        (submitted,) = worker.submitted
        worker.finish()
        await client.task
    assert submitted["traceparent"] == f"00-{trace_id}-{g.record.span_id}-01"
    assert g.record.parent_span_id == "00f067aa0ba902b7"
    assert submitted["model"] == "tide-1"


# ---------------------------------------------------------------- the client leaves


@in_virtual_time
async def test_client_that_leaves_while_sending_its_body_is_cancelled() -> None:
    async with gateway() as g:
        client = g.open()
        client.send_body(b'{"mess', more_body=True)
        await settle_down()
        client.leave()
        await client.task
        assert g.fleet.workers["worker-0"].submitted == []
    assert (g.record.outcome, g.record.status) == (Outcome.CANCELLED, 499)
    assert [name for name, _ in g.record.phases.present()] in ([], ["receive"])


@in_virtual_time
async def test_client_that_leaves_before_its_body_is_cancelled() -> None:
    async with gateway() as g:
        client = g.open()
        await settle_down()
        client.leave()
        await client.task
    assert (g.record.outcome, g.record.status) == (Outcome.CANCELLED, 499)


@in_virtual_time
async def test_client_that_leaves_the_queue_costs_the_worker_nothing() -> None:
    async with gateway(max_sequences=1) as g:
        worker = g.fleet.workers["worker-0"]
        await g.post(UNARY)
        waiting = await g.post(UNARY)
        assert g.scheduler.queued == 1
        await asyncio.sleep(2)
        waiting.leave()
        await waiting.task
        assert g.scheduler.queued == 0
        assert len(worker.submitted) == 1
        assert worker.cancelled == []
        worker.finish()
    assert g.records[0].outcome is Outcome.CANCELLED
    assert g.records[0].phases.queue == 2_000_000_000
    assert g.records[0].attempts == ()
    assert g.records[0].worker is None


@pytest.mark.parametrize("leaves_first", [True, False])
def test_client_that_leaves_between_placement_and_dispatch_gives_its_lease_back(leaves_first: bool) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(max_sequences=1) as g:
            worker = g.fleet.workers["worker-0"]
            await g.post(UNARY)
            waiting = await g.post(UNARY)
            if leaves_first:
                waiting.leave()
                worker.finish()
            else:
                worker.finish()
                await asyncio.sleep(0)
                waiting.leave()
            await waiting.task
            await settle_down()
            assert g.leases == 0
            assert len(worker.cancelled) == len(worker.submitted) - 1
        assert sorted(record.outcome for record in g.records) == [Outcome.CANCELLED, Outcome.FINISHED]

    test()


@in_virtual_time
async def test_client_that_leaves_before_the_first_token_is_cancelled_once() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        worker.accept()
        client.leave()
        await client.task
        assert worker.cancelled == [1]
        assert client.messages == []
    record = g.record
    assert (record.outcome, record.status, record.output_tokens) == (Outcome.CANCELLED, 499, 0)
    assert record.finish_reasons == ()
    assert record.cancelled_at_ns == record.total_ns
    assert [attempt.error for attempt in record.attempts] == ["cancelled"]


@in_virtual_time
async def test_client_that_leaves_mid_stream_is_cancelled_once() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        worker.token()
        await asyncio.sleep(0.5)
        worker.token()
        client.leave()
        await client.task
        assert worker.cancelled == [1]
    record = g.record
    assert (record.outcome, record.status, record.output_tokens) == (Outcome.CANCELLED, 200, 2)
    assert record.max_gap_ns == 500_000_000
    assert record.phases.decode is not None


@in_virtual_time
async def test_unary_client_that_leaves_is_cancelled_too() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post(UNARY)
        worker.token()
        client.leave()
        await client.task
        assert worker.cancelled == [1]
    assert (g.record.outcome, g.record.status) == (Outcome.CANCELLED, 499)


@in_virtual_time
async def test_lease_is_held_until_the_worker_has_let_go() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        worker.answers_cancels = False
        client = await g.post()
        worker.token()
        client.leave()
        await settle_down()
        assert g.leases == 1
        worker.finish(1, "cancelled")
        await client.task
        assert g.leases == 0
    assert g.record.total_ns == 0  # the client's time ended when it left


@in_virtual_time
async def test_client_that_leaves_as_the_worker_dies_is_settled_once() -> None:
    async with gateway() as g:
        g.fleet.workers["worker-0"].answers_cancels = False
        client = await g.post()
        client.leave()
        await settle_down()
        g.fleet.lose("worker-0")
        await client.task
    assert g.record.outcome is Outcome.CANCELLED


@in_virtual_time
async def test_tokens_after_the_client_left_are_not_counted() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        worker.answers_cancels = False
        client = await g.post()
        worker.token()
        client.leave()
        await settle_down()
        worker.token()
        worker.finish(1, "cancelled")
        await client.task
    assert g.record.output_tokens == 1


# ---------------------------------------------------------------- slow clients


@in_virtual_time
async def test_text_for_a_blocked_client_leaves_as_one_event() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        worker.token(text="a")
        client.stall()
        worker.token(text="b")
        before = len(client.messages)
        for text in "cdef":
            worker.token(text=text)
        await asyncio.sleep(3)
        assert len(client.messages) == before
        client.take_again()
        await settle_down()
        assert len(client.messages) == before + 2  # b, then all that waited
        assert client.text == "abcdef"
        worker.finish()
        await client.task
        assert client.events[-1] == "[DONE]"
    assert g.record.backpressure_ns == 3_000_000_000
    assert g.record.output_tokens == 6


@in_virtual_time
async def test_slow_client_costs_its_worker_nothing() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        client.stall()
        worker.token(text="a")
        worker.token(text="b")
        worker.finish()
        await settle_down()
        assert g.leases == 0
        client.take_again()
        await client.task
        assert client.text == "ab"
        assert client.events[-1] == "[DONE]"
    assert g.record.outcome is Outcome.FINISHED


@in_virtual_time
async def test_client_that_leaves_while_its_end_waits_for_the_socket_is_cancelled() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        client.stall()
        worker.token()
        worker.finish()
        await asyncio.sleep(1)
        client.leave()
        await client.task
        assert worker.cancelled == []
    assert g.record.outcome is Outcome.CANCELLED
    assert g.record.phases.deliver == 1_000_000_000


@in_virtual_time
async def test_client_that_never_reads_is_given_up_at_the_total_timeout() -> None:
    async with gateway(limits=Limits(total_s=60)) as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        client.stall()
        worker.token()
        worker.finish()
        await asyncio.sleep(61)
        assert client.task.done()
        client.take_again()
        await asyncio.wait([client.task])
    assert g.record.outcome is Outcome.TIMED_OUT
    assert g.record.total_ns == 60_000_000_000


@in_virtual_time
async def test_logprobs_of_a_blocked_client_are_not_merged() -> None:
    from protos.core.contract import TokenLogprob

    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post(chat_body(stream=True, logprobs=True))
        worker.token(text="a")
        client.stall()
        sink = worker.sinks[1]
        for text in "bcd":
            sink.delta(text, 1, 0, (TokenLogprob(text, -0.5, text.encode()),), sink.timeline.arrived_ns)
        client.take_again()
        await settle_down()
        worker.finish()
        await client.task
        assert client.text == "abcd"
        chunks = [event["choices"][0]["logprobs"] for event in client.events if event != "[DONE]" and event["choices"]]
        assert [chunk["content"][0]["token"] for chunk in chunks if chunk] == ["b", "c", "d"]


# ---------------------------------------------------------------- the server stops


async def _reading(g: Gateway) -> FakeClient:
    client = g.open()
    client.send_body(b"{", more_body=True)
    await settle_down()
    return client


async def _queued(g: Gateway) -> FakeClient:
    for _ in range(8):
        await g.post(UNARY)
    return await g.post(UNARY)


async def _dispatched(g: Gateway) -> FakeClient:
    return await g.post()


async def _streaming(g: Gateway) -> FakeClient:
    client = await g.post()
    g.fleet.workers["worker-0"].token()
    return client


async def _blocked(g: Gateway) -> FakeClient:
    client = await g.post()
    client.stall()
    g.fleet.workers["worker-0"].token()
    return client


async def _finishing(g: Gateway) -> FakeClient:
    client = await _blocked(g)
    g.fleet.workers["worker-0"].finish()
    await settle_down()
    return client


async def _leaving(g: Gateway) -> FakeClient:
    g.fleet.workers["worker-0"].answers_cancels = False
    client = await g.post()
    client.leave()
    await settle_down()
    return client


@pytest.mark.parametrize("reach", [_reading, _queued, _dispatched, _streaming, _blocked, _finishing, _leaving])
def test_stopped_server_lets_go_of_everything(reach: Callable[[Gateway], Awaitable[FakeClient]]) -> None:
    """The server cancels its handlers: each settles once, and no task of theirs outlives it."""

    @in_virtual_time
    async def test() -> None:
        async with gateway() as g:
            worker = g.fleet.workers["worker-0"]
            client = await reach(g)
            leases = g.leases
            client.task.cancel()
            await asyncio.wait([client.task])
            assert client.task.cancelled()
            assert g.leases == leases - (reach in (_dispatched, _streaming, _blocked, _leaving))
            assert len(set(worker.cancelled)) == len(worker.cancelled), "a worker is told once"
            assert len(worker.cancelled) == (reach in (_dispatched, _streaming, _blocked, _leaving))
            for slot in list(worker.sinks):
                worker.finish(slot, output_tokens=1)
        assert g.records[0].outcome is Outcome.CANCELLED
        assert len({record.request_id for record in g.records}) == len(g.records)

    test()


# ---------------------------------------------------------------- deadlines


@in_virtual_time
async def test_first_token_timeout_is_504_with_retry_after() -> None:
    async with gateway(limits=Limits(first_token_s=5)) as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        worker.accept()
        await asyncio.sleep(5.001)
        await client.task
        assert client.status == 504
        assert client.json["error"]["code"] == "timeout"
        assert int(client.headers["retry-after"]) >= 1
        assert worker.cancelled == [1]
    assert g.record.outcome is Outcome.TIMED_OUT
    assert 5.0e9 <= g.record.total_ns <= 5.001e9


@in_virtual_time
async def test_total_timeout_is_an_error_event_inside_the_stream() -> None:
    async with gateway(limits=Limits(first_token_s=5, total_s=10)) as g:
        worker = g.fleet.workers["worker-0"]
        client = await g.post()
        for _ in range(4):
            worker.token(text="x")
            await asyncio.sleep(2.4)
        assert client.task.done() is False
        await asyncio.sleep(0.5)
        await client.task
        assert client.status == 200
        assert client.text == "xxxx"
        assert client.events[-1]["error"]["code"] == "timeout"
        assert client.is_complete
        assert worker.cancelled == [1]
    assert (g.record.outcome, g.record.status) == (Outcome.TIMED_OUT, 200)
    assert g.record.error_code == "timeout"


@in_virtual_time
async def test_total_timeout_of_a_unary_request_is_504() -> None:
    async with gateway(limits=Limits(first_token_s=5, total_s=10)) as g:
        client = await g.post(UNARY)
        g.fleet.workers["worker-0"].token()
        await asyncio.sleep(10.001)
        await client.task
        assert client.status == 504
    assert g.record.outcome is Outcome.TIMED_OUT


@in_virtual_time
async def test_queue_deadline_is_429_at_the_deadline_itself() -> None:
    async with gateway(max_sequences=1, limits=Limits(first_token_s=5)) as g:
        worker = g.fleet.workers["worker-0"]
        running = await g.post(UNARY)
        worker.token()
        await asyncio.sleep(1)
        waiting = await g.post(UNARY)
        await asyncio.sleep(4.9)
        assert not waiting.task.done()
        await asyncio.sleep(0.2)
        await waiting.task
        assert waiting.status == 429
        assert waiting.headers["x-tidegate-reject-reason"] == "deadline"
        assert int(waiting.headers["retry-after"]) >= 1
        worker.finish(output_tokens=1)
        await running.task
        assert len(worker.submitted) == 1
    assert g.records[0].outcome is Outcome.TIMED_OUT
    assert g.records[0].phases.queue == pytest.approx(5e9, rel=1e-3)


@in_virtual_time
async def test_body_that_stops_coming_is_408() -> None:
    async with gateway() as g:
        client = g.open()
        client.send_body(b"{", more_body=True)
        await asyncio.sleep(31)
        await client.task
        assert client.status == 408
    assert g.record.outcome is Outcome.TIMED_OUT


@in_virtual_time
async def test_body_that_never_begins_is_408() -> None:
    async with gateway() as g:
        client = g.open()
        await asyncio.sleep(31)
        assert client.task.done()
        assert client.status == 408
    assert g.record.outcome is Outcome.TIMED_OUT


# ---------------------------------------------------------------- refusals


@in_virtual_time
async def test_full_queue_is_429_at_once() -> None:
    async with gateway(max_sequences=1, limits=Limits(queue_requests=2)) as g:
        worker = g.fleet.workers["worker-0"]
        for _ in range(3):
            await g.post(UNARY)
        refused = await g.post(UNARY)
        assert refused.status == 429
        assert refused.headers["x-tidegate-reject-reason"] == "queue_full"
        assert refused.json["error"]["type"] == "rate_limit_error"
        for slot in (1, 2, 3):
            worker.finish(slot)
            await settle_down()
    assert [record.outcome for record in g.records].count(Outcome.FINISHED) == 3


@in_virtual_time
async def test_queue_is_bounded_by_bytes_too() -> None:
    async with gateway(max_sequences=1, limits=Limits(queue_bytes=len(UNARY) + 1)) as g:
        worker = g.fleet.workers["worker-0"]
        await g.post(UNARY)
        await g.post(UNARY)
        assert (await g.post(UNARY)).status == 429
        for slot in (1, 2):
            worker.finish(slot)
            await settle_down()


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (b'{"messages": []}', 400, "messages", "invalid_value"),
        (b"{}", 400, "messages", "missing_required_parameter"),
        (chat_body(model="gpt-9"), 404, "model", "model_not_found"),
        (chat_body(max_tokens=200_000), 400, "max_tokens", "invalid_value"),
        (chat_body(max_tokens=100_000, n=2), 400, "max_tokens", "invalid_value"),
        (chat_body(max_tokens=4096), 400, "max_tokens", "context_length_exceeded"),
        (chat_body(x="y" * 20_000), 413, None, "request_too_large"),
    ],
)
def test_bad_request_is_refused_in_openais_shape(body: bytes, status: int, param: str | None, code: str) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(limits=Limits(body_bytes=10_000)) as g:
            client = await g.post(body)
            await client.task
            error = client.json["error"]
            assert client.status == status
            assert (error["param"], error["code"]) == (param, code)
            assert set(error) == {"message", "type", "param", "code"}
            assert client.headers["content-type"] == "application/json"
            assert "x-request-id" in client.headers
            assert g.fleet.workers["worker-0"].submitted == []
        assert g.record.outcome is Outcome.REJECTED

    test()


@in_virtual_time
async def test_too_large_body_is_refused_while_it_comes() -> None:
    async with gateway(limits=Limits(body_bytes=100)) as g:
        client = g.open()
        for _ in range(2):
            client.send_body(b"x" * 60, more_body=True)
        await client.task
        assert client.status == 413


@in_virtual_time
async def test_declared_length_over_the_limit_is_refused_before_the_body() -> None:
    async with gateway(limits=Limits(body_bytes=100)) as g:
        client = g.open(headers={"content-length": "101"})
        await client.task
        assert client.status == 413


@in_virtual_time
async def test_without_a_worker_it_is_503_with_retry_after() -> None:
    async with gateway(workers=0) as g:
        client = await g.post()
        await client.task
        assert client.status == 503
        assert client.headers["x-tidegate-reject-reason"] == "no_worker"
        assert int(client.headers["retry-after"]) >= 1


@in_virtual_time
async def test_model_whose_workers_are_gone_is_503_not_404() -> None:
    async with gateway(workers=2) as g:
        g.fleet.join("other", names=("other-1",))
        g.fleet.lose("other")
        client = await g.post(chat_body(model="other-1"))
        assert client.status == 503


@in_virtual_time
async def test_model_is_required_where_several_are_served() -> None:
    async with gateway() as g:
        g.fleet.join("other", names=("other-1",))
        client = await g.post()
        assert client.status == 400
        assert client.json["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (FailureKind.INVALID, 400, "invalid_value"),
        (FailureKind.CONTEXT_EXCEEDED, 400, "context_length_exceeded"),
        (FailureKind.UNKNOWN_MODEL, 404, "model_not_found"),
        (FailureKind.INTERNAL, 503, "service_unavailable"),
        (FailureKind.UNAVAILABLE, 503, "service_unavailable"),
    ],
)
def test_what_a_worker_refuses_is_told_in_the_clients_terms(kind: FailureKind, status: int, code: str) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(limits=Limits(attempts=1)) as g:
            client = await g.post()
            g.fleet.workers["worker-0"].fail(1, kind, "no good", "messages")
            await client.task
            assert client.status == status
            assert client.json["error"]["code"] == code
            if status == 400:
                assert client.json["error"]["param"] == "messages"
            if status == 503:
                assert "retry-after" in client.headers

    test()


@in_virtual_time
async def test_a_length_that_a_worker_refuses_has_the_name_that_the_client_gave_it() -> None:
    async with gateway() as g:
        for number, field in enumerate(("max_tokens", "max_completion_tokens"), 1):
            client = await g.post(chat_body(**{field: 7}))
            g.fleet.workers["worker-0"].fail(number, FailureKind.CONTEXT_EXCEEDED, "too long", "max_tokens")
            await client.task
            assert client.json["error"]["param"] == field


# ---------------------------------------------------------------- failures and retries


@pytest.mark.parametrize("how", ["lost", FailureKind.UNAVAILABLE, FailureKind.INTERNAL])
def test_failure_before_the_first_token_is_retried_elsewhere(how: str | FailureKind) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2) as g:
            client = await g.post()
            await asyncio.sleep(1)
            if isinstance(how, FailureKind):
                g.fleet.workers["worker-0"].fail(1, how)
            else:
                g.fleet.lose("worker-0")
            await settle_down()
            second = g.fleet.workers["worker-1"]
            assert len(second.submitted) == 1
            second.token(text="saved")
            second.finish(output_tokens=1)
            await client.task
            assert (client.status, client.text) == (200, "saved")
            assert client.headers["x-tidegate-worker"] == "worker-1"
        assert [attempt.worker for attempt in g.record.attempts] == ["worker-0", "worker-1"]
        assert g.record.attempts[0].error
        assert g.record.attempts[1].error is None
        assert g.record.phases.retry == 1_000_000_000
        assert g.record.outcome is Outcome.FINISHED

    test()


@pytest.mark.parametrize("kind", [FailureKind.INVALID, FailureKind.CONTEXT_EXCEEDED, FailureKind.UNKNOWN_MODEL])
def test_what_would_fail_anywhere_is_not_retried(kind: FailureKind) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2) as g:
            client = await g.post()
            g.fleet.workers["worker-0"].fail(1, kind)
            await client.task
            assert g.fleet.workers["worker-1"].submitted == []

    test()


@pytest.mark.parametrize("how", ["lost", FailureKind.UNAVAILABLE, FailureKind.INTERNAL])
def test_failure_after_the_first_token_is_an_error_event_and_no_retry(how: str | FailureKind) -> None:
    @in_virtual_time
    async def test() -> None:
        async with gateway(workers=2) as g:
            client = await g.post()
            worker = g.fleet.workers["worker-0"]
            worker.token(text="half ")
            if isinstance(how, FailureKind):
                worker.fail(1, how)
            else:
                g.fleet.lose("worker-0")
            await client.task
            assert g.fleet.workers["worker-1"].submitted == []
            assert client.text == "half "
            assert client.events[-1]["error"]["type"] == "server_error"
            assert client.is_complete
        assert (g.record.outcome, g.record.status) == (Outcome.FAILED, 200)

    test()


@in_virtual_time
async def test_failure_after_the_first_token_of_a_unary_request_is_503() -> None:
    async with gateway(workers=2) as g:
        client = await g.post(UNARY)
        g.fleet.workers["worker-0"].token()
        g.fleet.lose("worker-0")
        await client.task
        assert client.status == 503
        assert "retry-after" in client.headers
    assert g.record.outcome is Outcome.FAILED


@in_virtual_time
async def test_attempts_are_limited() -> None:
    async with gateway(workers=4, limits=Limits(attempts=3)) as g:
        client = await g.post()
        tried = []
        for _ in range(3):
            (worker,) = [worker for worker in g.fleet.workers.values() if worker.sinks]
            tried.append(worker.name)
            worker.fail(next(iter(worker.sinks)), FailureKind.INTERNAL)
            await settle_down()
        await client.task
        assert client.status == 503
        assert len(set(tried)) == 3, "a retry avoids the worker that failed"
    assert len(g.record.attempts) == 3


@in_virtual_time
async def test_last_worker_lost_before_the_first_token_is_503() -> None:
    async with gateway() as g:
        client = await g.post()
        g.fleet.lose("worker-0")
        await client.task
        assert client.status == 503
        assert client.headers["x-tidegate-reject-reason"] in ("no_worker", "worker_lost")
        assert "retry-after" in client.headers


@in_virtual_time
async def test_queue_of_a_lost_model_is_refused_at_once() -> None:
    async with gateway(max_sequences=1) as g:
        await g.post(UNARY)
        waiting = [await g.post(UNARY) for _ in range(3)]
        g.fleet.lose("worker-0")
        await settle_down()
        assert [client.status for client in waiting] == [503] * 3


@in_virtual_time
async def test_worker_that_leaves_between_placement_and_dispatch_is_not_used() -> None:
    async with gateway(max_sequences=1) as g:
        first = g.fleet.workers["worker-0"]
        running = await g.post(UNARY)
        waiting = await g.post(UNARY)
        first.finish()
        await asyncio.sleep(0)  # the room is given away, the waiting request has not run yet
        first.is_ready = False
        second = g.fleet.join("worker-1")
        await settle_down()
        second.finish()
        await waiting.task
        await running.task
        assert waiting.status == 200
        assert waiting.headers["x-tidegate-worker"] == "worker-1"


@in_virtual_time
async def test_retry_goes_to_the_only_worker_when_there_is_no_other() -> None:
    async with gateway() as g:
        client = await g.post()
        worker = g.fleet.workers["worker-0"]
        worker.fail(1, FailureKind.INTERNAL)
        await settle_down()
        worker.token(2)
        worker.finish(2, output_tokens=1)
        await client.task
        assert client.status == 200


# ---------------------------------------------------------------- draining


@in_virtual_time
async def test_draining_refuses_new_requests_and_lets_running_ones_finish() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        running = await g.post()
        worker.token()
        drained = asyncio.ensure_future(g.pipeline.drain(60))
        await settle_down()
        refused = await g.post()
        assert refused.status == 503
        assert refused.headers["x-tidegate-reject-reason"] == "draining"
        assert "retry-after" in refused.headers
        assert not drained.done()
        worker.finish(output_tokens=1)
        assert await drained is True
        await running.task
        assert running.events[-1] == "[DONE]"


@in_virtual_time
async def test_drain_gives_up_after_its_limit() -> None:
    async with gateway(limits=Limits(first_token_s=100)) as g:
        running = await g.post()
        assert await g.pipeline.drain(60) is False
        running.leave()


# ---------------------------------------------------------------- bugs


@in_virtual_time
async def test_bug_settles_its_request_and_ends_nothing_else() -> None:
    async with gateway() as g:
        worker = g.fleet.workers["worker-0"]
        other = await g.post()
        task = asyncio.ensure_future(_post_with_broken_socket(g))
        await settle_down()
        worker.finish(2)
        with pytest.raises(RuntimeError, match="broken"):
            await task
        worker.token(1)
        worker.finish(1)
        await other.task
        assert other.status == 200
    assert [record.outcome for record in g.records] == [Outcome.FAILED, Outcome.FINISHED]
    assert g.records[0].status == 500


async def _post_with_broken_socket(g: Gateway) -> None:
    client = FakeClient("/v1/chat/completions", {})
    client.send_body(UNARY)

    async def send(_: object) -> None:
        raise RuntimeError("broken")

    await g.pipeline.handle(g._endpoints[client.scope["path"]], client.scope, client.receive, send)
