from __future__ import annotations

import collections

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.breaker import Verdict
from gateway.forecast import UNKNOWN_PARTS
from gateway.ledger import Lease, Ledger
from gateway.limiter import SequenceLimit
from gateway.order import Ticket
from gateway.router import Worker, choose
from gateway.scheduler import COMPANY_NS, Placements, Scheduler
from protos.core.contract import Load
from tests.gateway.fakes import model_info


def ticket(request: int, **changes: object) -> Ticket:
    facts: dict[str, object] = {
        "model": "a",
        "sequences": 1,
        "output_tokens": 10,
        "size_bytes": 100,
        "deadline_ns": 1_000,
    }
    return Ticket(request=request, **{**facts, **changes})  # type: ignore[arg-type]


def scheduler_with(*workers: str, slots: int = 2, model: str = "a", token_target_ns: int | None = None) -> Scheduler:
    scheduler = Scheduler(token_target_ns)
    for name in workers:
        scheduler.worker_joined(name, model_info(names=(model,), max_sequences=slots))
    return scheduler


def placed(decided: Placements) -> list[int]:
    return [placement.ticket.request for placement in decided.placed]


# ---------------------------------------------------------------- ledger


def test_second_release_is_loud() -> None:
    ledger = Ledger()
    ledger.acquire(Lease(request=1, worker="w", sequences=2, tokens=5))
    ledger.release(1)
    with pytest.raises(AssertionError, match="holds no lease"):
        ledger.release(1)


def test_second_acquire_is_loud() -> None:
    ledger = Ledger()
    lease = Lease(request=1, worker="w", sequences=2, tokens=5)
    ledger.acquire(lease)
    with pytest.raises(AssertionError, match="already holds"):
        ledger.acquire(lease)


def test_books_of_a_worker_add_up() -> None:
    ledger = Ledger()
    for request in range(3):
        ledger.acquire(Lease(request=request, worker="w", sequences=2, tokens=5))
    held = ledger.held_by("w")
    assert (held.requests, held.sequences, held.tokens) == (3, 6, 15)
    held.requests = 99
    assert ledger.held_by("w").requests == 3
    assert ledger.sequences_on("other") == 0


# ---------------------------------------------------------------- router


def worker(name: str, slots: int = 4, **facts: object) -> Worker:
    model, limit = model_info(max_sequences=slots), SequenceLimit(slots)
    return Worker(name=name, model=model, limit=limit, **facts)  # type: ignore[arg-type]


def chosen(workers: list[Worker], ledger: Ledger, now_ns: int = 0, **facts: object) -> str | None:
    for each in workers:
        each.held = ledger.account(each.name)
    route = choose(workers, ticket(0, **facts), False, 0, now_ns)
    return route.worker.name if route is not None else None


def test_least_loaded_share_is_chosen() -> None:
    ledger = Ledger()
    ledger.acquire(Lease(request=1, worker="big", sequences=2, tokens=1))
    ledger.acquire(Lease(request=2, worker="small", sequences=1, tokens=1))
    workers = [worker("small", 2), worker("big", 8)]
    assert chosen(workers, ledger) == "big"


def test_full_and_draining_workers_are_not_chosen() -> None:
    ledger = Ledger()
    ledger.acquire(Lease(request=1, worker="full", sequences=4, tokens=1))
    workers = [worker("full"), worker("draining", is_draining=True), worker("leaving", is_leaving=True)]
    assert chosen(workers, ledger) is None


def test_failed_worker_is_the_last_choice() -> None:
    ledger = Ledger()
    ledger.acquire(Lease(request=1, worker="good", sequences=3, tokens=1))
    workers = [worker("bad"), worker("good")]
    assert chosen(workers, ledger, avoid=("bad",)) == "good"
    assert chosen(workers[:1], ledger, avoid=("bad",)) == "bad"


def test_request_larger_than_a_worker_waits_for_an_empty_one() -> None:
    ledger = Ledger()
    assert chosen([worker("w", 4)], ledger, sequences=16) == "w"
    ledger.acquire(Lease(request=1, worker="w", sequences=1, tokens=1))
    assert chosen([worker("w", 4)], ledger, sequences=16) is None


def test_worker_at_its_limit_waits_and_one_that_is_empty_takes_any_request() -> None:
    ledger = Ledger()
    limited = worker("w", 4)
    limited.limit.stepped(Load(running=4))
    limited.limit.stepped(Load(running=3, preemptions=1))
    assert limited.limit.value == 2
    assert chosen([limited], ledger, sequences=3) == "w"
    ledger.acquire(Lease(request=1, worker="w", sequences=2, tokens=1))
    assert limited.room == 0
    assert chosen([limited], ledger) is None


# ---------------------------------------------------------------- scheduler


def test_first_come_first_served() -> None:
    scheduler = scheduler_with("w", slots=2)
    for request in range(1, 6):
        scheduler.enqueue(ticket(request))
    assert placed(scheduler.place(0)) == [1, 2]
    scheduler.release(2)
    assert placed(scheduler.place(0)) == [3]
    assert placed(scheduler.place(0)) == []


def test_backlog_of_one_model_does_not_hold_up_another() -> None:
    scheduler = scheduler_with("w", slots=1)
    scheduler.worker_joined("v", model_info(names=("b",), max_sequences=1))
    for request in range(1, 4):
        scheduler.enqueue(ticket(request))
    scheduler.enqueue(ticket(4, model="b"))
    assert sorted(placed(scheduler.place(0))) == [1, 4]


def test_models_of_one_worker_share_its_room() -> None:
    scheduler = Scheduler()
    scheduler.worker_joined("w", model_info(names=("a", "b"), max_sequences=1))
    for request in range(1, 9):
        scheduler.enqueue(ticket(request))
    scheduler.enqueue(ticket(9, model="b"))
    order = []
    while scheduler.queued:
        (request,) = placed(scheduler.place(0))
        order.append(request)
        scheduler.release(request)
    assert order.index(9) <= 2, "a backlogged model does not starve another one"
    assert [request for request in order if request != 9] == list(range(1, 9))


def test_retry_stands_where_it_stood() -> None:
    scheduler = scheduler_with("w", slots=1)
    first = ticket(1, deadline_ns=1_000)
    scheduler.enqueue(first)
    scheduler.enqueue(ticket(2, deadline_ns=2_000))
    assert placed(scheduler.place(0)) == [1]
    scheduler.release(1)
    scheduler.enqueue(first)
    assert placed(scheduler.place(0)) == [1]


def test_request_leaves_the_queue_when_it_expires() -> None:
    scheduler = scheduler_with()
    scheduler.enqueue(ticket(1, deadline_ns=50))
    scheduler.enqueue(ticket(2, deadline_ns=30))
    assert scheduler.next_deadline_ns == 30
    assert scheduler.expire(29) == []
    assert scheduler.expire(30) == [2]
    assert scheduler.next_deadline_ns == 50
    scheduler.leave(1)
    assert scheduler.next_deadline_ns is None
    assert scheduler.expire(100) == []


def test_draining_worker_gets_no_more() -> None:
    scheduler = scheduler_with("w")
    scheduler.worker_reported("w", Load(), True)
    scheduler.enqueue(ticket(1))
    assert placed(scheduler.place(0)) == []


def test_a_share_of_the_sequences_is_kept_for_urgent_requests_while_there_is_company() -> None:
    scheduler = scheduler_with("w", slots=16)
    for number in range(20):
        scheduler.enqueue(ticket(number, tenant="loud", input_tokens=10))
    scheduler.enqueue(ticket(20, tenant="loud", band=0))
    assert placed(scheduler.place(0)) == [20, *range(13)], "two of sixteen stay free"
    scheduler.enqueue(ticket(21, tenant="quiet"))
    scheduler.enqueue(ticket(22, tenant="loud", band=0))
    assert placed(scheduler.place(0)) == [22, 21], "for the top band, and for a tenant that had less than its share"
    assert placed(scheduler.place(COMPANY_NS)) == []
    for number in (20, 0):
        scheduler.release(number)
    assert placed(scheduler.place(COMPANY_NS)) == [13, 14], "nobody came for long: nothing is kept"


def test_one_tenant_alone_has_all_sequences_and_its_requests_do_not_yield() -> None:
    scheduler = scheduler_with("w", slots=16)
    for number in range(20):
        scheduler.enqueue(ticket(number, band=2))
    decided = scheduler.place(0)
    assert len(decided.placed) == 16
    assert {placement.priority for placement in decided.placed} == {0}


def test_lower_bands_make_way_in_the_engine() -> None:
    scheduler = scheduler_with("w", slots=32)
    for band in range(4):
        scheduler.enqueue(ticket(band, band=band))
    assert [placement.priority for placement in scheduler.place(0).placed] == [0, 0, 2, 3]
    scheduler.enqueue(ticket(4, band=2))
    assert [placement.priority for placement in scheduler.place(COMPANY_NS).placed] == [0], "to nobody, later"


def test_who_had_much_more_than_others_makes_way_unless_it_has_to_be_in_time() -> None:
    scheduler = scheduler_with("w", slots=32)
    for number in range(5):
        scheduler.enqueue(ticket(number, tenant="loud", input_tokens=10))
    assert {(one.priority, one.step_tokens) for one in scheduler.place(0).placed} == {(0, 0)}, "nobody else is there"
    scheduler.enqueue(ticket(5, tenant="quiet", input_tokens=10))
    scheduler.enqueue(ticket(6, tenant="quiet", input_tokens=10))
    scheduler.place(0)
    scheduler.enqueue(ticket(7, tenant="quiet", input_tokens=10))
    scheduler.enqueue(ticket(8, tenant="loud", input_tokens=10))
    scheduler.enqueue(ticket(9, tenant="loud", input_tokens=10, is_hurried=True))
    decided = {one.ticket.request: (one.priority, one.step_tokens) for one in scheduler.place(0).placed}
    assert decided == {7: (0, 0), 8: (0, 0), 9: (0, 0)}, "five of seven are not three quarters"
    for number in range(10, 20):
        scheduler.enqueue(ticket(number, tenant="loud", input_tokens=1))
    scheduler.place(0)
    scheduler.enqueue(ticket(20, tenant="quiet", input_tokens=10))
    scheduler.enqueue(ticket(21, tenant="loud", input_tokens=10))
    scheduler.enqueue(ticket(22, tenant="loud", input_tokens=10, is_hurried=True))
    decided = {one.ticket.request: (one.priority, one.step_tokens) for one in scheduler.place(0).placed}
    assert decided == {20: (0, 0), 21: (1, 2048 // UNKNOWN_PARTS), 22: (0, 0)}


def test_lower_bands_get_less_of_a_step() -> None:
    scheduler = scheduler_with("w", slots=32)
    for band in range(4):
        scheduler.enqueue(ticket(band, band=band))
    parts = [placement.step_tokens for placement in scheduler.place(0).placed]
    assert parts == [0, 0, 2048 // UNKNOWN_PARTS // 2, 2048 // UNKNOWN_PARTS // 3]


def test_where_answers_have_a_pace_to_keep_only_urgent_prompts_are_computed_whole() -> None:
    scheduler = scheduler_with("w", slots=32, token_target_ns=10**9)
    for number in range(3):
        scheduler.enqueue(ticket(number, band=number, input_tokens=20))
    part = 2048 // UNKNOWN_PARTS
    decided = [(one.priority, one.step_tokens) for one in scheduler.place(0).placed]
    assert decided == [(0, 0), (1, part), (3, part // 2)]


def test_worker_whose_prompts_make_no_way_is_not_asked_for_it() -> None:
    scheduler = Scheduler()
    scheduler.worker_joined("w", model_info(names=("a",), max_sequences=32, makes_way=False))
    for band in range(4):
        scheduler.enqueue(ticket(band, band=band, input_tokens=500))
    assert [(one.priority, one.step_tokens) for one in scheduler.place(0).placed] == [(0, 0), (0, 0), (2, 0), (3, 0)]


def test_prompts_that_make_way_wait_in_the_gateway_and_not_in_the_engine() -> None:
    scheduler = scheduler_with("w", slots=32)
    scheduler.enqueue(ticket(0))
    for number in range(1, 9):
        scheduler.enqueue(ticket(number, band=2, input_tokens=200))
    scheduler.enqueue(ticket(9, band=1, input_tokens=200))
    assert placed(scheduler.place(0)) == [0, 9], "the next step has 200 tokens to compute"
    scheduler.started(9, 1)
    assert placed(scheduler.place(1)) == [1], "which is more than two steps compute of it"


@pytest.mark.parametrize(
    ("token_target_ns", "makes_way"),
    [(None, True), (10**9, False)],
    ids=["no-pace", "a-pace-and-prompts-that-are-whole"],
)
def test_prompts_beyond_the_next_step_wait_in_the_gateway(token_target_ns: int | None, makes_way: bool) -> None:
    scheduler = Scheduler(token_target_ns)
    scheduler.worker_joined("w", model_info(names=("a",), max_sequences=32, makes_way=makes_way))
    for number in range(9):
        scheduler.enqueue(ticket(number, input_tokens=1_500))
    scheduler.enqueue(ticket(9, band=0, input_tokens=1_500))
    assert placed(scheduler.place(0)) == [9, 0, 1], "one in the step that begins, and the next of 2048 tokens is full"
    assert placed(scheduler.place(0)) == []
    later_ns = 20_000_000
    scheduler.started(9, later_ns)
    scheduler.worker_reported("w", Load(running=3), is_draining=False)
    scheduler.stepped("w", later_ns)
    assert placed(scheduler.place(later_ns)) == [2], "of 3000 tokens the running step leaves 952"


def test_full_workers_do_not_send_anybody_to_a_broken_one() -> None:
    scheduler = scheduler_with("v", "w", slots=1)
    scheduler.enqueue(ticket(1))
    (first,) = scheduler.place(0).placed
    broken = "w" if first.worker == "v" else "v"
    for _ in range(20):
        scheduler.attempt_ended(broken, Verdict.FAILURE, 0)
    scheduler.enqueue(ticket(2))
    assert placed(scheduler.place(0)) == []


def test_withdrawn_request_gives_its_lease_back() -> None:
    scheduler = scheduler_with("w")
    scheduler.enqueue(ticket(1))
    scheduler.place(0)
    scheduler.withdraw(1)
    scheduler.withdraw(1)
    assert len(scheduler.ledger) == 0


def test_requests_of_a_lost_model_are_known() -> None:
    scheduler = scheduler_with("w", slots=1)
    for request in (1, 2):
        scheduler.enqueue(ticket(request))
    scheduler.place(0)
    scheduler.worker_left("w")
    assert scheduler.unserved() == [2]
    assert scheduler.was_served("a")
    assert not scheduler.is_served("a")
    assert not scheduler.was_served("z")
    scheduler.release(1)  # its lease outlived the worker


def test_default_model_is_the_only_one() -> None:
    scheduler = scheduler_with("w", "v")
    assert scheduler.default_model == "a"
    scheduler.worker_joined("x", model_info(names=("b",)))
    assert scheduler.default_model is None


MODELS = ("a", "b", "both")


class SchedulerMachine(RuleBasedStateMachine):
    """Any sequence of what can happen: nothing is lost, placed twice, or held after its end."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.now_ns = 0
        self.arrived = 0
        self.queued: dict[int, Ticket] = {}
        self.running: dict[int, str] = {}
        self.ended: collections.Counter[str] = collections.Counter()
        self.slots: dict[str, int] = {}

    @rule(
        model=st.sampled_from(MODELS),
        sequences=st.integers(1, 5),
        wait_ns=st.integers(1, 50),
        is_retry=st.booleans(),
        tenant=st.sampled_from(["t", "u", "v"]),
        band=st.integers(0, 3),
    )
    def arrive(self, model: str, sequences: int, wait_ns: int, is_retry: bool, tenant: str, band: int) -> None:
        self.arrived += 1
        it = ticket(
            self.arrived,
            model=model,
            tenant=tenant,
            band=band,
            sequences=sequences,
            arrived_ns=self.now_ns,
            deadline_ns=self.now_ns + wait_ns,
            avoid=tuple(list(self.slots)[:1]) if is_retry else (),
        )
        self.scheduler.enqueue(it)
        self.queued[it.request] = it

    @rule()
    def place(self) -> None:
        for placement in self.scheduler.place(self.now_ns).placed:
            request = placement.ticket.request
            assert self.queued.pop(request) is placement.ticket
            assert request not in self.running, "placed twice"
            assert placement.worker in self.slots
            self.running[request] = placement.worker

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        self.scheduler.release(request, data.draw(st.integers(0, 50)))
        del self.running[request]
        self.ended["finished"] += 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def token(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        self.scheduler.overran(request, self.scheduler.charged_tokens(request) + 1)

    @precondition(lambda self: self.queued or self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.queued.keys() | self.running.keys())))
        self.scheduler.withdraw(request)
        self.queued.pop(request, None)
        self.running.pop(request, None)
        self.ended["cancelled"] += 1

    @rule(passed_ns=st.integers(0, 40))
    def expire(self, passed_ns: int) -> None:
        self.now_ns += passed_ns
        for request in self.scheduler.expire(self.now_ns):
            assert self.queued.pop(request).deadline_ns <= self.now_ns
            self.ended["expired"] += 1
        assert all(it.deadline_ns > self.now_ns for it in self.queued.values())

    @rule(
        name=st.sampled_from(["v", "w", "x"]), slots=st.integers(1, 4), names=st.sampled_from([("a",), ("b",), MODELS])
    )
    def join(self, name: str, slots: int, names: tuple[str, ...]) -> None:
        if name not in self.slots:
            self.slots[name] = slots
            self.scheduler.worker_joined(name, model_info(names=names, max_sequences=slots))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.slots)))
        del self.slots[name]
        self.scheduler.worker_left(name)
        for request in self.scheduler.unserved():
            assert self.scheduler.leave(request)
            del self.queued[request]
            self.ended["failed"] += 1
        for request in [request for request, worker in self.running.items() if worker == name]:
            self.scheduler.release(request)
            del self.running[request]
            self.ended["failed"] += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.arrived == self.ended.total() + len(self.queued) + len(self.running)
        assert self.scheduler.queued == len(self.queued)
        assert self.scheduler.queued_bytes == 100 * len(self.queued)
        assert len(self.scheduler.ledger) == len(self.running)

    @invariant()
    def depths_add_up(self) -> None:
        depths = self.scheduler.depths()
        assert sum(depth.requests for depth in depths) == len(self.queued)
        assert sum(self.scheduler.queued_in(band) for band in range(4)) == len(self.queued)
        assert {depth.tenant for depth in depths} == {it.tenant for it in self.queued.values()}

    @invariant()
    def no_worker_holds_more_than_it_has(self) -> None:
        for name, slots in self.slots.items():
            held = self.scheduler.ledger.held_by(name)
            assert held.requests == sum(worker == name for worker in self.running.values())
            assert held.sequences <= slots or held.requests == 1

    @invariant()
    def deadline_is_known(self) -> None:
        expected = min((it.deadline_ns for it in self.queued.values()), default=None)
        assert self.scheduler.next_deadline_ns == expected


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
