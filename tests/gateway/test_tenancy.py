"""Tenants, bands, limits and forecasts through the whole pipeline."""

import asyncio
import signal
from pathlib import Path

from gateway.fleet import Fleet
from gateway.reload import Reload
from gateway.scheduler import Scheduler
from gateway.settings import GatewaySettings, Limits
from gateway.tenants import DEFAULT_BANDS, Tenant, TenantTable, new_key
from protos.core import settings
from protos.core.clock import SYSTEM_CLOCK
from protos.core.record import Outcome
from tests.gateway.fakes import chat_body, gateway, in_virtual_time, settle_down

KEY, KEY_HASH = new_key()
BEARER = f"Bearer {KEY}"
UNARY = chat_body(max_tokens=8)


def table(**acme: object) -> TenantTable:
    return TenantTable(DEFAULT_BANDS, {"acme": Tenant(keys=(KEY_HASH,), **acme)})  # type: ignore[arg-type]


@in_virtual_time
async def test_without_a_key_it_is_401_before_the_body_is_read() -> None:
    async with gateway(tenants=table()) as g:
        client = g.open()
        await client.task
        assert client.status == 401
        assert client.json["error"]["code"] == "missing_api_key"
        assert client.headers["www-authenticate"] == "Bearer"
    assert g.record.outcome is Outcome.REJECTED


@in_virtual_time
async def test_a_key_that_is_withdrawn_while_the_body_comes_is_good_no_more() -> None:
    async with gateway(tenants=table()) as g:
        client = g.open(headers={"authorization": BEARER})
        await settle_down()
        g.pipeline.tenants = TenantTable(DEFAULT_BANDS, {"other": Tenant(keys=(new_key()[1],))})
        client.send_body(UNARY)
        await client.task
        assert (client.status, client.json["error"]["code"]) == (401, "invalid_api_key")


@in_virtual_time
async def test_the_record_names_tenant_and_band() -> None:
    async with gateway(tenants=table(max_priority="critical")) as g:
        client = await g.post(UNARY, authorization=BEARER, x_tidegate_priority="critical")
        g.fleet.workers["worker-0"].finish(1)
        await client.task
    assert (g.record.tenant, g.record.priority) == ("acme", "critical")


@in_virtual_time
async def test_a_cancelled_request_gives_its_concurrency_back() -> None:
    async with gateway(tenants=table(concurrency=1)) as g:
        first = await g.post(authorization=BEARER)
        refused = await g.post(authorization=BEARER)
        assert refused.status == 429
        assert refused.headers["x-tidegate-reject-reason"] == "tenant_concurrency"
        first.leave()
        await settle_down()
        g.fleet.workers["worker-0"].finish(1, "cancelled")
        await first.task
        third = await g.post(UNARY, authorization=BEARER)
        g.fleet.workers["worker-0"].finish(2)
        await third.task
        assert third.status == 200


@in_virtual_time
async def test_the_top_band_is_placed_before_what_came_earlier() -> None:
    async with gateway(tenants=TenantTable(DEFAULT_BANDS, {}), max_sequences=1) as g:
        worker = g.fleet.workers["worker-0"]
        running = await g.post(UNARY)
        batch = await g.post(UNARY, x_tidegate_priority="batch")
        critical = await g.post(UNARY, x_tidegate_priority="critical")
        worker.finish(1)
        await running.task
        await settle_down()
        worker.finish(2)
        await critical.task
        assert not batch.task.done()
        worker.finish(3)
        await batch.task


@in_virtual_time
async def test_a_clients_own_deadline_ends_its_wait() -> None:
    async with gateway(max_sequences=1) as g:
        running = await g.post(UNARY)
        waiting = await g.post(UNARY, x_tidegate_ttft_ms="250")
        await asyncio.sleep(0.3)
        await waiting.task
        assert waiting.status == 429
        assert waiting.headers["x-tidegate-reject-reason"] == "deadline"
        assert int(waiting.headers["retry-after"]) >= 1
        g.fleet.workers["worker-0"].finish(1)
        await running.task
    waited = g.records[0]
    assert (waited.outcome, waited.error_code) == (Outcome.TIMED_OUT, "timeout"), "it was admitted"
    assert waited.total_ns == 250_000_000


@in_virtual_time
async def test_what_would_be_too_late_is_refused_at_once_when_steps_have_been_seen() -> None:
    async with gateway(max_sequences=1) as g:
        worker = g.fleet.workers["worker-0"]
        clients = [await g.post(UNARY) for _ in range(20)]
        for slot in range(1, 13):  # one step each, and a second
            await asyncio.sleep(1.0)
            worker.token(slot)
            g.fleet.step("worker-0")
            worker.finish(slot, output_tokens=1)
            await settle_down()
        hasty = await g.post(UNARY, x_tidegate_ttft_ms="2000")
        await hasty.task
        assert hasty.status == 429
        assert hasty.headers["x-tidegate-reject-reason"] == "deadline"
        critical = await g.post(UNARY, x_tidegate_ttft_ms="2000", x_tidegate_priority="critical")
        assert not critical.task.done()
        critical.leave()
        for slot in range(13, 21):
            worker.finish(slot)
            await settle_down()
        await asyncio.gather(*(client.task for client in clients), critical.task)
    refused = next(record for record in g.records if record.reject_reason == "deadline")
    assert (refused.outcome, refused.error_code) == (Outcome.REJECTED, "rate_limit_exceeded")
    assert refused.total_ns < 1_000_000


def write(file: Path, requests: object) -> None:
    file.write_text(
        f'[gateway.tenants.acme]\nkeys = ["{KEY_HASH}"]\nrequests_per_minute = {requests}\n', encoding="utf-8"
    )


async def test_a_changed_file_replaces_the_tenants_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    write(file, 5)

    def read() -> GatewaySettings:
        return settings.load(GatewaySettings, "gateway", file=file, environ={}, flags={})

    class Holder:
        tenants = TenantTable(read().bands, read().tenants)

    holder = Holder()
    fleet = Fleet((), gateway="g", version="0", clock=SYSTEM_CLOCK, scheduler=Scheduler())
    reload = asyncio.ensure_future(Reload(read, file).run(holder, fleet))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    try:
        write(file, 7)
        signal.raise_signal(signal.SIGHUP)
        await until(lambda: holder.tenants.get("acme").requests_per_minute == 7)
        for bad in ('"many"', "-1", "3\nnot toml", "3\nweight_ = 2"):
            write(file, bad)
            signal.raise_signal(signal.SIGHUP)
            await asyncio.sleep(0.05)
            assert holder.tenants.get("acme").requests_per_minute == 7
        file.write_text("[gateway]\n", encoding="utf-8")
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert holder.tenants.has_keys, "a file without keys does not open the gateway to everybody"
        write(file, 9)  # seen without a signal
        await until(lambda: holder.tenants.get("acme").requests_per_minute == 9)
    finally:
        reload.cancel()


async def until(is_true: object) -> None:
    async with asyncio.timeout(10):
        while not is_true():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@in_virtual_time
async def test_a_running_request_that_misses_its_own_deadline_is_429_and_the_gateways_504() -> None:
    limits = Limits(first_token_s=5, total_s=9)
    async with gateway(workers=4, limits=limits) as g:
        clients = [
            await g.post(UNARY, x_tidegate_ttft_ms="2000"),
            await g.post(UNARY, x_tidegate_ttft_ms="60000"),
            await g.post(UNARY, x_tidegate_deadline_ms="7000"),
            await g.post(UNARY),
        ]
        for name in ("worker-2", "worker-3"):
            g.fleet.workers[name].token(1)
        await asyncio.sleep(10)
        assert [client.status for client in clients] == [429, 504, 429, 504]
        assert {client.headers["x-tidegate-reject-reason"] for client in clients} == {"deadline"}
        assert {client.json["error"]["code"] for client in clients} == {"timeout"}
    assert {record.outcome for record in g.records} == {Outcome.TIMED_OUT}
