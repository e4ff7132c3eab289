"""vLLM's AsyncLLM behind `engine.backend.Backend`.

Tokenizing and chat templates run on vLLM's renderer threads; everything else here runs on the event loop, one task per
request. The `generate` iterators that one engine step wakes all run in one pass of the loop, so that their deltas leave
in one frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import itertools
import logging
import os
import platform
import re
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec

from engine import step_log
from engine.adapters import largest_rank
from engine.backend import Cancel, Sink
from engine.backends.vllm_load import LoadRecorder
from engine.backends.vllm_plugin import WORKER_PID
from engine.backends.vllm_processes import EngineProcesses
from engine.backends.vllm_resume import Continuation
from engine.backends.vllm_sockets import VllmSockets
from engine.failure import context_exceeded, failed, output_limit, prompt_field
from engine.outbox import MAX_ROWS
from engine.prompt import read_messages, read_template_kwargs
from engine.settings import DEFAULT_MODEL, EngineSettings
from engine.stall import Look, Stall
from engine.step_log import STEP_LOG
from engine.yielding import STEP_TOKENS
from protos.core.contract import (
    ChatPrompt,
    FailureKind,
    Finished,
    Load,
    ModelInfo,
    Sampling,
    Stamps,
    Started,
    Submit,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
)
from protos.core.errors import ConfigError, InvalidRequest

_log = logging.getLogger("tidegate.engine")

OUR_SCHEDULERS = "engine.backends"
CPU_KV_CACHE_GIB = 2.0
LIVENESS_S = 0.5
CONTEXT_PARAMETERS = ("input_tokens", "input_text")
"""What vLLM calls the field at fault where the prompt alone exceeds the context."""
FEW_CORES = 4
"""On so few, the one that vLLM would leave idle for its HTTP server is worth more to the model."""
_BAD_PROMPT = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
"""What vLLM's renderer raises for messages that the template cannot take."""


class _Request:
    """One request in the engine. It is over when its sink was told how it ended."""

    def __init__(self, submit: Submit, received_ns: int, sink: Sink) -> None:
        self.submit = submit
        self.received_ns = received_ns
        self.sink = sink
        self.is_over = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.has_started = False
        self.reasons: dict[int, str] = {}
        self.stamps = Stamps(received_ns=received_ns)
        self.preemptions: dict[int, int] = {}

    @property
    def sequences(self) -> int:
        return self.submit.sampling.n

    def fail(self, kind: FailureKind, message: str, param: str = "") -> None:
        if not self.is_over:
            self.is_over = True
            failure = failed(self.submit, self.received_ns, kind, message, param)
            self.sink.failed(msgspec.structs.replace(failure, stamps=self.stamps))

    def exceed(self, context_tokens: int, prompt_tokens: int) -> None:
        if not self.is_over:
            self.is_over = True
            self.sink.failed(context_exceeded(self.submit, self.received_ns, context_tokens, prompt_tokens))

    def finish(self) -> None:
        """Choices that gave no reason were cancelled."""
        if not self.is_over:
            self.is_over = True
            self.sink.finished(
                Finished(
                    slot=self.submit.slot,
                    reasons=tuple(self.reasons.get(choice, "cancelled") for choice in range(self.sequences)),
                    prompt_tokens=self.prompt_tokens,
                    cached_tokens=self.cached_tokens,
                    output_tokens=self.output_tokens,
                    preemptions=sum(self.preemptions.values()),
                    stamps=self.stamps,
                )
            )


class VllmBackend:
    """One AsyncLLM. `source` is what vLLM loads: a folder or a hub name."""

    def __init__(self, settings: EngineSettings, source: str) -> None:
        self._settings = settings
        self._source = source
        self._engine: Any = None
        self._loading: asyncio.Future[Any] | None = None
        self._recorder = LoadRecorder()
        self._processes = EngineProcesses()
        self._sockets = VllmSockets()
        self._requests: set[_Request] = set()
        self._is_dead = False
        self._tasks = asyncio.TaskGroup()
        self._numbers = itertools.count()
        self._context_tokens = 0
        self._sampling_defaults: dict[str, Any] = {}
        self._adapters: dict[str, Any] = {}
        """vLLM's LoRARequest by name."""

    async def start(self) -> ModelInfo:
        _set_environment(self._settings)
        self._sockets.open()
        self._loading = asyncio.get_running_loop().run_in_executor(None, self._make_engine)
        self._engine = await asyncio.shield(self._loading)
        config = self._engine.vllm_config
        self._context_tokens = config.model_config.max_model_len
        self._sampling_defaults = config.model_config.get_diff_sampling_param()
        self._adapters = _lora_requests(self._settings)
        self._recorder.kv_blocks = config.cache_config.num_gpu_blocks or 0
        return _model_info(self._settings, self._engine)

    def submit(self, submit: Submit, received_ns: int, sink: Sink) -> Cancel:
        request = _Request(submit, received_ns, sink)
        if self._is_dead:  # the worker has not heard of it yet, and the group of tasks is closing or closed
            request.fail(FailureKind.UNAVAILABLE, "the engine died")
            return _nothing
        self._requests.add(request)
        task = self._tasks.create_task(self._serve(request))
        task.add_done_callback(lambda _: self._requests.discard(request))

        def cancel() -> None:
            request.finish()
            task.cancel()

        return cancel

    def load(self) -> Load:
        sequences = sum(request.sequences for request in self._requests if not request.is_over)
        return self._recorder.load(sequences, self._engine.get_num_queued_tokens())

    async def run(self) -> str:
        why = "process is gone; see its messages above"
        stall = Stall()
        async with self._tasks:
            while not self._engine.errored:  # vLLM has no event for it
                await asyncio.sleep(LIVENESS_S)
                if wrong := stall.observe(self._look()):
                    why = wrong
                    self._processes.kill()  # vLLM notices that
            self._is_dead = True
            for request in self._requests:
                request.fail(FailureKind.UNAVAILABLE, "the engine died")
        return f"vLLM's engine {why}"

    def _look(self) -> Look:
        has_requests = any(not request.is_over for request in self._requests)
        is_suspended, cpu_s = self._processes.look() if has_requests else (False, 0.0)
        return Look(
            now_ns=time.monotonic_ns(),
            stepped_ns=self._recorder.stepped_ns,
            has_requests=has_requests,
            is_suspended=is_suspended,
            cpu_s=cpu_s,
        )

    async def stop(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
        elif self._loading is not None:
            await self._stop_loading(self._loading)
        self._sockets.close()

    async def _stop_loading(self, loading: asyncio.Future[Any]) -> None:
        """A thread cannot be stopped, but loading ends soon without the processes that it starts."""
        while not loading.done():
            self._processes.kill()
            await asyncio.wait([loading], timeout=LIVENESS_S)
        with contextlib.suppress(Exception):
            loading.result().shutdown()

    # ---------------------------------------------------------------- one request

    async def _serve(self, request: _Request) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            prompt = await self._render(request.submit)
            request.prompt_tokens = len(prompt["prompt_token_ids"])
            limit = output_limit(self._context_tokens, request.prompt_tokens, request.submit.sampling.max_tokens)
            if limit is None:
                request.exceed(self._context_tokens, request.prompt_tokens)
            else:
                await self._generate(request, prompt, limit)
        except InvalidRequest as error:
            request.fail(FailureKind.INVALID, error.message, error.param or "")
        except VLLMClientError as error:
            self._refuse(request, error)
        except EngineDeadError:
            request.fail(FailureKind.UNAVAILABLE, "the engine died")
        except Exception as error:
            _log.exception("request %s failed", request.submit.request_id)
            request.fail(FailureKind.INTERNAL, f"the engine failed: {type(error).__name__}")

    async def _render(self, submit: Submit) -> Any:
        """vLLM's input of a prompt: template applied, tokenized. Raises InvalidRequest and VLLMClientError."""
        renderer = self._engine.renderer
        match submit.prompt:
            case ChatPrompt():
                return await self._render_chat(submit.prompt)
            case TokenPrompt(token_ids):
                if not token_ids:
                    raise InvalidRequest("the prompt is empty", param="prompt")
                renderer.validate_token_ids(token_ids, parameter="prompt")
                raw: Any = {"prompt_token_ids": list(token_ids)}
            case TextPrompt(text):
                raw = {"prompt": text}
        (prompt,) = await renderer.render_cmpl_async([raw])
        if not prompt["prompt_token_ids"]:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return prompt

    async def _render_chat(self, chat: ChatPrompt) -> Any:
        from jinja2 import TemplateError
        from vllm.renderers import ChatParams

        messages = read_messages(chat)
        arguments = read_template_kwargs(chat) | {"add_generation_prompt": True, "continue_final_message": False}
        try:
            _, (prompt,) = await self._engine.renderer.render_chat_async(
                [messages], ChatParams(chat_template_kwargs=arguments)
            )
        except (*_BAD_PROMPT, TemplateError) as error:
            raise InvalidRequest(f"the chat template does not take these messages: {error}", param="messages") from None
        return prompt

    async def _generate(self, request: _Request, prompt: Any, limit: int) -> None:
        if request.submit.resumed_token_ids:
            await self._go_on(request, prompt, limit)
            return
        params = _sampling_params(request.submit.sampling, limit, self._sampling_defaults)
        async for output in self._outputs(request, prompt, params):
            _tell(request, output)
        request.finish()

    async def _go_on(self, request: _Request, prompt: Any, limit: int) -> None:
        """Make the rest of an answer that another worker began."""
        sampling, resumed = request.submit.sampling, request.submit.resumed_token_ids
        whole = _sampling_params(sampling, limit, self._sampling_defaults)
        answer = Continuation(self._engine, whole, prompt["prompt_token_ids"], resumed)
        if answer.reason is not None:
            request.reasons[0] = answer.reason
        else:
            min_tokens = max(0, (sampling.min_tokens or 0) - len(resumed))
            rest = msgspec.structs.replace(sampling, stop=(), min_tokens=min_tokens)
            params = _sampling_params(rest, limit - len(resumed), self._sampling_defaults, detokenize=False)
            await self._tell_rest(request, prompt, params, answer)
        request.finish()

    async def _tell_rest(self, request: _Request, prompt: Any, params: Any, answer: Continuation) -> None:
        token_ids = [*prompt["prompt_token_ids"], *request.submit.resumed_token_ids]
        outputs = self._outputs(request, {**prompt, "prompt_token_ids": token_ids}, params)
        async with contextlib.aclosing(outputs):  # a stop string ends the answer before vLLM does
            async for output in outputs:
                answer.translate(output.outputs[0])
                _tell(request, output)
                if answer.reason is not None:
                    break

    def _outputs(self, request: _Request, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
        # A number of our own: two gateways may use the same request id, and vLLM aborts by it.
        name = f"{request.submit.request_id}-{next(self._numbers)}"
        if request.submit.step_tokens:
            params.extra_args = {STEP_TOKENS: request.submit.step_tokens}
        outputs: AsyncGenerator[Any, None] = self._engine.generate(
            prompt,
            params,
            name,
            priority=request.submit.priority,
            lora_request=self._adapters.get(request.submit.model),
        )
        return outputs

    def _refuse(self, request: _Request, error: Exception) -> None:
        parameter = getattr(error, "parameter", None)
        message = str(error.args[0]) if error.args else str(error)
        field = prompt_field(request.submit)
        if parameter in CONTEXT_PARAMETERS:
            request.fail(FailureKind.CONTEXT_EXCEEDED, message, field)
        else:
            request.fail(FailureKind.INVALID, message, parameter or _field_named_in(message) or "")

    # ---------------------------------------------------------------- the engine

    def _make_engine(self) -> Any:
        """Import vLLM and load the model: seconds to minutes, on a thread."""
        from pydantic import ValidationError
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = _engine_arguments(self._settings, self._source)
        _check_arguments(arguments, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
        try:
            config = AsyncEngineArgs(**arguments).create_engine_config()
        except (ValidationError, ValueError, OSError, NotImplementedError) as error:
            raise ConfigError(f"vLLM cannot serve {self._source}: {_one_line(error)}") from None
        _choose_scheduler(config, self._settings)
        return _start_engine(AsyncLLM, config, self._recorder)


def _nothing() -> None:
    """Cancel of a request that ended at once."""


def _choose_scheduler(config: Any, settings: EngineSettings) -> None:
    """By name: vLLM makes it in its engine process, which finds there what the environment tells it."""
    module, prefix = f"{OUR_SCHEDULERS}.vllm_scheduler", "Yielding"
    if settings.step_log:
        path = Path(settings.step_log)
        step_log.create(path)
        os.environ[STEP_LOG] = str(path.absolute())
        module, prefix = f"{OUR_SCHEDULERS}.vllm_step_log", "Logged"
    elif config.scheduler_config.scheduler_cls is not None or not settings.makes_way:
        return
    kind = "AsyncScheduler" if config.scheduler_config.async_scheduling else "Scheduler"
    config.scheduler_config.scheduler_cls = f"{module}.{prefix}{kind}"


def _makes_way(scheduler_config: Any, settings: EngineSettings) -> bool:
    """Once a scheduler is chosen."""
    return settings.makes_way and str(scheduler_config.scheduler_cls).startswith(OUR_SCHEDULERS)


def _start_engine(make: Any, config: Any, recorder: LoadRecorder) -> Any:
    from engine.backends.vllm_load import stat_logger

    try:
        return make.from_vllm_config(
            config, stat_loggers=[stat_logger(recorder)], disable_log_stats=True, enable_log_requests=False
        )
    except RuntimeError as error:
        raise ConfigError(f"vLLM's engine did not start: {_one_line(error)} (--verbose shows its messages)") from error


def _set_environment(settings: EngineSettings) -> None:
    """What vLLM takes from nowhere else; it reads these when it is imported."""
    os.environ[WORKER_PID] = str(os.getpid())
    _bind_to_cores(settings.cpu_cores)
    if not settings.is_verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM gives the loop a turn after so many answers of a step; the rest would leave as a step of its own.
    os.environ.setdefault("VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", str(MAX_ROWS))


def _bind_to_cores(cores: str) -> None:
    if cores != "auto":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
        return
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(usable) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, usable)) or "auto")


def _engine_arguments(settings: EngineSettings, source: str) -> dict[str, Any]:
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    kv_cache_gib = settings.kv_cache_gib or (CPU_KV_CACHE_GIB if is_cpu else None)
    is_eager = is_cpu if settings.enforce_eager is None else settings.enforce_eager
    arguments: dict[str, Any] = {
        "model": source,
        "served_model_name": list(settings.model_names),
        "dtype": _dtype(settings, is_cpu=is_cpu),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": is_eager,
        "scheduling_policy": "priority",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "quantization": settings.quantization,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30) if kv_cache_gib else None,
    }
    if settings.lora:
        arguments |= {
            "enable_lora": True,
            "max_loras": len(settings.lora),
            "max_lora_rank": largest_rank(settings.lora),
        }
    return {name: value for name, value in arguments.items() if value is not None} | settings.vllm


def _lora_requests(settings: EngineSettings) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(Path(path).expanduser()))
        for number, (name, path) in enumerate(settings.lora.items(), 1)
    }


def _dtype(settings: EngineSettings, *, is_cpu: bool) -> str:
    """In bf16 the small default model hangs on rounding: it has two first words for "What is the capital of France?".

    Their logarithms are 0.1 apart, and with AMX it took the other one, and did not come to Paris.
    """
    if is_cpu and settings.dtype == "auto" and (settings.model == DEFAULT_MODEL or _emulates_bf16()):
        return "float32"
    return settings.dtype


def _emulates_bf16() -> bool:
    """x86 without AVX-512 BF16 or AMX: SmolLM2 gave 29 tokens/s in bf16 there, and 150 in float32."""
    import torch

    is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return platform.machine() == "x86_64" and not is_native


def _check_arguments(arguments: dict[str, Any], known: set[str]) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near ones: {', '.join(near)}" if near else ""
            raise ConfigError(f"engine.vllm.{name}: vLLM has no such engine argument{hint}")


def _model_info(settings: EngineSettings, engine: Any) -> ModelInfo:
    import vllm
    from vllm.platforms import current_platform

    config = engine.vllm_config
    model, scheduler, cache = config.model_config, config.scheduler_config, config.cache_config
    device = "cpu" if current_platform.is_cpu() else current_platform.get_device_name()
    return ModelInfo(
        names=settings.names,
        backend="vllm",
        backend_version=vllm.__version__.split("+")[0],
        simulated=False,
        context_tokens=model.max_model_len,
        max_sequences=scheduler.max_num_seqs,
        max_batch_tokens=scheduler.max_num_batched_tokens,
        kv_blocks=cache.num_gpu_blocks or 0,
        kv_block_tokens=cache.block_size,
        has_chat_template=getattr(engine.get_tokenizer(), "chat_template", None) is not None,
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization or "",
        tensor_parallel=settings.tensor_parallel_size,
        profile=settings.profile,
        adapters=tuple(settings.lora),
        makes_way=_makes_way(scheduler, settings),
    )


# ---------------------------------------------------------------- values, there and back


def _sampling_params(sampling: Sampling, limit: int, defaults: dict[str, Any], *, detokenize: bool = True) -> Any:
    """vLLM's sampling parameters: the request's, else the model's own defaults, else vLLM's."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    given = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "min_tokens": sampling.min_tokens,
        "logprobs": sampling.logprobs,
        "skip_special_tokens": sampling.skip_special_tokens,
    }
    return SamplingParams.from_optional(
        **(defaults | {name: value for name, value in given.items() if value is not None} | {"max_tokens": limit}),
        n=sampling.n,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logit_bias=dict(sampling.logit_bias) or None,
        include_stop_str_in_output=sampling.include_stop_in_output,
        detokenize=detokenize,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def _tell(request: _Request, output: Any) -> None:
    """Pass on what one step gave a request."""
    # A resumed request may find in the cache what was output before: to the client that is not prompt.
    request.cached_tokens = min(output.num_cached_tokens or request.cached_tokens, request.prompt_tokens)
    for completion in output.outputs:
        _take_metrics(request, completion.index, output.metrics)
    if not request.has_started:
        request.has_started = True
        request.sink.started(Started(request.submit.slot, request.prompt_tokens, request.cached_tokens, request.stamps))
    for completion in output.outputs:
        token_ids = completion.token_ids
        if token_ids or completion.text:
            request.output_tokens += len(token_ids)
            logprobs = None
            if completion.logprobs is not None:
                alternatives = itertools.repeat(request.submit.sampling.logprobs or 0)
                logprobs = tuple(map(_token_logprob, token_ids, completion.logprobs, alternatives))
            request.sink.delta(request.submit.slot, completion.text, token_ids, completion.index, logprobs)
        if completion.finish_reason is not None:
            request.reasons[completion.index] = _reason(completion.finish_reason)


def _reason(finish_reason: str) -> str:
    return {"abort": "cancelled", "repetition": "stop"}.get(finish_reason, finish_reason)


def _take_metrics(request: _Request, choice: int, metrics: Any) -> None:
    """Copy the stamps: the object is vLLM's own and goes on changing. They are seconds of the host's monotonic clock.

    With several choices the earliest start and the latest end count.
    """
    if metrics is None:
        return
    old = request.stamps
    request.preemptions[choice] = metrics.num_preemptions
    request.stamps = Stamps(
        received_ns=old.received_ns,
        queued_ns=_first(old.queued_ns, metrics.queued_ts),
        scheduled_ns=_first(old.scheduled_ns, metrics.scheduled_ts),
        first_token_ns=_first(old.first_token_ns, metrics.first_token_ts),
        last_token_ns=max(old.last_token_ns, int(metrics.last_token_ts * 1e9)),
    )


def _first(known_ns: int, stamp_s: float) -> int:
    stamp_ns = int(stamp_s * 1e9)
    return min(known_ns, stamp_ns) if known_ns and stamp_ns else known_ns or stamp_ns


def _token_logprob(token_id: int, position: Any, alternatives: int) -> TokenLogprob:
    """vLLM adds the sampled token to the likeliest ones where it is none of them."""
    sampled = position[token_id]
    ranked = sorted(position.values(), key=lambda item: item.rank or 0)
    return TokenLogprob(
        sampled.decoded_token or "",
        max(sampled.logprob, -9999.0),
        (sampled.decoded_token or "").encode(),
        tuple(_alternative(item) for item in ranked[:alternatives]),
    )


def _alternative(item: Any) -> TokenLogprob:
    text = item.decoded_token or ""
    return TokenLogprob(text, max(item.logprob, -9999.0), text.encode())


_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)


def _field_named_in(message: str) -> str | None:
    """vLLM's checks begin with the parameter's name where they do not give it apart."""
    return next((word for word in re.findall(r"[a-z_]+", message) if word in _SAMPLING_FIELDS), None)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
