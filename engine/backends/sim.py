"""The simulated engine in real time: `engine.sim` decides, this shell keeps the schedule and tells the sinks."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

from engine import step_log
from engine.backend import Cancel, Sink
from engine.failure import context_exceeded, failed, output_limit
from engine.settings import EngineSettings
from engine.sim.prompt import TOKEN_BYTES, hash_blocks, pack_ids, read_tokens
from engine.sim.simulator import Limits, Sequence, Simulator, Step
from engine.sim.text import Script, fake_logprob, write_script
from engine.step_log import EngineFacts, LoggedRequest, LoggedStep, StepLogWriter
from protos.core.contract import (
    FailureKind,
    Finished,
    Load,
    ModelInfo,
    Prompt,
    Stamps,
    Started,
    Submit,
    TokenPrompt,
)
from protos.core.errors import ConfigError, InvalidRequest

_log = logging.getLogger("tidegate.engine")

DEFAULT_CONTEXT_TOKENS = 32_768
DEFAULT_SEQUENCES = 256
DEFAULT_BATCH_TOKENS = 8_192
MAX_LAG_NS = 1_000_000_000
"""A schedule further behind than this (a suspended process, an overloaded machine) is given up for a new one."""


class _Request:
    """One request and what its choices have come to."""

    __slots__ = ("choices", "open_choices", "output_tokens", "prompt_tokens", "received_ns", "sink", "slot")

    def __init__(self, slot: int, sink: Sink, received_ns: int, prompt_tokens: int) -> None:
        self.slot = slot
        self.sink = sink
        self.received_ns = received_ns
        self.prompt_tokens = prompt_tokens
        self.choices: list[Sequence[_Choice]] = []
        self.open_choices = 0
        self.output_tokens = 0


class _Choice:
    __slots__ = ("index", "is_finished", "logprobs", "request", "resumed_tokens", "script")

    def __init__(
        self, request: _Request, index: int, script: Script, resumed_tokens: int, logprobs: int | None
    ) -> None:
        self.request = request
        self.index = index
        self.script = script
        self.resumed_tokens = resumed_tokens
        """How much of the script another worker has said."""
        self.logprobs = logprobs
        self.is_finished = False


class SimBackend:
    """Implements `engine.backend.Backend`. Ignores what only a model could obey: temperature, penalties, logit_bias."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._parameters = settings.sim
        self._context_tokens = settings.max_model_len or DEFAULT_CONTEXT_TOKENS
        batch_tokens = settings.max_num_batched_tokens or DEFAULT_BATCH_TOKENS
        self._limits = Limits(settings.max_num_seqs or DEFAULT_SEQUENCES, batch_tokens)
        self._simulator: Simulator[_Choice] = Simulator(self._parameters, self._limits)
        self._arrived = asyncio.Event()
        self._step_ns = 0
        """Of the last step that has ended."""
        self._step_log: StepLogWriter | None = None

    async def start(self) -> ModelInfo:
        cache_tokens = self._parameters.kv_blocks * self._parameters.kv_block_tokens
        if cache_tokens < self._context_tokens:
            raise ConfigError(
                f"engine.sim.kv_blocks: a KV cache of {cache_tokens} tokens cannot hold one context of "
                f"{self._context_tokens}; raise kv_blocks or lower max_model_len"
            )
        if self._settings.step_log:
            self._step_log = self._open_step_log(Path(self._settings.step_log))
        _log.warning("SIMULATED engine: the text is made up, the times follow a formula")
        return self._model_info()

    def submit(self, submit: Submit, received_ns: int, sink: Sink) -> Cancel:
        try:
            tokens = read_tokens(submit.prompt)
        except InvalidRequest as error:
            sink.failed(failed(submit, received_ns, FailureKind.INVALID, error.message, error.param or ""))
            return _nothing
        prompt_tokens = len(tokens) // TOKEN_BYTES
        limit = output_limit(self._context_tokens, prompt_tokens, submit.sampling.max_tokens)
        if limit is None:
            sink.failed(context_exceeded(submit, received_ns, self._context_tokens, prompt_tokens))
            return _nothing
        request = _Request(submit.slot, sink, received_ns, prompt_tokens)
        resumed_tokens = len(submit.resumed_token_ids)
        adapter = submit.model if submit.model in self._settings.lora else ""
        for index in range(submit.sampling.n):
            script = write_script(submit.prompt, submit.sampling, index, limit, self._parameters, adapter)
            if script.output_tokens <= resumed_tokens:
                sink.finished(_said_already(request, script))
                return _nothing
            request.choices.append(
                self._simulator.submit(
                    _Choice(request, index, script, resumed_tokens, submit.sampling.logprobs),
                    prompt_tokens=prompt_tokens + resumed_tokens,
                    output_tokens=script.output_tokens - resumed_tokens,
                    priority=submit.priority,
                    step_tokens=submit.step_tokens if self._settings.makes_way else 0,
                    block_hashes=hash_blocks(
                        tokens + _answer_tokens(submit.prompt, script), self._parameters.kv_block_tokens, adapter
                    ),
                    now_ns=time.monotonic_ns(),
                )
            )
        request.open_choices = len(request.choices)
        self._arrived.set()
        return partial(self._cancel, request)

    def load(self) -> Load:
        simulator = self._simulator
        return Load(
            running=simulator.running_count,
            waiting=simulator.waiting_count,
            kv_blocks_used=simulator.used_blocks,
            kv_blocks_total=self._parameters.kv_blocks,
            preemptions=simulator.preemptions,
            step_ns=self._step_ns,
            queued_prefill_tokens=simulator.queued_prefill_tokens,
            prefix_queries=simulator.prefix_queries,
            prefix_hits=simulator.prefix_hits,
        )

    async def stop(self) -> None:
        if self._step_log is not None:
            self._step_log.close()

    # ---------------------------------------------------------------- steps

    async def run(self) -> str:
        """Steps on one schedule of absolute deadlines: an idle engine starts anew at the next arrival."""
        deadline_ns = time.monotonic_ns()
        while True:
            step = self._simulator.step(deadline_ns)
            if step is None:
                self._arrived.clear()
                await self._arrived.wait()
                deadline_ns = time.monotonic_ns()
                continue
            deadline_ns = step.ended_ns
            behind_ns = time.monotonic_ns() - deadline_ns
            await asyncio.sleep(max(0, -behind_ns) / 1e9)
            self._step_ns = self._simulator.step_ns
            self._tell(step)
            self._log_step(step)
            if behind_ns > MAX_LAG_NS:
                _log.warning("the simulated engine is %.1f s behind its schedule and starts a new one", behind_ns / 1e9)
                deadline_ns = time.monotonic_ns()

    def _tell(self, step: Step[_Choice]) -> None:
        for sequence in step.tokens:
            choice = sequence.owner
            request = choice.request
            if not request.open_choices:
                continue  # cancelled while the step ran
            index = choice.resumed_tokens + sequence.generated - 1
            if not request.output_tokens:
                started = Started(request.slot, request.prompt_tokens, _cached_tokens(request), _stamps(request))
                request.sink.started(started)
            request.output_tokens += 1
            script = choice.script
            logprobs = None
            if choice.logprobs is not None:
                logprobs = (fake_logprob(script, index, choice.logprobs),)
            request.sink.delta(request.slot, script.text(index), (script.token_id(index),), choice.index, logprobs)
        for sequence in step.finished:
            self._finish(sequence.owner)

    def _finish(self, choice: _Choice) -> None:
        request = choice.request
        if request.open_choices:
            choice.is_finished = True
            request.open_choices -= 1
            if not request.open_choices:
                request.sink.finished(_finished(request))

    def _cancel(self, request: _Request) -> None:
        if request.open_choices:
            for sequence in request.choices:
                if self._simulator.cancel(sequence):
                    self._log_request(sequence, time.monotonic_ns(), is_cancelled=True)
            request.open_choices = 0
            request.sink.finished(_finished(request))

    # ---------------------------------------------------------------- step log

    def _open_step_log(self, path: Path) -> StepLogWriter:
        step_log.create(path)
        log = StepLogWriter(path)
        model = self._model_info()
        log.write(
            EngineFacts(
                backend=model.backend,
                model=model.names[0],
                context_tokens=model.context_tokens,
                max_sequences=model.max_sequences,
                max_batch_tokens=model.max_batch_tokens,
                kv_blocks=model.kv_blocks,
                kv_block_tokens=model.kv_block_tokens,
            )
        )
        return log

    def _log_step(self, step: Step[_Choice]) -> None:
        if self._step_log is not None:
            duration_ns = self._step_ns
            start_ns = step.ended_ns - duration_ns
            self._step_log.write(LoggedStep(start_ns=start_ns, duration_ns=duration_ns, work=step.work))
            for sequence in step.finished:
                self._log_request(sequence, sequence.last_token_ns, is_cancelled=False)

    def _log_request(self, sequence: Sequence[_Choice], ended_ns: int, *, is_cancelled: bool) -> None:
        if self._step_log is not None:
            self._step_log.write(
                LoggedRequest(
                    arrived_ns=sequence.queued_ns,
                    scheduled_ns=_earliest(sequence.queued_ns, [sequence.scheduled_ns]),
                    first_token_ns=_earliest(sequence.queued_ns, [sequence.first_token_ns]),
                    ended_ns=max(sequence.queued_ns, ended_ns),
                    prompt_tokens=sequence.prompt_tokens,
                    output_tokens=sequence.generated,
                    cached_tokens=sequence.cached_tokens,
                    preemptions=sequence.preemptions,
                    priority=sequence.rank[0],
                    step_tokens=sequence.step_tokens,
                    is_cancelled=is_cancelled,
                    blocks=list(sequence.block_hashes),
                )
            )

    # ---------------------------------------------------------------- facts

    def _model_info(self) -> ModelInfo:
        settings = self._settings
        return ModelInfo(
            names=settings.names,
            backend="sim",
            backend_version="1",
            simulated=True,
            context_tokens=self._context_tokens,
            max_sequences=self._limits.max_sequences,
            max_batch_tokens=self._limits.max_batch_tokens,
            kv_blocks=self._parameters.kv_blocks,
            kv_block_tokens=self._parameters.kv_block_tokens,
            has_chat_template=True,
            device="simulated",
            dtype="none",
            profile=settings.profile,
            adapters=tuple(settings.lora),
            makes_way=settings.makes_way,
        )


def _answer_tokens(prompt: Prompt, script: Script) -> bytes:
    """The answer's tokens as the next prompt has them: ids after ids, words after words."""
    return pack_ids(script.token_ids) if isinstance(prompt, TokenPrompt) else script.words.encode()


def _cached_tokens(request: _Request) -> int:
    """Of the prompt, which all choices share: the first one's."""
    return min(request.prompt_tokens, request.choices[0].cached_tokens)


def _finished(request: _Request) -> Finished:
    return Finished(
        slot=request.slot,
        reasons=tuple(_reason(sequence) for sequence in request.choices),
        prompt_tokens=request.prompt_tokens,
        cached_tokens=_cached_tokens(request),
        output_tokens=request.output_tokens,
        preemptions=sum(sequence.preemptions for sequence in request.choices),
        stamps=_stamps(request),
    )


def _said_already(request: _Request, script: Script) -> Finished:
    """The end of a resumed request whose last token had left the worker that was lost."""
    return Finished(
        slot=request.slot,
        reasons=(script.finish_reason,),
        prompt_tokens=request.prompt_tokens,
        cached_tokens=0,
        output_tokens=0,
        stamps=Stamps(received_ns=request.received_ns),
    )


def _reason(sequence: Sequence[_Choice]) -> str:
    return sequence.owner.script.finish_reason if sequence.owner.is_finished else "cancelled"


def _stamps(request: _Request) -> Stamps:
    """The first of the choices' stamps, and their last token.

    The steps are on their schedule, which is behind the clock where this process is: one may have begun, by the
    schedule, before the request came that runs in it.
    """
    choices = request.choices
    queued_ns = choices[0].queued_ns
    scheduled_ns = _earliest(queued_ns, [choice.scheduled_ns for choice in choices])
    first_token_ns = _earliest(scheduled_ns, [choice.first_token_ns for choice in choices])
    return Stamps(
        received_ns=request.received_ns,
        queued_ns=queued_ns,
        scheduled_ns=scheduled_ns,
        first_token_ns=first_token_ns,
        last_token_ns=max(first_token_ns, *(choice.last_token_ns for choice in choices)),
    )


def _earliest(not_before_ns: int, stamps: list[int]) -> int:
    """The earliest stamp of what happened; 0 where nothing did."""
    return max(not_before_ns, happened[0]) if (happened := sorted(filter(None, stamps))) else 0


def _nothing() -> None:
    """Cancel of a request that ended at once."""
