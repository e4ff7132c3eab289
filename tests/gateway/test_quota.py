"""Concurrency, rates and quotas."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.quota import DAY_NS, MINUTE_NS, Grant, Quotas
from gateway.tenants import Tenant
from protos.core.errors import Overloaded

S = 1_000_000_000


def admit(quotas: Quotas, tenant: Tenant, now_ns: int, tokens: int = 10) -> Grant | Overloaded:
    return quotas.admit("t", tenant, tokens, now_ns, now_ns)


def test_concurrency_is_a_lease_that_comes_back() -> None:
    quotas, tenant = Quotas(), Tenant(concurrency=2)
    first, second = admit(quotas, tenant, 1), admit(quotas, tenant, 2)
    assert isinstance(first, Grant)
    assert isinstance(second, Grant)
    refusal = admit(quotas, tenant, 3)
    assert isinstance(refusal, Overloaded)
    assert refusal.reason == "tenant_concurrency"
    quotas.settle(first, 5, 4)
    assert isinstance(admit(quotas, tenant, 5), Grant)


def test_the_rate_counts_a_sliding_minute_and_says_when_it_frees() -> None:
    quotas, tenant = Quotas(), Tenant(requests_per_minute=2)
    admit(quotas, tenant, 0 * S)
    admit(quotas, tenant, 20 * S)
    refusal = admit(quotas, tenant, 30 * S)
    assert isinstance(refusal, Overloaded)
    assert refusal.reason == "tenant_rate"
    assert refusal.retry_after_s == 30
    assert isinstance(admit(quotas, tenant, 60 * S), Grant)
    assert isinstance(admit(quotas, tenant, 61 * S), Overloaded)


def test_who_waits_as_long_as_told_is_admitted() -> None:
    for tenant in (Tenant(requests_per_minute=1), Tenant(tokens_per_minute=100)):
        quotas = Quotas()
        admit(quotas, tenant, S // 2, tokens=90)
        refusal = admit(quotas, tenant, 30 * S, tokens=20)
        assert isinstance(refusal, Overloaded)
        assert refusal.retry_after_s == 31  # after 30.5 s
        assert isinstance(admit(quotas, tenant, 61 * S, tokens=20), Grant)


def test_what_no_wait_makes_small_enough_is_not_told_to_wait() -> None:
    for tenant in (Tenant(tokens_per_minute=100), Tenant(tokens_per_day=100)):
        refusal = admit(Quotas(), tenant, 0, tokens=101)
        assert isinstance(refusal, Overloaded)
        assert (refusal.reason, refusal.retry_after_s) == ("tenant_tokens", None)


def test_refused_requests_take_nothing() -> None:
    quotas, tenant = Quotas(), Tenant(requests_per_minute=1, tokens_per_minute=1000)
    admit(quotas, tenant, 0)
    for second in range(1, 59):
        assert isinstance(admit(quotas, tenant, second * S), Overloaded)
    assert isinstance(admit(quotas, tenant, MINUTE_NS), Grant)


def test_tokens_reserve_an_estimate_and_settle_to_the_truth() -> None:
    quotas, tenant = Quotas(), Tenant(tokens_per_minute=100)
    grant = admit(quotas, tenant, 0, tokens=90)
    assert isinstance(grant, Grant)
    refusal = admit(quotas, tenant, S, tokens=20)
    assert isinstance(refusal, Overloaded)
    assert refusal.reason == "tenant_tokens"
    quotas.settle(grant, 30, 2 * S)
    assert isinstance(admit(quotas, tenant, 3 * S, tokens=70), Grant)
    assert isinstance(admit(quotas, tenant, 4 * S, tokens=1), Overloaded)


def test_the_quota_of_a_day_comes_back_at_midnight() -> None:
    quotas, tenant = Quotas(), Tenant(tokens_per_day=100)
    grant = admit(quotas, tenant, DAY_NS // 2, tokens=100)
    assert isinstance(grant, Grant)
    refusal = admit(quotas, tenant, DAY_NS // 2 + 10 * MINUTE_NS, tokens=1)
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s == (DAY_NS // 2 - 10 * MINUTE_NS) / S
    assert isinstance(admit(quotas, tenant, DAY_NS + 1, tokens=100), Grant)


def test_yesterdays_request_does_not_settle_from_todays_quota() -> None:
    quotas, tenant = Quotas(), Tenant(tokens_per_day=100)
    over_midnight = admit(quotas, tenant, DAY_NS - S, tokens=90)
    assert isinstance(over_midnight, Grant)
    today = admit(quotas, tenant, DAY_NS + S, tokens=100)
    assert isinstance(today, Grant)
    quotas.settle(over_midnight, 10, DAY_NS + 2 * S)
    assert isinstance(admit(quotas, tenant, DAY_NS + 3 * S, tokens=1), Overloaded)
    quotas.settle(today, 99, DAY_NS + 4 * S)
    assert isinstance(admit(quotas, tenant, DAY_NS + 5 * S, tokens=1), Grant)


@given(st.lists(st.tuples(st.integers(0, 40 * S), st.integers(1, 50), st.integers(0, 80), st.booleans()), max_size=60))
def test_no_minute_ever_holds_more_than_the_limits(steps: list[tuple[int, int, int, bool]]) -> None:
    quotas, tenant = Quotas(), Tenant(concurrency=3, requests_per_minute=5)
    now_ns, open_grants, times = 0, [], []
    for gap_ns, tokens, truth, settles in steps:
        now_ns += gap_ns
        answer = admit(quotas, tenant, now_ns, tokens)
        if isinstance(answer, Grant):
            open_grants.append(answer)
            times.append(now_ns)
        if settles and open_grants:
            quotas.settle(open_grants.pop(0), truth, now_ns)
        assert quotas.running("t") == len(open_grants) <= 3
        assert sum(at_ns > now_ns - MINUTE_NS for at_ns in times) <= 5
    for grant in open_grants:
        quotas.settle(grant, 1, now_ns)
    assert quotas.running("t") == 0
