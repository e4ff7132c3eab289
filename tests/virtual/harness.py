"""The gateway's own deciders and the simulated engine's own steps, in virtual time: no sockets, no clock, no sleep.

What is left out is what neither decides: HTTP, the wire (a fixed delay each way), and the event loop.
"""

from __future__ import annotations

import collections
import heapq
import itertools
from collections.abc import Callable, Iterable

import msgspec

from engine.sim.parameters import SimParameters
from engine.sim.simulator import Limits, Sequence, Simulator
from gateway import admission
from gateway.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from gateway.forecast import Forecast
from gateway.lengths import OutputLengths
from gateway.order import Ticket
from gateway.prefixes import cut
from gateway.scheduler import Placement, Scheduler
from protos.core.contract import Load, ModelInfo
from tests.gateway.fakes import model_info

MODEL = "m"
SECOND_NS = 1_000_000_000


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a workload. `output_tokens` is what it will really generate."""

    at_ns: int
    prompt_tokens: int
    output_tokens: int
    has_fixed_output: bool = False
    """The gateway knows so: the request has a limit, and ignores the end of sequence."""
    tenant: str = "anonymous"
    weight: float = 1.0
    band: int = 1
    patience_ns: int = 10**15
    """How long it may wait for its first token."""
    is_sheddable: bool = False
    is_hurried: bool = False
    session: str | None = None
    prompt: bytes = b""
    """Its text, where that matters: what the gateway compares with the workers' caches."""
    blocks: tuple[int, ...] = ()
    """Content of the engine's KV blocks, of the prompt and as far as known of the answer; none are like no other's."""


class Result(msgspec.Struct):
    arrival: Arrival
    worker: str = ""
    dispatched_ns: int = 0
    first_token_ns: int = 0
    finished_ns: int = 0
    cached_tokens: int = 0
    expected_cached_tokens: int = 0
    forecast: Forecast | None = None
    is_expired: bool = False
    is_refused: bool = False
    """At once, when it arrived."""
    is_shed: bool = False
    """It would have been too late wherever it ran: at once, or when it had waited."""

    @property
    def ttft_ns(self) -> int:
        return self.first_token_ns - self.arrival.at_ns

    @property
    def tpot_ns(self) -> float:
        """Time per output token after the first; 0 for an answer of one."""
        return (self.finished_ns - self.first_token_ns) / max(1, self.arrival.output_tokens - 1)


class Gateway:
    """Scheduler and simulated workers under one virtual clock. `run` once."""

    def __init__(
        self,
        parameters: SimParameters,
        *,
        workers: int,
        max_sequences: int,
        max_batch_tokens: int = 8192,
        wire_ns: int = 500_000,
        token_target_ns: int | None = None,
        jitter: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`jitter` is by how much the next step takes longer than the parameters say."""
        self.scheduler = Scheduler(token_target_ns)
        self.now_ns = 0
        self.results: list[Result] = []
        self.after_event: Callable[[], None] = lambda: None
        """Called between events: the place to check an invariant."""
        self.served: collections.Counter[str] = collections.Counter()
        """Weighted tokens that each tenant was really given: its prompts when placed, its answers as they are made."""
        self.next_turn: Callable[[Result], Arrival | None] = lambda result: None
        """Called when a request has finished: what its client sends next."""
        self._lengths = OutputLengths()
        self._wire_ns = wire_ns
        self._jitter = jitter
        self._kv_blocks = parameters.kv_blocks
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._engines: dict[str, Simulator[int]] = {}
        self._busy: set[str] = set()
        self._sequences: dict[int, Sequence[int]] = {}
        for number in range(workers):
            name = f"w{number}"
            self._engines[name] = Simulator(parameters, Limits(max_sequences, max_batch_tokens))
            self.scheduler.worker_joined(name, _model(parameters, max_sequences, max_batch_tokens))

    @property
    def preemptions(self) -> int:
        return sum(engine.preemptions for engine in self._engines.values())

    def run(self, arrivals: Iterable[Arrival], until_ns: int | None = None) -> list[Result]:
        """Results in order of arrival; runs until everything is settled, or until `until_ns`."""
        for arrival in arrivals:
            self._announce(arrival)
        while self._events and (until_ns is None or self._events[0][0] <= until_ns):
            self.now_ns, _, action = heapq.heappop(self._events)
            action()
            self.after_event()
        return self.results

    def _announce(self, arrival: Arrival) -> None:
        number = len(self.results)
        self.results.append(Result(arrival))
        self._at(arrival.at_ns, lambda: self._arrive(number))

    def _at(self, at_ns: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ns, next(self._order), action))

    def _arrive(self, number: int) -> None:
        result = self.results[number]
        arrival, scheduler = result.arrival, self.scheduler
        fixed = arrival.has_fixed_output
        result.forecast = scheduler.forecast(
            MODEL, arrival.band, arrival.tenant, arrival.prompt_tokens, self.now_ns, is_hurried=arrival.is_hurried
        )
        if arrival.is_sheddable and admission.is_hopeless(result.forecast, arrival.patience_ns):
            result.is_refused = True
            return
        deadline_ns = self.now_ns + arrival.patience_ns
        self.scheduler.enqueue(
            Ticket(
                request=number,
                model=MODEL,
                tenant=arrival.tenant,
                weight=arrival.weight,
                band=arrival.band,
                input_tokens=arrival.prompt_tokens,
                output_tokens=self._lengths.predict(
                    arrival.tenant, arrival.output_tokens if fixed else None, 1, is_fixed=fixed
                ),
                has_fixed_output=fixed,
                arrived_ns=self.now_ns,
                deadline_ns=deadline_ns,
                session=arrival.session,
                blocks=cut(arrival.prompt),
                prompt_bytes=len(arrival.prompt),
                is_sheddable=arrival.is_sheddable,
                is_hurried=arrival.is_hurried,
                forecast=result.forecast,
            )
        )
        if arrival.patience_ns < 10**15:
            self._at(deadline_ns, self._expire)
        self._place()

    def _expire(self) -> None:
        for number in self.scheduler.expire(self.now_ns):
            self.results[number].is_expired = True

    def _place(self) -> None:
        decided = self.scheduler.place(self.now_ns)
        for number in decided.shed:
            result = self.results[number]
            result.is_shed = True
            result.is_refused = result.arrival.at_ns == self.now_ns
        for placement in decided.placed:
            number = placement.ticket.request
            self.results[number].dispatched_ns = self.now_ns
            self.served[placement.ticket.tenant] += int(INPUT_WEIGHT * placement.ticket.input_tokens)
            self.results[number].worker = placement.worker
            self.results[number].expected_cached_tokens = placement.cached_tokens
            self._at(self.now_ns + self._wire_ns, lambda n=number, p=placement: self._submit(n, p))

    def _submit(self, number: int, placement: Placement) -> None:
        worker = placement.worker
        arrival = self.results[number].arrival
        self._engines[worker].submit(
            number,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            priority=placement.priority,
            step_tokens=placement.step_tokens,
            block_hashes=arrival.blocks,
            now_ns=self.now_ns,
        )
        if worker not in self._busy:
            self._step(worker)

    def _step(self, worker: str) -> None:
        step = self._engines[worker].step(self.now_ns)
        if step is None:
            self._busy.discard(worker)
            return
        self._busy.add(worker)
        ended_ns = self.now_ns + int(self._jitter() * (step.ended_ns - self.now_ns))
        self._at(ended_ns, lambda: self._stepped(worker, step.tokens, step.finished))

    def _stepped(self, worker: str, tokens: list[Sequence[int]], finished: list[Sequence[int]]) -> None:
        for sequence in tokens:
            number = sequence.owner
            self.served[self.results[number].arrival.tenant] += int(OUTPUT_WEIGHT)
            if sequence.generated == 1:
                result = self.results[number]
                result.first_token_ns = self.now_ns + self._wire_ns
                result.cached_tokens = sequence.cached_tokens
                self.scheduler.started(number, result.first_token_ns, sequence.prompt_tokens, sequence.cached_tokens)
            if sequence.generated > self.scheduler.charged_tokens(number):
                self.scheduler.overran(number, sequence.generated)
        for sequence in finished:
            number = sequence.owner
            result = self.results[number]
            result.finished_ns = self.now_ns + self._wire_ns
            self.scheduler.release(number, sequence.generated)
            self._lengths.learn(result.arrival.tenant, sequence.generated, 1)
            if follow_up := self.next_turn(result):
                self._announce(follow_up)
        engine = self._engines[worker]
        load = Load(
            running=engine.running_count,
            waiting=engine.waiting_count,
            kv_blocks_used=engine.used_blocks,
            kv_blocks_total=self._kv_blocks,
            preemptions=engine.preemptions,
        )
        self.scheduler.worker_reported(worker, load, is_draining=False)
        self.scheduler.stepped(worker, self.now_ns)
        self._place()
        self._step(worker)


def direct(
    parameters: SimParameters, arrivals: Iterable[Arrival], *, max_sequences: int, max_batch_tokens: int
) -> list[Result]:
    """The same engine without a gateway: every request goes into its queue when it arrives."""
    engine: Simulator[Result] = Simulator(parameters, Limits(max_sequences, max_batch_tokens))
    results = [Result(arrival) for arrival in arrivals]
    coming = collections.deque(results)
    now_ns = 0
    while True:
        while coming and coming[0].arrival.at_ns <= now_ns:
            one = coming.popleft()
            engine.submit(
                one, prompt_tokens=one.arrival.prompt_tokens, output_tokens=one.arrival.output_tokens, now_ns=now_ns
            )
        step = engine.step(now_ns)
        if step is None:
            if not coming:
                return results
            now_ns = coming[0].arrival.at_ns
            continue
        now_ns = step.ended_ns
        for sequence in step.tokens:
            if sequence.generated == 1:
                sequence.owner.first_token_ns = now_ns
        for sequence in step.finished:
            sequence.owner.finished_ns = now_ns


def _model(parameters: SimParameters, max_sequences: int, max_batch_tokens: int) -> ModelInfo:
    return model_info(
        names=(MODEL,),
        context_tokens=1 << 20,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        kv_blocks=parameters.kv_blocks,
        kv_block_tokens=parameters.kv_block_tokens,
    )
