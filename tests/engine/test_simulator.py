"""The simulated engine as a decider: time is a value, nothing leaks, every sequence ends once."""

from __future__ import annotations

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
    )
    def submit(self, prompt: int, output: int, priority: int) -> None:
        self.count += 1
        name = str(self.count)
        self.tokens[name] = 0
        self.open[name] = self.sim.submit(
            name, prompt_tokens=prompt, output_tokens=output, priority=priority, now_ns=self.now_ns
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
        held = [sequence.blocks for sequence in self.open.values()]
        assert sum(held) == self.sim.used_blocks <= BLOCKS
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
