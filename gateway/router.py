"""Which worker runs a request: the least loaded of those that serve its model and have room."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from gateway.forecast import EngineForecast
from gateway.ledger import Ledger
from protos.core.contract import Load, ModelInfo


class Worker(msgspec.Struct, kw_only=True):
    """A worker as the deciders see it. Owned by the scheduler; the fleet reports changes to it."""

    name: str
    model: ModelInfo
    load: Load = Load()
    is_draining: bool = False
    forecast: EngineForecast = msgspec.field(default_factory=EngineForecast)
    unstarted_tokens: int = 0
    """Prompt tokens of requests that it was given and whose first token has not come."""

    def room(self, ledger: Ledger) -> int:
        """Sequences that may still be sent: late binding keeps the engine's own queue near empty."""
        return 0 if self.is_draining else self.model.max_sequences - ledger.sequences_on(self.name)


def choose(workers: Iterable[Worker], ledger: Ledger, sequences: int, avoid: Collection[str] = ()) -> Worker | None:
    """The worker with the smallest share of its slots in use; None when none has room for `sequences`.

    A request larger than a whole worker is sent to one that is empty. `avoid` are the workers of failed attempts:
    one of them is taken only when there is no other.
    """
    best: tuple[bool, float, str] | None = None
    chosen: Worker | None = None
    for worker in workers:
        room = worker.room(ledger)
        if room < sequences and not (room > 0 and room == worker.model.max_sequences):
            continue
        rank = (worker.name in avoid, 1 - room / worker.model.max_sequences, worker.name)
        if best is None or rank < best:
            best, chosen = rank, worker
    return chosen
