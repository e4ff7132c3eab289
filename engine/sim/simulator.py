"""A continuous-batching engine, one step at a time: no I/O, no clock.

The policy is that of vLLM's V1 scheduler (v1/core/sched/scheduler.py of 0.32) with `scheduling_policy="priority"`, as
Tidegate runs it: sequences run under a budget of tokens per step, decodes and running prefills first in order of
admission, then waiting ones by priority and arrival as slots, budget and KV blocks allow. Prompts are computed in
chunks of the budget; one is admitted when blocks for all of it are free. When blocks run out, the sequence of the
lowest priority that arrived last gives its blocks back and waits to be computed again, and none is admitted in that
step. Full blocks are cached by hash and shared; at least one token is always computed. vLLM's watermark is 0 and not
modelled, nor are speculative decoding and asynchronous scheduling. Prompts make way for urgent ones (`engine.yielding`)
as they do in `engine.backends.vllm_scheduler`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import abc
from operator import attrgetter
from typing import Generic, TypeVar

import msgspec

from engine.sim.kv_cache import KvCache
from engine.sim.parameters import SimParameters, Work
from engine.yielding import Prompt, Yielding

T = TypeVar("T")

_rank = attrgetter("rank")


class Limits(msgspec.Struct, frozen=True):
    max_sequences: int
    max_batch_tokens: int


class Sequence(Generic[T]):
    """One sequence. `output_tokens` is how many it will generate, known from the start; `owner` is the caller's."""

    __slots__ = (
        "block_hashes",
        "blocks",
        "cached_tokens",
        "computed",
        "first_token_ns",
        "generated",
        "hashed_blocks",
        "held",
        "is_over",
        "is_running",
        "last_token_ns",
        "output_tokens",
        "owner",
        "preemptions",
        "prompt_tokens",
        "queued_ns",
        "rank",
        "scheduled_ns",
        "step_tokens",
    )

    def __init__(
        self,
        owner: T,
        prompt_tokens: int,
        output_tokens: int,
        rank: tuple[int, int],
        step_tokens: int,
        block_hashes: abc.Sequence[int],
        queued_ns: int,
    ) -> None:
        self.owner = owner
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.rank = rank
        self.step_tokens = step_tokens
        self.block_hashes = block_hashes
        self.queued_ns = queued_ns
        self.scheduled_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0
        self.generated = 0
        self.computed = 0
        """Tokens whose KV is in the cache."""
        self.blocks = 0
        self.hashed_blocks = 0
        """Leading blocks whose hashes the cache was told."""
        self.held: list[int] = []
        """Those of them that it shares or could share; its other blocks are private."""
        self.cached_tokens = 0
        """Prompt tokens found in the cache when it was first admitted."""
        self.preemptions = 0
        self.is_running = False
        self.is_over = False

    @property
    def uncomputed(self) -> int:
        return self.prompt_tokens + self.generated - self.computed


class Step(Generic[T]):
    """What one step does; all of it is visible at `ended_ns`."""

    __slots__ = ("ended_ns", "finished", "tokens", "work")

    def __init__(self, ended_ns: int, work: Work, tokens: list[Sequence[T]], finished: list[Sequence[T]]) -> None:
        self.ended_ns = ended_ns
        self.work = work
        self.tokens = tokens
        """Sequences that got one token each; the ones whose `generated` is 1 got their first."""
        self.finished = finished
        """Those of `tokens` whose token was their last."""


class Simulator(Generic[T]):
    """State has one owner: whoever calls `step`. Raises nothing; the caller keeps prompts within the KV cache."""

    def __init__(self, parameters: SimParameters, limits: Limits) -> None:
        self._parameters = parameters
        self._limits = limits
        self._block_tokens = parameters.kv_block_tokens
        self._running: list[Sequence[T]] = []
        self._waiting: list[tuple[tuple[int, int], Sequence[T]]] = []
        """A heap by (priority, arrival). Cancelled sequences stay until they surface."""
        self._submitted = 0
        self._yielding = Yielding(limits.max_batch_tokens)
        self._yielding_count = 0
        """Sequences that yield and are not over."""
        self._cache = KvCache(parameters.kv_blocks)
        self._cancelled_running = 0
        self.waiting_count = 0
        self.queued_prefill_tokens = 0
        """Tokens that waiting sequences have to compute before their next token."""
        self.preemptions = 0
        self.prefix_queries = 0
        """Tokens looked up in the prefix cache by sequences admitted for the first time."""
        self.prefix_hits = 0
        """Those of them that were found."""
        self.step_ns = 0

    @property
    def running_count(self) -> int:
        return len(self._running) - self._cancelled_running

    @property
    def used_blocks(self) -> int:
        return self._parameters.kv_blocks - self._cache.free

    def submit(
        self,
        owner: T,
        *,
        prompt_tokens: int,
        output_tokens: int,
        priority: int = 0,
        step_tokens: int = 0,
        block_hashes: abc.Sequence[int] = (),
        now_ns: int,
    ) -> Sequence[T]:
        """Queue a sequence of at least one prompt and one output token that together fit the KV cache.

        `step_tokens` is `Submit.step_tokens`.
        `block_hashes` are numbers of 0 and more that stand for the content of its blocks and of all before them, of
        the prompt and, where known, of prompt and answer: two sequences share the blocks whose numbers are equal.
        Blocks past the last number are like no other sequence's.
        """
        assert prompt_tokens > 0
        assert output_tokens > 0
        assert prompt_tokens + output_tokens <= self._parameters.kv_blocks * self._block_tokens
        self._submitted += 1
        self._yielding_count += step_tokens > 0
        rank = (priority, self._submitted)
        sequence = Sequence(owner, prompt_tokens, output_tokens, rank, step_tokens, block_hashes, now_ns)
        self._enqueue(sequence)
        return sequence

    def cancel(self, sequence: Sequence[T]) -> bool:
        """Forget a sequence and free its blocks at once. False where it is over already."""
        if sequence.is_over:
            return False
        self._end(sequence)
        if sequence.is_running:
            self._cancelled_running += 1
            self._release(sequence)
        else:
            self.waiting_count -= 1
            self.queued_prefill_tokens -= sequence.uncomputed
        return True

    def step(self, now_ns: int) -> Step[T] | None:
        """Run one step that starts at `now_ns`; None where there is nothing to run."""
        self._sweep()
        if not self.running_count and not self.waiting_count:
            return None
        scheduled: list[Sequence[T]] = []
        chunks: list[int] = []
        preemptions = self.preemptions
        budget, sitting_out = self._make_way()
        budget = self._schedule_running(scheduled, chunks, budget)
        if self.preemptions == preemptions:
            self._admit(scheduled, chunks, budget, self._limits.max_sequences - len(sitting_out), now_ns)
        self._running += sitting_out
        work = _work_of(scheduled, chunks)
        self.step_ns = self._parameters.duration_ns(work)
        return self._advance(scheduled, chunks, work, now_ns + self.step_ns)

    def _make_way(self) -> tuple[int, list[Sequence[T]]]:
        """The step's budget, and running sequences that are not in it."""
        if not self._yielding_count:
            return self._limits.max_batch_tokens, []
        prompts = [sequence for sequence in self._running if sequence.uncomputed > 1 or not sequence.generated]
        waiting = (sequence for _, sequence in self._waiting if not sequence.is_over)
        unfinished = (Prompt(one, one.uncomputed, one.step_tokens) for one in itertools.chain(prompts, waiting))
        plan = self._yielding.plan(len(self._running) - len(prompts), unfinished)
        sitting_out = [sequence for sequence in prompts if plan.is_urgent and sequence.step_tokens]
        if sitting_out:
            out = set(map(id, sitting_out))
            self._running = [sequence for sequence in self._running if id(sequence) not in out]
        return plan.budget_tokens, sitting_out

    def _schedule_running(self, scheduled: list[Sequence[T]], chunks: list[int], budget: int) -> int:
        running = self._running
        block_tokens = self._block_tokens
        index = 0
        while index < len(running) and budget > 0:
            sequence = running[index]
            chunk = sequence.prompt_tokens + sequence.generated - sequence.computed
            if chunk > budget:
                chunk = budget
            if sequence.computed + chunk > sequence.blocks * block_tokens and not self._grow(sequence, chunk):
                victim = self._preempt_one()
                if victim == index:
                    break
                if victim < index:
                    del scheduled[victim]
                    budget += chunks.pop(victim)
                    index -= 1
                continue
            scheduled.append(sequence)
            chunks.append(chunk)
            budget -= chunk
            index += 1
        return budget

    def _grow(self, sequence: Sequence[T], chunk: int) -> bool:
        """Give a running sequence the blocks for its next tokens; False where there are not enough."""
        end = sequence.computed + chunk
        needed = -(-end // self._block_tokens) - sequence.blocks
        if needed > self._cache.free:
            return False
        self._cache.allocate(needed)
        sequence.blocks += needed
        if sequence.block_hashes:
            self._publish(sequence, end)
        return True

    def _preempt_one(self) -> int:
        """Take the blocks of the sequence that is to be served last. Returns its place among the running ones."""
        sequence = max(self._running, key=_rank)
        index = self._running.index(sequence)
        del self._running[index]
        self._preempt(sequence)
        return index

    def _admit(self, scheduled: list[Sequence[T]], chunks: list[int], budget: int, most: int, now_ns: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < most:
            sequence = self._waiting[0][1]
            if sequence.is_over:
                heapq.heappop(self._waiting)
                continue
            uncomputed = sequence.uncomputed
            if not self._allocate(sequence):
                return
            heapq.heappop(self._waiting)
            self.waiting_count -= 1
            self.queued_prefill_tokens -= uncomputed
            chunk = min(sequence.uncomputed, budget)
            grown = self._grow(sequence, chunk)
            assert grown, "blocks for the whole sequence were free"
            sequence.is_running = True
            sequence.scheduled_ns = sequence.scheduled_ns or now_ns
            self._running.append(sequence)
            scheduled.append(sequence)
            chunks.append(chunk)
            budget -= chunk

    def _allocate(self, sequence: Sequence[T]) -> bool:
        """Let a waiting sequence hold what is cached of it; False where the rest of it would not fit."""
        cache, number = self._cache, sequence.rank[1]
        tokens = sequence.prompt_tokens + sequence.generated
        computable = (tokens - 1) // self._block_tokens
        found = cache.find(sequence.block_hashes[:computable])
        run = 0
        if sequence.preemptions and len(found) == len(sequence.block_hashes):
            run = min(cache.count_run(number), computable - len(found))
        cached = len(found) + run
        needed = -(-tokens // self._block_tokens) - cached
        if needed + cache.count_idle(found) + run > cache.free:
            return False
        cache.hold(found)
        cache.resume(number, run)
        sequence.held = found
        sequence.hashed_blocks = len(found)
        sequence.blocks = cached
        sequence.computed = cached * self._block_tokens
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += tokens
            self.prefix_hits += sequence.computed
        return True

    def _publish(self, sequence: Sequence[T], tokens: int) -> None:
        """Make known the blocks that `tokens` tokens fill."""
        full = min(tokens // self._block_tokens, len(sequence.block_hashes))
        if full > sequence.hashed_blocks:
            filled = sequence.block_hashes[sequence.hashed_blocks : full]
            sequence.held.extend(filter(self._cache.publish, filled))
            sequence.hashed_blocks = full

    def _advance(self, scheduled: list[Sequence[T]], chunks: list[int], work: Work, ended_ns: int) -> Step[T]:
        tokens: list[Sequence[T]] = []
        finished: list[Sequence[T]] = []
        for sequence, chunk in zip(scheduled, chunks, strict=True):
            sequence.computed += chunk
            if sequence.computed < sequence.prompt_tokens + sequence.generated:
                continue
            sequence.generated += 1
            sequence.last_token_ns = ended_ns
            tokens.append(sequence)
            if sequence.generated == 1:
                sequence.first_token_ns = ended_ns
            if sequence.generated == sequence.output_tokens:
                finished.append(sequence)
        if finished:
            self._retire(finished)
        return Step(ended_ns, work, tokens, finished)

    def _retire(self, finished: list[Sequence[T]]) -> None:
        for sequence in finished:
            self._end(sequence)
            self._release(sequence)
        self._running = [sequence for sequence in self._running if not sequence.is_over]

    def _end(self, sequence: Sequence[T]) -> None:
        sequence.is_over = True
        self._yielding_count -= sequence.step_tokens > 0

    def _sweep(self) -> None:
        if self._cancelled_running:
            self._running = [sequence for sequence in self._running if not sequence.is_over]
            self._cancelled_running = 0

    def _preempt(self, sequence: Sequence[T]) -> None:
        self._release(sequence)
        sequence.computed = 0
        sequence.is_running = False
        sequence.preemptions += 1
        self.preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence[T]) -> None:
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        self.waiting_count += 1
        self.queued_prefill_tokens += sequence.uncomputed

    def _release(self, sequence: Sequence[T]) -> None:
        self._publish(sequence, sequence.computed)
        private = sequence.blocks - len(sequence.held)
        run = max(0, sequence.computed // self._block_tokens - len(sequence.block_hashes))
        self._cache.release(sequence.held, sequence.rank[1], run, private - run)
        sequence.held = []
        sequence.blocks = sequence.hashed_blocks = 0


def _work_of(scheduled: list[Sequence[T]], chunks: list[int]) -> Work:
    prefill_tokens = prefill_pairs = decodes = kv_tokens = 0
    for sequence, chunk in zip(scheduled, chunks, strict=True):
        if chunk == 1 and sequence.generated:
            decodes += 1
            kv_tokens += sequence.computed
        else:
            prefill_tokens += chunk
            prefill_pairs += chunk * (2 * sequence.computed + chunk) // 2
    return Work(prefill_tokens, prefill_pairs, decodes, kv_tokens)
