"""Bands, aging and deadlines within one queue."""

from gateway.fairness import CREDIT, ServiceCounters
from gateway.order import AGE_NS, FairQueue, Ticket


def ticket(request: int, *, tenant: str = "t", band: int = 1, arrived_ns: int = 0, deadline_ns: int = 10**15) -> Ticket:
    return Ticket(request=request, model="m", tenant=tenant, band=band, arrived_ns=arrived_ns, deadline_ns=deadline_ns)


def drain(queue: FairQueue) -> list[int]:
    order = []
    while (head := queue.head(0)) is not None:
        order.append(queue.remove(head.request).request)
    return order


def filled(*tickets: Ticket) -> FairQueue:
    queue = FairQueue(ServiceCounters())
    for one in tickets:
        queue.push(one)
    return queue


def test_a_higher_band_goes_first() -> None:
    assert drain(filled(ticket(1, band=2), ticket(2, band=1), ticket(3, band=0))) == [3, 2, 1]


def test_within_a_tenant_the_earliest_deadline_goes_first_and_ties_in_order_of_arrival() -> None:
    queue = filled(ticket(1, deadline_ns=30), ticket(2, deadline_ns=10), ticket(3, deadline_ns=30))
    assert drain(queue) == [2, 1, 3]


def test_a_waiting_request_is_lifted_one_band_per_30_seconds_but_never_into_the_top() -> None:
    queue = filled(ticket(1, band=3), ticket(2, band=0, arrived_ns=3 * AGE_NS))
    bands = []
    for now_ns in (0, AGE_NS, 2 * AGE_NS, 9 * AGE_NS):
        queue.head(now_ns)
        bands.append(next(band for band, tenant in queue.depths() if band))
    assert bands == [3, 2, 1, 1]
    assert drain(queue) == [2, 1]


def test_a_request_that_leaves_the_middle_is_never_the_head() -> None:
    queue = filled(*(ticket(number, tenant=f"t{number % 3}") for number in range(30)))
    for number in range(0, 30, 2):
        queue.remove(number)
    assert sorted(drain(queue)) == list(range(1, 30, 2))
    assert len(queue) == 0


def test_the_tenant_that_was_served_least_is_next() -> None:
    counters = ServiceCounters()
    queue = FairQueue(counters)
    for number in range(4):
        queue.push(ticket(number, tenant="a"))
        queue.push(ticket(10 + number, tenant="b"))
    order = []
    while (head := queue.head(0)) is not None:
        order.append(head.tenant)
        counters.charge(queue.remove(head.request).tenant, output_tokens=30 if head.tenant == "a" else 10)
    assert order == ["a", "b", "b", "b", "a", "b", "a", "a"]


def test_what_is_given_back_counts_at_once() -> None:
    counters = ServiceCounters()
    queue = FairQueue(counters)
    queue.push(ticket(1, tenant="a"))
    queue.push(ticket(2, tenant="b"))
    counters.charge("a", output_tokens=100)
    counters.charge("b", output_tokens=50)
    assert queue.head(0) == ticket(2, tenant="b")
    counters.charge("a", output_tokens=-90)
    assert queue.head(0) == ticket(1, tenant="a")


def returned(counters: ServiceCounters, *, ahead: int) -> None:
    """The tenant "busy" waits and has had so many tokens; "quiet" comes back."""
    counters.arrive("busy", 1.0)
    counters.charge("busy", input_tokens=ahead)
    counters.arrive("quiet", 1.0)


def test_a_tenant_that_comes_back_is_owed_what_it_let_pass_up_to_a_few_requests() -> None:
    counters = ServiceCounters()
    returned(counters, ahead=100 * int(CREDIT))
    assert counters.counter("quiet") == counters.counter("busy") - CREDIT
    counters.charge("quiet", input_tokens=int(CREDIT) - 100)
    assert counters.is_owed("quiet", 100, 0)
    assert not counters.is_owed("quiet", 101, 0)


def test_a_tenant_that_let_little_pass_is_owed_little() -> None:
    counters = ServiceCounters()
    returned(counters, ahead=300)
    assert counters.is_owed("quiet", 300, 0)
    assert not counters.is_owed("quiet", 301, 0)


def test_a_backlogged_tenant_is_owed_nothing() -> None:
    counters = ServiceCounters()
    returned(counters, ahead=300)
    assert not counters.is_owed("busy", 1, 0)


def test_those_that_come_back_together_are_owed_alike() -> None:
    counters = ServiceCounters()
    returned(counters, ahead=100 * int(CREDIT))
    counters.arrive("other", 1.0)
    assert counters.counter("other") == counters.counter("quiet")
    assert counters.is_owed("other", int(CREDIT), 0)


def test_depths_name_band_tenant_count_and_oldest() -> None:
    queue = filled(ticket(1, tenant="a", arrived_ns=5), ticket(2, tenant="a", arrived_ns=3), ticket(3, band=2))
    assert queue.depths() == {(1, "a"): (2, 3), (2, "t"): (1, 0)}
