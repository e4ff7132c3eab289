"""Keys, bands and ceilings."""

import pytest

from gateway.calls import parse_chat
from gateway.identity import authorization, identify
from gateway.settings import Limits
from gateway.tenants import ANONYMOUS, DEFAULT_BANDS, MOST_CLAIMED, Band, Tenant, TenantTable, hash_key, new_key
from gateway.terms import Terms, agree, check_model
from protos.core.errors import ConfigError, Forbidden, InvalidRequest, Unauthenticated

KEY, KEY_HASH = new_key()
TABLE = TenantTable(
    DEFAULT_BANDS,
    {
        "acme": Tenant(keys=(KEY_HASH,), max_priority="critical", priority="batch", weight=2.0),
        "basic": Tenant(models=("small",)),
    },
)
OPEN = TenantTable(DEFAULT_BANDS, {})


def terms(headers: dict[str, str], body: str = '{"n":1}', tenant: str = "acme", table: TenantTable = TABLE) -> object:
    call = parse_chat(b'{"messages":[{"role":"user","content":"x"}],' + body.encode()[1:])
    if isinstance(call, InvalidRequest):
        return call
    identity = identify([(name.encode(), value.encode()) for name, value in headers.items()])
    return agree(identity, call, table.get(tenant), table, Limits())


def test_a_new_key_is_never_the_same_and_only_its_hash_is_configured() -> None:
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert hash_key(KEY) == KEY_HASH
    assert KEY not in KEY_HASH


def test_a_key_names_its_tenant() -> None:
    assert TABLE.authenticate(f"Bearer {KEY}", None) == "acme"
    assert TABLE.authenticate(f"bearer  {KEY} ", "acme") == "acme"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic abc", KEY])
def test_without_a_key_nobody_is_served_where_keys_are_configured(authorization: str | None) -> None:
    assert isinstance(TABLE.authenticate(authorization, None), Unauthenticated)


@pytest.mark.parametrize("key", ["tg-x", KEY[:-1], KEY + "a", KEY_HASH])
def test_a_wrong_key_is_refused(key: str) -> None:
    refusal = TABLE.authenticate(f"Bearer {key}", None)
    assert isinstance(refusal, Unauthenticated)
    assert refusal.code == "invalid_api_key"


def test_a_forged_tenant_is_refused() -> None:
    assert isinstance(TABLE.authenticate(f"Bearer {KEY}", "basic"), Forbidden)


def test_without_any_key_the_tenant_is_what_the_header_says() -> None:
    assert OPEN.authenticate(None, "team-a") == "team-a"
    assert OPEN.authenticate("Bearer anything", None) == "anonymous"


@pytest.mark.parametrize(
    ("tenant", "asked", "band"),
    [
        ("acme", {}, "batch"),
        ("acme", {"x-tidegate-priority": "critical"}, "critical"),
        ("acme", {"x-tidegate-priority": "standard"}, "standard"),
        ("basic", {}, "standard"),
        ("basic", {"x-tidegate-priority": "critical"}, "standard"),
        ("basic", {"x-tidegate-priority": "batch"}, "batch"),
    ],
)
def test_priority_is_clamped_to_the_tenants_ceiling(tenant: str, asked: dict[str, str], band: str) -> None:
    agreed = terms(asked, tenant=tenant)
    assert isinstance(agreed, Terms)
    assert agreed.band_name == band


def test_priority_may_be_a_body_field_by_name_or_number() -> None:
    by_name, by_number = terms({}, '{"priority":"standard"}'), terms({}, '{"priority":1}')
    assert isinstance(by_name, Terms)
    assert by_name == by_number


@pytest.mark.parametrize("body", ['{"priority":-1}', '{"priority":3}', '{"priority":"urgent"}', '{"priority":1.5}'])
def test_a_priority_that_does_not_exist_is_a_400_that_names_it(body: str) -> None:
    refusal = terms({}, body)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "priority"


@pytest.mark.parametrize("value", ["urgent", "0", "", "Critical"])
def test_a_priority_that_does_not_exist_is_a_400_that_names_its_header(value: str) -> None:
    refusal = terms({"x-tidegate-priority": value}, '{"priority":"standard"}')
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "x-tidegate-priority"


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "abc", "", "9" * 13, "٣", "1e3"])
@pytest.mark.parametrize("header", ["x-tidegate-ttft-ms", "x-tidegate-deadline-ms"])
def test_a_deadline_that_is_no_number_or_overflows_is_a_400_that_names_the_header(header: str, value: str) -> None:
    identity = identify([(header.encode(), value.encode())])
    call = parse_chat(b'{"messages":[{"role":"user","content":"x"}]}')
    assert not isinstance(call, InvalidRequest)
    refusal = agree(identity, call, TABLE.get("acme"), TABLE, Limits())
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == header


def test_deadlines_are_the_clients_within_the_gateways() -> None:
    agreed = terms({"x-tidegate-ttft-ms": "1500", "x-tidegate-deadline-ms": "999999999"})
    assert isinstance(agreed, Terms)
    assert agreed.first_token_ns == 1_500_000_000
    assert agreed.total_ns == int(Limits().total_s * 1e9)


def test_a_first_token_is_not_waited_for_beyond_the_whole_deadline() -> None:
    agreed = terms({"x-tidegate-deadline-ms": "100"})
    assert isinstance(agreed, Terms)
    assert agreed.first_token_ns == agreed.total_ns == 100_000_000


def test_a_model_that_the_tenant_may_not_use_is_forbidden() -> None:
    assert check_model("small", TABLE.get("basic")) is None
    assert isinstance(check_model("large", TABLE.get("basic")), Forbidden)


@pytest.mark.parametrize(
    ("bands", "tenants", "words"),
    [
        ((), {}, "at least one band"),
        ((Band(name="a"), Band(name="a")), {}, "each name once"),
        (DEFAULT_BANDS, {"t": Tenant(priority="urgent")}, "known: critical, standard, batch"),
        (DEFAULT_BANDS, {"a": Tenant(keys=(KEY_HASH,)), "b": Tenant(keys=(KEY_HASH,))}, "tenant 'a' too"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    bands: tuple[Band, ...], tenants: dict[str, Tenant], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TenantTable(bands, tenants)


@pytest.mark.parametrize("name", ["", " ", "a b", "../etc", "é", "\udcff", "a" * 65, "-a", "a\n", "a, b"])
def test_a_name_that_no_tenant_can_have_is_refused(name: str) -> None:
    refusal = OPEN.authenticate(None, name)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "x-tidegate-tenant"
    assert isinstance(TABLE.authenticate(f"Bearer {KEY}", name), Forbidden)


def test_names_that_clients_make_up_are_bounded() -> None:
    table = TenantTable(DEFAULT_BANDS, {"known": Tenant()})
    names = {table.authenticate(None, f"t{number}") for number in range(MOST_CLAIMED + 100)}
    assert len(names) == MOST_CLAIMED + 1
    assert ANONYMOUS in names
    assert table.authenticate(None, "t5") == "t5"
    assert table.authenticate(None, "known") == "known"


@pytest.mark.parametrize("header", ["x-tidegate-tenant", "x-tidegate-ttft-ms", "x-tidegate-priority"])
def test_a_header_that_was_sent_twice_is_none_of_its_values(header: str) -> None:
    values = {"x-tidegate-tenant": ("a", "b"), "x-tidegate-ttft-ms": ("5", "6"), "x-tidegate-priority": ("batch",) * 2}
    identity = identify([(header.encode(), value.encode()) for value in values[header]])
    found = {identity.tenant, identity.ttft_ms, identity.priority} - {None}
    assert found == {", ".join(values[header])}


def test_two_keys_are_none() -> None:
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"authorization", b"Bearer other")]
    assert isinstance(TABLE.authenticate(authorization(headers), None), Unauthenticated)
