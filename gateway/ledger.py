"""Who holds what on which worker: one lease per running request, released exactly once."""

from __future__ import annotations

import msgspec


class Lease(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    request: int
    worker: str
    sequences: int
    tokens: int
    """Prompt and output tokens that the request may come to hold, estimated."""


class Held(msgspec.Struct):
    """What one worker's leases add up to."""

    requests: int = 0
    sequences: int = 0
    tokens: int = 0


class Ledger:
    """The gateway's own books. A second release of a lease is a bug, and loud."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, request: int) -> bool:
        return request in self._leases

    def acquire(self, lease: Lease) -> None:
        assert lease.request not in self._leases, f"request {lease.request} already holds a lease"
        self._leases[lease.request] = lease
        held = self.account(lease.worker)
        held.requests += 1
        held.sequences += lease.sequences
        held.tokens += lease.tokens

    def release(self, request: int) -> Lease:
        lease = self._leases.pop(request, None)
        assert lease is not None, f"request {request} holds no lease"
        held = self._held[lease.worker]
        held.requests -= 1
        held.sequences -= lease.sequences
        held.tokens -= lease.tokens
        if held.requests == 0:
            assert held == Held(), f"leases of {lease.worker} do not add up: {held}"
        return lease

    def account(self, worker: str) -> Held:
        """What the worker's leases add up to, now and later. Only to be read."""
        held = self._held.get(worker)
        if held is None:
            held = self._held[worker] = Held()
        return held

    def close(self, worker: str) -> None:
        """No worker of this name is expected again; an account that leases are on stays."""
        if worker in self._held and not self._held[worker].requests:
            del self._held[worker]

    def held_by(self, worker: str) -> Held:
        """A copy: the books stay the ledger's."""
        held = self._held.get(worker)
        return msgspec.structs.replace(held) if held is not None else Held()

    def sequences_on(self, worker: str) -> int:
        held = self._held.get(worker)
        return held.sequences if held is not None else 0
