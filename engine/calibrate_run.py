"""Drives an engine in this process with the calibration workload, while the engine writes its step log."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence

from engine import calibrate_workload as workload
from engine.backend import Backend
from engine.calibrate_workload import Lengths
from protos.core.contract import Failed, Finished, ModelInfo, Sampling, Started, Submit, TokenLogprob, TokenPrompt
from protos.core.errors import ConfigError

HELD_OUT_SHARE = 1 / 3
FIRST_TOKEN_ID, TOKEN_IDS = 100, 900
"""Ids that every vocabulary has."""

Say = Callable[[str], None]


class Driver:
    """Asks one backend; implements `engine.backend.Sink`."""

    def __init__(self, backend: Backend, model: ModelInfo, seed: int) -> None:
        self._backend = backend
        self._model = model
        self._draw = random.Random(seed)
        self._slots = 0
        self._open: dict[int, asyncio.Future[None]] = {}
        self.tokens = 0
        """Of the prompts and answers that are finished."""

    def started(self, started: Started) -> None:
        """Not of interest: the engine logs it."""

    def delta(
        self, slot: int, text: str, token_ids: Sequence[int], choice: int, logprobs: tuple[TokenLogprob, ...] | None
    ) -> None:
        """Not of interest either."""

    def finished(self, finished: Finished) -> None:
        self.tokens += finished.prompt_tokens + finished.output_tokens
        self._open.pop(finished.slot).set_result(None)

    def failed(self, failed: Failed) -> None:
        self._open.pop(failed.slot).set_exception(ConfigError(f"the engine refused a request: {failed.message}"))

    async def ask(self, lengths: Lengths) -> None:
        """One request of made-up token ids, until its end. Raises ConfigError where the engine does not serve it."""
        self._slots += 1
        done = self._open[self._slots] = asyncio.get_running_loop().create_future()
        prompt = tuple(FIRST_TOKEN_ID + self._draw.randrange(TOKEN_IDS) for _ in range(lengths.prompt_tokens))
        submit = Submit(
            slot=self._slots,
            request_id=f"calibrate-{self._slots}",
            prompt=TokenPrompt(prompt),
            sampling=Sampling(max_tokens=lengths.output_tokens, ignore_eos=True, temperature=0.0),
            model=self._model.names[0],
        )
        self._backend.submit(submit, time.monotonic_ns(), self)
        await done

    async def closed_loop(self, users: int, seconds: float) -> float:
        """Users who ask again at once, until the time is over. Returns tokens per second."""
        started_s = time.monotonic()
        tokens = self.tokens
        async with asyncio.TaskGroup() as group:
            for _ in range(users):
                group.create_task(self._user(started_s + seconds))
        return (self.tokens - tokens) / (time.monotonic() - started_s)

    async def open_loop(self, tokens_per_s: float, seconds: float) -> None:
        """Requests by the schedule of the workload, until the last is answered."""
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for arrival in workload.arrivals(self._draw, self._model.context_tokens, tokens_per_s, seconds):
                await asyncio.sleep(max(0.0, started_s + arrival.at_s - time.monotonic()))
                group.create_task(self.ask(arrival.lengths))

    async def _user(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.ask(workload.wide_lengths(self._draw, self._model.context_tokens))


async def run(backend: Backend, seconds: float, seed: int, say: Say) -> int:
    """Start the engine, drive it, stop it. Returns when the held-out part began, in monotonic nanoseconds."""
    try:
        say("starting the engine")
        model = await backend.start()
        async with asyncio.TaskGroup() as group:
            engine = group.create_task(_until_death(backend))
            held_out_ns = await _drive(Driver(backend, model, seed), model, seconds, say)
            engine.cancel()
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await backend.stop()
    return held_out_ns


async def _until_death(backend: Backend) -> None:
    raise ConfigError(await backend.run())


async def _drive(driver: Driver, model: ModelInfo, seconds: float, say: Say) -> int:
    levels = workload.levels(model.max_sequences)
    fastest = 0.0
    for users in levels:
        rate = await driver.closed_loop(users, seconds * (1 - HELD_OUT_SHARE) / len(levels))
        fastest = max(fastest, rate)
        say(f"{users} users: {rate:.0f} tokens/s")
    held_out_ns = time.monotonic_ns()
    say("held-out workload")
    await driver.open_loop(fastest, seconds * HELD_OUT_SHARE)
    return held_out_ns
