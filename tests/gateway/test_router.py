"""Where requests go: prefixes, load, sessions, breakers, silence and warm-up."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest

from gateway.breaker import Verdict
from gateway.order import Ticket
from gateway.prefixes import cut
from gateway.router import WARM_UP_NS
from gateway.scheduler import Scheduler
from protos.core.contract import Load
from tests.gateway.fakes import chat_body, gateway, in_virtual_time, model_info, settle_down

TEXT = random.Random(1).randbytes(400_000)
SECOND_NS = 1_000_000_000
MODEL = {"names": ("m",), "max_sequences": 64, "max_batch_tokens": 10**6, "kv_blocks": 10_000, "kv_block_tokens": 16}


class Fleet:
    """A scheduler with a few equal workers; each placed request runs until `end`."""

    def __init__(self, workers: int, **model: Any) -> None:
        self.scheduler = Scheduler()
        self.now_ns = 0
        self.numbers = 0
        for number in range(workers):
            self.join(f"w{number}", **model)

    def join(self, name: str, boot_id: str = "1", **model: Any) -> None:
        self.scheduler.worker_joined(name, model_info(**{**MODEL, **model}), boot_id=boot_id, now_ns=self.now_ns)

    def send(self, prompt: bytes = b"", *, model: str = "m", tenant: str = "t", **ticket: Any) -> str:
        self.numbers += 1
        it = Ticket(
            request=self.numbers,
            model=model,
            tenant=tenant,
            input_tokens=len(prompt) // 4 + 1,
            output_tokens=100,
            blocks=cut(prompt, model),
            prompt_bytes=len(prompt),
            deadline_ns=10**18,
            **ticket,
        )
        self.scheduler.enqueue(it)
        (placement,) = self.scheduler.place(self.now_ns).placed
        self.cached_tokens = placement.cached_tokens
        return placement.worker

    def start(self, prompt_tokens: int = 0, cached_tokens: int = 0) -> None:
        self.scheduler.started(self.numbers, self.now_ns, prompt_tokens, cached_tokens)

    def end(self) -> None:
        self.scheduler.release(self.numbers)

    def run(self, prompt: bytes = b"", **ticket: Any) -> str:
        """Send and see it end."""
        worker = self.send(prompt, **ticket)
        self.end()
        return worker

    def step(self, worker: str, after_ns: int = 0) -> None:
        """One of its steps ends; answers go on."""
        self.now_ns += after_ns
        self.scheduler.worker_reported(worker, Load(running=1), is_draining=False)
        self.scheduler.stepped(worker, self.now_ns)

    def know(self, worker: str, token_ns: int = 100_000) -> None:
        """It has computed prompts, so that its steps are known: 20 ms, and so much per token. It is idle again."""
        forecast = self.scheduler.worker(worker).forecast  # type: ignore[union-attr]
        for tokens in range(100, 2_100, 100):
            forecast.placed(-1, tokens, self.now_ns)
            forecast.started(-1)
            self.now_ns += 20_000_000 + token_ns * tokens
            forecast.stepped(self.now_ns, is_idle=True)

    def fail(self, worker: str, times: int = 5) -> None:
        for _ in range(times):
            self.scheduler.attempt_ended(worker, Verdict.FAILURE, self.now_ns)


def test_next_turn_goes_where_the_last_one_ran_though_others_have_less_to_do() -> None:
    fleet = Fleet(3)
    fleet.send()
    home = fleet.run(TEXT[:40_000])
    others = tuple({"w0", "w1", "w2"} - {home})
    assert [fleet.send(avoid=others) for _ in range(5)] == [home] * 5
    assert fleet.send(TEXT[:44_000]) == home
    assert 9_700 < fleet.cached_tokens <= 10_000


def test_next_turn_goes_where_its_prompt_is_cached_though_other_prompts_fill_the_next_steps_there() -> None:
    fleet = Fleet(2, max_batch_tokens=2_048)
    home = fleet.run(TEXT[:40_000])
    (other,) = {"w0", "w1"} - {home}
    assert fleet.send(TEXT[200_000:220_000], avoid=(other,)) == home, "5,000 tokens"
    assert fleet.send(TEXT[:44_000]) == home


def test_prompts_of_nobody_else_go_to_the_least_loaded() -> None:
    fleet = Fleet(3)
    workers = [fleet.send(TEXT[number * 4_000 : (number + 1) * 4_000]) for number in range(30)]
    for number in range(3, 31, 3):
        assert set(collections.Counter(workers[:number]).values()) == {number // 3}
    assert fleet.cached_tokens == 0


def test_what_every_prompt_begins_with_does_not_gather_all_on_one_worker() -> None:
    fleet = Fleet(4)
    system = TEXT[:8_000]
    workers = collections.Counter(fleet.send(system + TEXT[at : at + 400]) for at in range(10_000, 74_000, 400))
    assert min(workers.values()) > 0.75 * max(workers.values())


def test_another_worker_caches_what_every_prompt_begins_with_before_the_first_has_a_large_batch() -> None:
    fleet = Fleet(4)
    workers = [fleet.send(TEXT[:8_000] + TEXT[at : at + 400]) for at in range(10_000, 16_000, 400)]
    assert workers.index("w1") <= 12


def known_fleet() -> Fleet:
    """Two workers whose steps are known."""
    fleet = Fleet(2)
    for name in ("w0", "w1"):
        fleet.know(name)
    return fleet


def unlike_fleet() -> Fleet:
    """The same: the first one writes ten answers, the other one has nothing to do."""
    fleet = known_fleet()
    for _ in range(10):
        fleet.send(avoid=("w1",))
    fleet.step("w0", after_ns=SECOND_NS // 50)
    return fleet


def test_prompt_goes_where_its_first_token_is_sooner_though_more_answers_are_written_there() -> None:
    fleet = unlike_fleet()
    fleet.send(TEXT[:8_000], avoid=("w0",))
    fleet.now_ns += SECOND_NS // 50
    assert fleet.send() == "w0", "a step of 2,000 tokens has 200 ms to go on w1"
    fleet.now_ns += SECOND_NS * 2 // 10
    assert fleet.send() == "w1", "it ends about now"


def test_urgent_prompt_goes_where_its_first_token_is_sooner_for_less() -> None:
    fleet = unlike_fleet()
    fleet.send(TEXT[:600], avoid=("w0",))
    fleet.now_ns += SECOND_NS * 29 // 1_000
    workers = [fleet.run(band=band) for band in (1, 0)]
    assert workers == ["w1", "w0"], "a step of 150 tokens has 6 ms to go on w1; that of w0 has one"


def test_step_that_is_about_to_end_is_missed() -> None:
    fleet = known_fleet()
    fleet.send(TEXT[:400], avoid=("w1",))
    fleet.send(TEXT[:800], avoid=("w0",))
    fleet.now_ns += SECOND_NS * 299 // 10_000
    assert fleet.run() == "w1", "w0 has a tenth of a millisecond to go, and then another step; w1 has ten"
    fleet.now_ns -= SECOND_NS // 1_000
    assert fleet.run() == "w0", "more than a millisecond is enough"


def test_prompts_that_come_at_once_do_not_wait_for_each_other_while_another_worker_has_none() -> None:
    fleet = unlike_fleet()
    fleet.send(avoid=("w0",))
    burst = [fleet.send(TEXT[at : at + 4_000], band=0) for at in range(0, 24_000, 4_000)]
    assert collections.Counter(burst) == {"w0": 3, "w1": 3}


def test_long_prompt_does_not_go_where_others_would_wait_for_it() -> None:
    fleet = known_fleet()
    fleet.send(TEXT[:400], avoid=("w1",))
    fleet.send(TEXT[:1_200], avoid=("w0",))
    fleet.now_ns += SECOND_NS // 500
    fleet.send(avoid=("w1",))
    assert fleet.run() == "w0", "its step ends 20 ms sooner"
    assert fleet.run(TEXT[200_000:204_000]) == "w1", "the one that waits for w0 would wait 100 ms more"


def test_step_that_should_have_ended_is_not_taken_to_end_now() -> None:
    fleet = known_fleet()
    fleet.send(TEXT[:4_000], avoid=("w1",))
    fleet.send(TEXT[:4_000], avoid=("w0",))
    fleet.start()
    fleet.step("w1", after_ns=SECOND_NS // 2)
    fleet.now_ns += SECOND_NS // 100
    assert {fleet.send() for _ in range(3)} == {"w1"}, "w0 is 390 ms late; w1 has 10 ms to go"


def test_workers_whose_prompts_seem_to_cost_nothing_are_given_as_much() -> None:
    fleet = Fleet(3)
    for name, token_ns in (("w0", 0), ("w1", 1), ("w2", 100)):
        fleet.know(name, token_ns)
    sent = []
    for _ in range(30):
        for _ in range(3):
            fleet.now_ns += SECOND_NS // 150
            sent.append(fleet.send())
        for name in ("w0", "w1", "w2"):
            fleet.step(name)
    counts = collections.Counter(sent)
    assert min(counts[name] for name in ("w0", "w1", "w2")) > 20


def test_adapters_of_one_worker_do_not_share_a_cache() -> None:
    fleet = Fleet(0)
    fleet.join("w0", names=("m", "adapter"))
    fleet.run(TEXT[:8_000])
    fleet.run(TEXT[:8_000], model="adapter")
    assert fleet.cached_tokens == 0
    fleet.run(TEXT[:8_000], model="adapter")
    assert fleet.cached_tokens > 1_900


def test_turns_of_a_session_meet_on_one_worker_before_there_is_a_prefix_to_match() -> None:
    fleet = Fleet(4)
    homes = {session: fleet.run(b"hi", session=session) for session in map(str, range(40))}
    assert set(homes.values()) == {"w0", "w1", "w2", "w3"}
    assert all(fleet.run(b"hi", session=session) == home for session, home in homes.items())
    other_tenant = [fleet.run(b"hi", session=session, tenant="u") for session in homes]
    assert other_tenant != list(homes.values()), "a session's name is its tenant's own"


def test_few_sessions_move_when_a_worker_joins() -> None:
    fleet = Fleet(3)
    before = [fleet.run(b"hi", session=str(number)) for number in range(60)]
    fleet.join("w3")
    after = [fleet.run(b"hi", session=str(number)) for number in range(60)]
    moved = {b for a, b in zip(before, after, strict=True) if a != b}
    assert moved == {"w3"}


# ---------------------------------------------------------------- restarts


def test_reconnected_worker_still_has_its_cache_and_a_restarted_one_has_not() -> None:
    fleet = Fleet(1)
    fleet.run(TEXT[:8_000])
    fleet.scheduler.worker_left("w0")
    fleet.join("w0")
    fleet.run(TEXT[:8_000])
    assert fleet.cached_tokens > 1_900
    fleet.scheduler.worker_left("w0")
    fleet.join("w0", boot_id="2")
    fleet.run(TEXT[:8_000])
    assert fleet.cached_tokens == 0


def test_breaker_outlives_a_restart_but_not_the_workers_removal() -> None:
    fleet = Fleet(2)
    fleet.fail("w0")
    fleet.scheduler.worker_left("w0")
    fleet.join("w0", boot_id="2")
    assert fleet.run() == "w1"
    fleet.scheduler.worker_left("w0")
    fleet.scheduler.worker_forgotten("w0")
    fleet.join("w0", boot_id="2")
    assert {fleet.send(), fleet.send()} == {"w0", "w1"}


def test_workers_that_cache_nothing_are_routed_to_by_load() -> None:
    fleet = Fleet(2)
    for _ in range(120):
        fleet.send(TEXT[:8_000])
        fleet.start(prompt_tokens=2_000, cached_tokens=0)
        fleet.end()
    first = fleet.send(TEXT[:8_000])
    assert fleet.cached_tokens < 100
    assert fleet.send(TEXT[:8_000]) != first


# ---------------------------------------------------------------- breakers


@pytest.mark.parametrize(("workers", "most_ejected"), [(1, 0), (2, 1), (3, 1), (6, 2), (9, 3)])
def test_a_third_of_the_workers_is_left_alone_and_never_the_last(workers: int, most_ejected: int) -> None:
    fleet = Fleet(workers)
    for number in range(workers):
        fleet.fail(f"w{number}")
    used = {fleet.send() for _ in range(10 * workers)}
    assert len(used) == workers - most_ejected


def test_ejected_worker_is_tried_again_and_taken_back() -> None:
    fleet = Fleet(2)
    fleet.fail("w0")
    assert {fleet.run() for _ in range(5)} == {"w1"}
    fleet.now_ns += 2 * SECOND_NS
    assert fleet.send() == "w0", "one request tells"
    assert fleet.send() == "w1"
    fleet.scheduler.attempt_ended("w0", Verdict.SUCCESS, fleet.now_ns)
    assert {fleet.send() for _ in range(4)} == {"w0", "w1"}


# ---------------------------------------------------------------- silence


def hung_fleet(workers: int) -> Fleet:
    """The first one does not end a step that began two seconds ago; those of the others take 20 ms."""
    fleet = Fleet(workers)
    for number in range(workers):
        assert fleet.send() == f"w{number}"
    for _ in range(100):
        fleet.now_ns += SECOND_NS // 50
        for number in range(1, workers):
            fleet.step(f"w{number}")
    return fleet


def test_worker_whose_step_does_not_end_gets_nothing_more_until_it_does() -> None:
    fleet = hung_fleet(3)
    assert {fleet.send() for _ in range(8)} == {"w1", "w2"}
    fleet.step("w0")
    assert "w0" in {fleet.send() for _ in range(3)}


def test_only_worker_gets_requests_though_its_step_does_not_end() -> None:
    assert hung_fleet(1).send() == "w0"


def test_step_that_takes_as_long_as_the_longest_is_waited_for() -> None:
    fleet = Fleet(2)
    assert [fleet.send(), fleet.send()] == ["w0", "w1"]
    fleet.now_ns += 5 * SECOND_NS
    for request, name in ((1, "w0"), (2, "w1")):
        fleet.scheduler.started(request, fleet.now_ns)
        fleet.step(name)
    fleet.now_ns += 5 * SECOND_NS
    assert {fleet.send(), fleet.send()} == {"w0", "w1"}


def test_idle_time_is_no_step() -> None:
    """The last request is cancelled before its first token: no frame tells that the step has ended."""
    fleet = Fleet(2)
    assert [fleet.send(), fleet.send()] == ["w0", "w1"]
    for request in (1, 2):
        fleet.scheduler.release(request)
    fleet.now_ns += 100 * SECOND_NS
    assert {fleet.send(), fleet.send()} == {"w0", "w1"}
    for name in ("w0", "w1"):
        fleet.step(name, after_ns=SECOND_NS // 100)
    steps_ns = {worker.forecast.step_ns() for worker in fleet.scheduler.workers}
    assert max(steps_ns) <= SECOND_NS // 50


# ---------------------------------------------------------------- warm-up


def test_worker_that_joins_a_warm_fleet_gets_its_share_little_by_little() -> None:
    fleet = Fleet(2)
    fleet.now_ns = 2 * WARM_UP_NS
    fleet.join("new")
    shares = []
    for start in range(0, 120_000, 30_000):
        sent = [fleet.send(TEXT[at : at + 1_000]) for at in range(start, start + 30_000, 1_000)]
        shares.append(sent.count("new"))
        for request in range(fleet.numbers - 29, fleet.numbers + 1):
            fleet.scheduler.release(request)
        fleet.now_ns += WARM_UP_NS // 2
    assert shares[0] <= 2
    assert shares[0] < shares[1] < shares[2] == shares[3] == 10


def test_workers_that_start_together_need_no_warm_up() -> None:
    fleet = Fleet(1)
    fleet.now_ns = 5 * SECOND_NS
    fleet.join("second")
    assert collections.Counter(fleet.send() for _ in range(10)) == {"w0": 5, "second": 5}


# ---------------------------------------------------------------- the whole pipeline


@in_virtual_time
async def test_client_is_told_what_was_expected_to_be_cached() -> None:
    message = {"role": "user", "content": TEXT[:3_000].hex()}
    async with gateway(workers=2) as it:
        clients = []
        for turns in (1, 2):
            client = await it.post(chat_body(messages=[message] * turns), x_tidegate_timing="1")
            worker = it.fleet.workers["worker-0"]
            worker.token(turns)
            worker.finish(turns)
            await settle_down()
            clients.append(client)
        first, second = (client.json["tidegate"]["expected_cached_tokens"] for client in clients)
        assert (first, 1_400 < second < 1_550) == (0, True)
        assert [record.expected_cached_tokens for record in it.records] == [0, second]
