"""Conservation: whatever happens in whatever order, no request is lost and nothing stays held."""

import msgspec
import pytest

from gateway.order import Ticket
from tests.virtual.traffic import Traffic


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_random_operations_lose_nothing_and_leak_nothing(seed: int) -> None:
    traffic = Traffic(seed)
    traffic.run(25_000, check_every=97)
    traffic.end()
    assert traffic.ended.keys() == {"finished", "failed", "rejected", "cancelled", "timed out"}, "all of it happened"
    assert min(traffic.operations.values()) > 30


class HedgedTraffic(Traffic):
    """What is placed is hedged at once: to the books a hedge is one more request, which never waits."""

    def _place(self) -> bool:
        waiting = dict(self._queued)
        super()._place()
        for request in waiting.keys() & self._running.keys():
            self._hedge(waiting[request], self._running[request])
        return True

    def _hedge(self, ticket: Ticket, worker: str) -> None:
        self.arrived += 1
        hedge = msgspec.structs.replace(ticket, request=self.arrived, avoid=(worker,), forecast=None)
        placement = self.scheduler.place_beside(hedge, self._now_ns)
        if placement is None:
            self.ended["not hedged"] += 1
            return
        assert placement.worker in self._serving
        assert placement.worker != worker
        assert ticket.model not in {waiting.model for waiting in self._queued.values()}
        self.operations["hedge"] += 1
        self._running[hedge.request] = placement.worker


@pytest.mark.parametrize("seed", [1, 2])
def test_hedges_lose_nothing_and_leak_nothing(seed: int) -> None:
    traffic = HedgedTraffic(seed)
    traffic.run(50_000, check_every=97)
    traffic.end()
    assert traffic.operations["hedge"] > 100
    assert traffic.ended["not hedged"] > 100
