"""The simulated engine as a decider: time is a value, nothing leaks, every sequence ends once."""

from __future__ import annotations

import itertools
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.sim.parameters import SimParameters
from engine.sim.simulator import Limits, Sequence, Simulator, Step

BLOCKS, BLOCK_TOKENS = 8, 4
TINY = SimParameters(step_us=1000, kv_blocks=BLOCKS, kv_block_tokens=BLOCK_TOKENS)


def simulator(parameters: SimParameters = TINY, sequences: int = 4, budget: int = 16) -> Simulator[str]:
    return Simulator(parameters, Limits(sequences, budget))


def run(sim: Simulator[str], now_ns: int = 0) -> list[Step[str]]:
    """All steps until nothing is left."""
    steps = []
    while (step := sim.step(now_ns)) is not None:
        steps.append(step)
        now_ns = step.ended_ns
    return steps


def owners(sequences: list[Sequence[str]]) -> list[str]:
    return [sequence.owner for sequence in sequences]


def test_idle_engine_makes_no_step() -> None:
    assert simulator().step(0) is None


def test_one_token_per_step_until_the_last() -> None:
    sim = simulator()
    sequence = sim.submit("a", prompt_tokens=3, output_tokens=4, now_ns=5)
    steps = run(sim, now_ns=10)
    assert [owners(step.tokens) for step in steps] == [["a"]] * 4
    assert [owners(step.finished) for step in steps] == [[], [], [], ["a"]]
    assert (sequence.queued_ns, sequence.scheduled_ns) == (5, 10)
    assert (sequence.first_token_ns, sequence.last_token_ns) == (1_000_010, 4_000_010)


def test_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    sim = simulator(budget=8)
    sim.submit("a", prompt_tokens=20, output_tokens=1, now_ns=0)
    assert [owners(step.tokens) for step in run(sim)] == [[], [], ["a"]]


def test_decodes_go_before_new_prompts() -> None:
    sim = simulator(budget=4)
    sim.submit("old", prompt_tokens=2, output_tokens=3, now_ns=0)
    sim.step(0)
    sim.submit("new", prompt_tokens=6, output_tokens=1, now_ns=1)
    assert [owners(step.tokens) for step in run(sim)] == [["old"], ["old", "new"]]


def test_sequences_over_the_limit_wait_in_order_of_priority_then_arrival() -> None:
    sim = simulator(sequences=1)
    for name, priority in (("first", 0), ("second", 0), ("urgent", -1)):
        sim.submit(name, prompt_tokens=1, output_tokens=1, priority=priority, now_ns=0)
    assert sim.waiting_count == 3
    assert [owners(step.finished) for step in run(sim)] == [["urgent"], ["first"], ["second"]]


def test_last_admitted_sequence_gives_way_when_blocks_run_out_and_starts_over() -> None:
    sim = simulator()
    first = sim.submit("first", prompt_tokens=12, output_tokens=16, now_ns=0)
    second = sim.submit("second", prompt_tokens=12, output_tokens=16, now_ns=0)
    steps = run(sim)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert sim.preemptions == 1
    assert owners([end for step in steps for end in step.finished]) == ["first", "second"]
    assert sum(step.tokens.count(second) for step in steps) == 16


def test_step_costs_what_the_formula_says() -> None:
    parameters = SimParameters(
        step_us=100, prefill_token_us=10, prefill_pair_ns=4, decode_us=1000, kv_token_ns=7, kv_blocks=64
    )
    sim = simulator(parameters, budget=64)
    sim.submit("a", prompt_tokens=10, output_tokens=2, now_ns=0)
    prefill, decode = run(sim)
    assert prefill.ended_ns == 100_000 + 10 * 10_000 + 4 * 50
    assert decode.ended_ns - prefill.ended_ns == 100_000 + 1_000_000 + 7 * 10


def test_fixed_step_ignores_the_formula() -> None:
    sim = simulator(SimParameters(step_us=9e9, step_ms=2.5))
    sim.submit("a", prompt_tokens=10, output_tokens=1, now_ns=0)
    assert [step.ended_ns for step in run(sim)] == [2_500_000]


def test_cancelled_sequence_frees_its_blocks_at_once() -> None:
    sim = simulator()
    sequence = sim.submit("a", prompt_tokens=12, output_tokens=16, now_ns=0)
    sim.step(0)
    assert sim.used_blocks == 3
    assert sim.cancel(sequence)
    assert not sim.cancel(sequence)
    assert (sim.used_blocks, sim.running_count) == (0, 0)
    assert sim.step(1) is None


def test_repeated_prompt_computes_its_last_block_only() -> None:
    sim = simulator()
    for name in ("first", "second"):
        sequence = sim.submit(name, prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3), now_ns=0)
        run(sim)
    assert sequence.cached_tokens == 8
    assert (sim.prefix_queries, sim.prefix_hits) == (24, 8)


def test_block_that_follows_another_prefix_is_not_found() -> None:
    sim = simulator()
    sim.submit("first", prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3), now_ns=0)
    run(sim)
    other = sim.submit("other", prompt_tokens=12, output_tokens=1, block_hashes=(1, 9, 3), now_ns=0)
    run(sim)
    assert other.cached_tokens == 4


def test_next_turn_finds_the_blocks_of_the_answer_before_it() -> None:
    sim = simulator()
    sim.submit("first", prompt_tokens=6, output_tokens=11, block_hashes=(1, 2, 3, 4), now_ns=0)
    run(sim)
    second = sim.submit("second", prompt_tokens=20, output_tokens=1, block_hashes=(1, 2, 3, 4, 5), now_ns=0)
    run(sim)
    assert second.cached_tokens == 16, "the last token was never computed, but it is in no full block"


def test_sequences_of_one_step_share_their_prefix() -> None:
    sim = simulator(budget=64)
    first = sim.submit("first", prompt_tokens=12, output_tokens=2, block_hashes=(1, 2, 3), now_ns=0)
    second = sim.submit("second", prompt_tokens=14, output_tokens=2, block_hashes=(1, 2, 3), now_ns=0)
    sim.step(0)
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert sim.used_blocks == 4
    sim.cancel(first)
    assert sim.used_blocks == 4, "the second still holds them"


def test_unique_prompts_push_cached_ones_out() -> None:
    sim = simulator(budget=64)
    sim.submit("known", prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3), now_ns=0)
    run(sim)
    for name in ("a", "b"):
        sim.submit(name, prompt_tokens=28, output_tokens=1, now_ns=0)
        run(sim)
    again = sim.submit("again", prompt_tokens=12, output_tokens=1, block_hashes=(1, 2, 3), now_ns=0)
    run(sim)
    assert again.cached_tokens == 0


def test_preempted_sequence_finds_what_is_left_of_its_own_blocks() -> None:
    parameters = SimParameters(prefill_token_us=1, kv_blocks=BLOCKS, kv_block_tokens=BLOCK_TOKENS)
    sim = simulator(parameters, budget=64)
    sim.submit("first", prompt_tokens=12, output_tokens=8, now_ns=0)
    second = sim.submit("second", prompt_tokens=12, output_tokens=12, now_ns=0)
    steps = run(sim)
    assert second.preemptions == 1
    prefills = [sim_step.ended_ns - before.ended_ns for before, sim_step in itertools.pairwise(steps)]
    assert [duration for duration in prefills if duration] == [5_000], "of 17 tokens the first took the last block's"
    assert second.cached_tokens == 0, "as vLLM counts: what it found when it came"
    assert sim.prefix_queries == 24


def test_sequence_of_low_priority_gives_way_though_it_was_admitted_first() -> None:
    sim = simulator()
    batch = sim.submit("batch", prompt_tokens=12, output_tokens=16, priority=1, now_ns=0)
    sim.step(0)
    critical = sim.submit("critical", prompt_tokens=12, output_tokens=16, priority=0, now_ns=1)
    run(sim, now_ns=1)
    assert (batch.preemptions, critical.preemptions) == (1, 0)


def test_prompt_waits_until_blocks_for_all_of_it_are_free() -> None:
    sim = simulator(budget=8)
    sim.submit("running", prompt_tokens=8, output_tokens=4, now_ns=0)
    late = sim.submit("late", prompt_tokens=24, output_tokens=1, now_ns=0)
    sim.step(0)
    step = sim.step(1)
    assert step is not None
    assert late.scheduled_ns == 0, "its first chunk would fit, but all of it would not"
    run(sim, now_ns=2)
    assert late.is_over


def making_way(blocks: int = 64) -> Simulator[str]:
    parameters = SimParameters(step_us=1000, kv_blocks=blocks, kv_block_tokens=BLOCK_TOKENS)
    return Simulator(parameters, Limits(4, 64))


def test_prompt_that_yields_is_computed_a_few_tokens_a_step() -> None:
    sim = making_way()
    sim.submit("batch", prompt_tokens=12, output_tokens=1, priority=2, step_tokens=4, now_ns=0)
    assert [step.work.prefill_tokens for step in run(sim)] == [4, 4, 4]


def test_urgent_prompt_is_computed_whole_in_the_next_step_and_the_others_sit_it_out() -> None:
    sim = making_way()
    sim.submit("answer", prompt_tokens=4, output_tokens=4, priority=2, step_tokens=4, now_ns=0)
    sim.step(0)
    sim.submit("batch", prompt_tokens=12, output_tokens=1, priority=2, step_tokens=4, now_ns=1)
    sim.step(1)
    sim.submit("urgent", prompt_tokens=20, output_tokens=1, now_ns=2)
    step = sim.step(2)
    assert step is not None
    assert (owners(step.tokens), step.work.prefill_tokens) == (["answer", "urgent"], 20)
    assert [owners(later.tokens) for later in run(sim, 3)] == [["answer"], ["batch"]]


def test_one_that_sits_out_keeps_its_place_among_the_sequences() -> None:
    sim = making_way()
    for number in range(3):
        sim.submit(f"batch-{number}", prompt_tokens=12, output_tokens=1, priority=2, step_tokens=4, now_ns=0)
    sim.step(0)
    sim.submit("urgent", prompt_tokens=4, output_tokens=1, now_ns=1)
    sim.step(1)
    assert sim.running_count + sim.waiting_count == 3
    finished = [owners(step.finished) for step in run(sim, 2)]
    assert sorted(itertools.chain(*finished)) == ["batch-0", "batch-1", "batch-2"]


def test_urgent_prompt_without_blocks_waits_for_the_prompts_that_hold_them() -> None:
    sim = making_way(blocks=8)
    sim.submit("batch", prompt_tokens=24, output_tokens=2, priority=2, step_tokens=4, now_ns=0)
    for now_ns in range(5):
        sim.step(now_ns)
    sim.submit("urgent", prompt_tokens=16, output_tokens=2, now_ns=5)
    finished = [owners(step.finished) for step in run(sim, 5)]
    assert list(itertools.chain(*finished)) == ["batch", "urgent"]


def test_urgent_requests_alone_are_not_held_up() -> None:
    sim = making_way()
    sim.submit("a", prompt_tokens=30, output_tokens=1, now_ns=0)
    sim.submit("b", prompt_tokens=30, output_tokens=1, now_ns=0)
    assert [owners(step.tokens) for step in run(sim)] == [["a", "b"]]


def test_same_submits_make_the_same_steps() -> None:
    def steps() -> list[tuple[int, list[str], list[str]]]:
        draw = random.Random(7)
        sim = simulator(SimParameters(step_us=9, decode_us=1.5, kv_token_ns=3, kv_blocks=64), sequences=16, budget=64)
        for number in range(200):
            prompt, output = draw.randint(1, 200), draw.randint(1, 60)
            document = draw.randrange(8) * 1000
            hashes = range(document, document + draw.randint(0, 12))
            sim.submit(str(number), prompt_tokens=prompt, output_tokens=output, block_hashes=hashes, now_ns=0)
        return [(step.ended_ns, owners(step.tokens), owners(step.finished)) for step in run(sim)]

    assert steps() == steps()


class Engine(RuleBasedStateMachine):
    """Any order of submits, cancels and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.sim = simulator(budget=6)
        self.now_ns = 0
        self.open: dict[str, Sequence[str]] = {}
        self.tokens: dict[str, int] = {}
        self.count = 0

    @rule(
        prompt=st.integers(1, 20),
        output=st.integers(1, 12),
        priority=st.integers(-1, 1),
        document=st.integers(0, 2),
        known=st.integers(0, 8),
    )
    def submit(self, prompt: int, output: int, priority: int, document: int, known: int) -> None:
        self.count += 1
        name = str(self.count)
        self.tokens[name] = 0
        self.open[name] = self.sim.submit(
            name,
            prompt_tokens=prompt,
            output_tokens=output,
            priority=priority,
            block_hashes=range(document * 10, document * 10 + known),
            now_ns=self.now_ns,
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        assert self.sim.cancel(self.open.pop(name))

    @precondition(lambda self: self.open)
    @rule()
    def step(self) -> None:
        step = self.sim.step(self.now_ns)
        assert step is not None
        assert step.ended_ns > self.now_ns
        self.now_ns = step.ended_ns
        for sequence in step.tokens:
            self.tokens[sequence.owner] += 1
            assert self.tokens[sequence.owner] == sequence.generated <= sequence.output_tokens
        for sequence in step.finished:
            assert self.open.pop(sequence.owner).generated == sequence.output_tokens

    @invariant()
    def nothing_leaks(self) -> None:
        shared = {block for sequence in self.open.values() for block in sequence.held}
        private = [sequence.blocks - len(sequence.held) for sequence in self.open.values()]
        assert min(private, default=0) >= 0
        assert len(shared) + sum(private) == self.sim.used_blocks <= BLOCKS
        assert all(sequence.is_running or not sequence.blocks for sequence in self.open.values())
        assert self.sim.running_count + self.sim.waiting_count == len(self.open)
        waiting = [sequence for sequence in self.open.values() if not sequence.is_running]
        assert self.sim.queued_prefill_tokens == sum(sequence.uncomputed for sequence in waiting)

    def teardown(self) -> None:
        """Whatever came before, all that was submitted ends, in bounded time."""
        for _ in range(sum(sequence.output_tokens + 8 for sequence in self.open.values()) * 4):
            if self.open:
                self.step()
        assert not self.open
        assert self.sim.step(self.now_ns) is None
        assert self.sim.used_blocks == 0


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
