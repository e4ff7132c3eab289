"""Conservation: whatever happens in whatever order, no request is lost and nothing stays held."""

import pytest

from tests.virtual.traffic import Traffic


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_operations_lose_nothing_and_leak_nothing(seed: int) -> None:
    traffic = Traffic(seed)
    traffic.run(25_000, check_every=97)
    traffic.end()
    assert traffic.ended.keys() == {"finished", "failed", "rejected", "cancelled", "timed out"}, "all of it happened"
    assert min(traffic.operations.values()) > 30
