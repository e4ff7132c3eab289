"""Who is owed service: the Virtual Token Counter (Sheng et al., "Fairness in Serving LLMs", OSDI 2024).

Each tenant has a counter of the tokens it was served, over its weight; the waiting tenant with the smallest is next. A
tenant that returns from idle is lifted to the others, so that it cannot save up service while it asks for none, but for
`CREDIT`: what it let pass of its share, up to a few requests, is kept for it. So the burst of a quiet tenant is next at
once, and a tenant that asks for more than its share has none. Between two tenants that both wait, service over weight
differs by at most 2 * max(input_weight * longest prompt, output_weight * tokens of the largest batch) + CREDIT.
"""

from __future__ import annotations

import heapq
import math

import msgspec

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""The paper's weights: a decoded token costs about twice a prefilled one."""
CREDIT = 2048.0
"""Weighted tokens over weight: some three requests of a chat. Under overload nearly everybody has credit when what he
asked for before was refused: with four times as much, four equal tenants at three times what their engine can carry are
told wrong about 6% of what was admitted, since others pass; with this 4%, without any 3%.
"""
LATELY_NS = 60_000_000_000
FADES = 4
"""So many times that long, then service of less than a token is forgotten."""
LOUD_SHARE = 1.5
"""Of an equal one: of two tenants, one that has more than three quarters. Equal ones do not come to it by chance."""


class _Tenant(msgspec.Struct):
    counter: float = 0.0
    weight: float = 1.0
    waiting: int = 0
    mark: float = 0.0
    """Where the others stood when it last returned from idle."""

    def lifted(self, level: float) -> float:
        """What its counter becomes when it returns from idle, with the others at `level`."""
        return max(self.counter, level - CREDIT)


UNKNOWN = _Tenant()
"""One that never asked for anything."""


class ServiceCounters:
    """Counters of all tenants. Owned by the scheduler; a tenant is known from its first request on."""

    def __init__(self, input_weight: float = INPUT_WEIGHT, output_weight: float = OUTPUT_WEIGHT) -> None:
        self._input_weight = input_weight
        self._output_weight = output_weight
        self._tenants: dict[str, _Tenant] = {}
        self._waiting = LeastServed(self._tenants)
        self._rings: list[LeastServed] = [self._waiting]
        self._level = 0.0
        """The most that the least served of the waiting tenants ever had; the last one to leave, where nobody waits. It
        never falls: tenants that come back with credit do not pull down those that come after them."""

    def ring(self) -> LeastServed:
        """A new set of tenants in the order in which they are owed service."""
        ring = LeastServed(self._tenants)
        self._rings.append(ring)
        return ring

    def counter(self, tenant: str) -> float:
        """Tokens served over weight; only differences mean something."""
        return self._tenants.get(tenant, UNKNOWN).counter

    def level(self, tenant: str) -> float:
        """Where the counter would be if one more request of the tenant came: a tenant that is back is lifted."""
        known = self._tenants.get(tenant, UNKNOWN)
        return known.counter if known.waiting else known.lifted(self._present_level())

    def is_owed(self, tenant: str, input_tokens: int, output_tokens: int) -> bool:
        """Would the tenant, with one more request served, still be behind where the others stood when it came back?"""
        known = self._tenants.get(tenant, UNKNOWN)
        if known.waiting:
            level, mark = known.counter, known.mark
        else:
            mark = self._present_level()
            level = known.lifted(mark)
        return level + self.price(input_tokens, output_tokens) / known.weight <= mark

    def arrive(self, tenant: str, weight: float) -> None:
        """One more request of the tenant waits."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant()
        known.weight = weight
        if not known.waiting:
            known.mark = self._present_level()
            known.counter = known.lifted(known.mark)
            self._waiting.enter(tenant)
        known.waiting += 1

    def leave(self, tenant: str) -> None:
        """One request of the tenant waits no more, whatever became of it."""
        known = self._tenants[tenant]
        assert known.waiting > 0, f"tenant {tenant} has no waiting request"
        known.waiting -= 1
        if known.waiting == 0:
            if len(self._waiting) == 1:
                self._level = max(self._level, known.counter)
            self._waiting.discard(tenant)

    def _present_level(self) -> float:
        least = self._waiting.least()
        if least is not None and (counter := self._tenants[least].counter) > self._level:
            self._level = counter
        return self._level

    def price(self, input_tokens: int, output_tokens: int) -> float:
        """Weighted tokens."""
        return self._input_weight * input_tokens + self._output_weight * output_tokens

    def charge(self, tenant: str, *, input_tokens: int = 0, output_tokens: int = 0) -> float:
        """Add served tokens; negative numbers give back what was predicted and not used. Returns what was added."""
        known = self._tenants[tenant]
        served = self.price(input_tokens, output_tokens) / known.weight
        known.counter += served
        if served < 0 and known.waiting:  # who does not wait is in no ring
            for ring in self._rings:
                if tenant in ring.entries:
                    ring.enter(tenant)
        return served


class RecentService:
    """What each tenant was served lately, over its weight, and who has had much more than the others.

    Service fades to 1/e in `LATELY_NS`. To do nothing to the old, new service is counted the larger the later it comes;
    from time to time all of it is made small again.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._total = 0.0
        self._since_ns = 0

    def charge(self, tenant: str, served: float, now_ns: int) -> None:
        """Weighted tokens over weight."""
        if now_ns - self._since_ns > FADES * LATELY_NS:
            self._fade(now_ns)
        served *= math.exp((now_ns - self._since_ns) / LATELY_NS)
        self._served[tenant] = self._served.get(tenant, 0.0) + served
        self._total += served

    def is_loud(self, tenant: str) -> bool:
        """Had it so much more than an equal share of what those were served that came lately? One alone never had."""
        return self._served.get(tenant, 0.0) * len(self._served) > LOUD_SHARE * self._total

    def _fade(self, now_ns: int) -> None:
        keep = math.exp((self._since_ns - now_ns) / LATELY_NS)
        self._since_ns = now_ns
        self._served = {name: keep * served for name, served in self._served.items() if keep * served >= 1}
        self._total = sum(self._served.values())


class LeastServed:
    """A set of tenants, least served first. Operations cost O(log n) amortized.

    A heap whose entries may be too small, never too large: counters grow, and the entry is mended when it surfaces.
    When a counter falls, a new entry is pushed and the old one is dropped when it surfaces.
    """

    def __init__(self, tenants: dict[str, _Tenant]) -> None:
        """`tenants` are all that are known."""
        self._tenants = tenants
        self.entries: dict[str, float] = {}
        """Counters of the tenants, as the heap has them."""
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self.entries)

    def discard(self, tenant: str) -> None:
        self.entries.pop(tenant, None)

    def least(self) -> str | None:
        """The tenant that is owed most; ties go to the first in alphabetical order."""
        heap = self._heap
        while heap:
            entry, tenant = heap[0]
            if self.entries.get(tenant) != entry:
                heapq.heappop(heap)
                continue
            if (counter := self._tenants[tenant].counter) == entry:
                return tenant
            self.entries[tenant] = counter
            heapq.heapreplace(heap, (counter, tenant))
        return None

    def enter(self, tenant: str) -> None:
        """Note its counter: the tenant is new here, or the counter became smaller."""
        counter = self.entries[tenant] = self._tenants[tenant].counter
        heapq.heappush(self._heap, (counter, tenant))
