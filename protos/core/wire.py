"""Bytes on the wire to the values of `protos.core.contract` and back. Protobuf stops here.

The four `encode_*`/`decode_*` pairs are grpcio (de)serializers: hand them to `Channel.stream_stream` and to
`grpc.stream_stream_rpc_method_handler`, so that neither side ever sees a generated class.
"""

from __future__ import annotations

from typing import Any

from protos.core.contract import (
    Accepted,
    ChatPrompt,
    Deltas,
    EngineFrame,
    Failed,
    FailureKind,
    Finished,
    GatewayFrame,
    Gpu,
    Hello,
    Host,
    Load,
    ModelInfo,
    Prompt,
    Sampling,
    Stamps,
    Started,
    Submit,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    Welcome,
)
from protos.gen import engine_pb2 as pb

SERVICE = "tidegate.engine.v1.Engine"
SESSION_METHOD = f"/{SERVICE}/Session"
MODEL_INFO_METHOD = f"/{SERVICE}/GetModelInfo"

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A session reconnects at its own pace: gRPC's backoff, shared by all channels of a process, grows to two minutes.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_FAILURE_KINDS = {kind.value: kind for kind in FailureKind}
_OPTIONAL_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "logprobs",
    "skip_special_tokens",
)


# ---------------------------------------------------------------- gateway -> worker


def encode_gateway_frame(frame: GatewayFrame) -> bytes:
    message = pb.GatewayFrame(
        submits=[_submit_to_pb(submit) for submit in frame.submits], cancels=frame.cancels, drain=frame.drain
    )
    if frame.hello is not None:
        hello = frame.hello
        message.hello.CopyFrom(pb.Hello(protocol=hello.protocol, gateway=hello.gateway, version=hello.version))
    if frame.ping_sent_ns:
        message.ping.sent_ns = frame.ping_sent_ns
    return message.SerializeToString()


def decode_gateway_frame(data: bytes) -> GatewayFrame:
    message = pb.GatewayFrame.FromString(data)
    return GatewayFrame(
        hello=Hello(message.hello.protocol, message.hello.gateway, message.hello.version)
        if message.HasField("hello")
        else None,
        submits=[_submit_from_pb(submit) for submit in message.submits],
        cancels=list(message.cancels),
        ping_sent_ns=message.ping.sent_ns,
        drain=message.drain,
    )


def _submit_to_pb(submit: Submit) -> pb.Submit:
    message = pb.Submit(
        slot=submit.slot,
        request_id=submit.request_id,
        model=submit.model,
        priority=submit.priority,
        step_tokens=submit.step_tokens,
        traceparent=submit.traceparent,
        resumed_token_ids=submit.resumed_token_ids,
    )
    match submit.prompt:
        case TextPrompt(text):
            message.text = text
        case TokenPrompt(token_ids):
            message.token_ids.ids.extend(token_ids)
        case ChatPrompt(messages_json, template_kwargs_json):
            message.chat.messages_json = messages_json
            message.chat.template_kwargs_json = template_kwargs_json
    message.sampling.SetInParent()
    _fill_sampling(message.sampling, submit.sampling)
    return message


def _fill_sampling(message: pb.Sampling, sampling: Sampling) -> None:
    for name in _OPTIONAL_SAMPLING:
        value = getattr(sampling, name)
        if value is not None:
            setattr(message, name, value)
    message.stop.extend(sampling.stop)
    message.stop_token_ids.extend(sampling.stop_token_ids)
    message.ignore_eos = sampling.ignore_eos
    message.n = sampling.n
    message.include_stop_in_output = sampling.include_stop_in_output
    for token_id, bias in sampling.logit_bias.items():
        message.logit_bias[token_id] = bias


def _submit_from_pb(message: pb.Submit) -> Submit:
    prompt: Prompt
    match message.WhichOneof("prompt"):
        case "token_ids":
            prompt = TokenPrompt(tuple(message.token_ids.ids))
        case "chat":
            prompt = ChatPrompt(message.chat.messages_json, message.chat.template_kwargs_json)
        case _:
            prompt = TextPrompt(message.text)
    return Submit(
        slot=message.slot,
        request_id=message.request_id,
        prompt=prompt,
        sampling=_sampling_from_pb(message.sampling),
        model=message.model,
        priority=message.priority,
        step_tokens=message.step_tokens,
        traceparent=message.traceparent,
        resumed_token_ids=tuple(message.resumed_token_ids),
    )


def _sampling_from_pb(message: pb.Sampling) -> Sampling:
    optional: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    return Sampling(
        **optional,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        n=message.n or 1,
        include_stop_in_output=message.include_stop_in_output,
        logit_bias=dict(message.logit_bias),
    )


# ---------------------------------------------------------------- worker -> gateway


def encode_engine_frame(frame: EngineFrame) -> bytes:
    message = pb.EngineFrame(step=frame.step, draining=frame.draining, sent_ns=frame.sent_ns)
    if frame.welcome is not None:
        message.welcome.CopyFrom(_welcome_to_pb(frame.welcome))
    for accepted in frame.accepted:
        message.accepted.add(slot=accepted.slot, received_ns=accepted.received_ns)
    for started in frame.started:
        message.started.add(
            slot=started.slot,
            prompt_tokens=started.prompt_tokens,
            cached_tokens=started.cached_tokens,
            stamps=_stamps_to_pb(started.stamps),
        )
    if frame.deltas is not None:
        _fill_deltas(message.deltas, frame.deltas)
    for finished in frame.finished:
        message.finished.add(
            slot=finished.slot,
            reasons=finished.reasons,
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
            output_tokens=finished.output_tokens,
            preemptions=finished.preemptions,
            stamps=_stamps_to_pb(finished.stamps),
        )
    for failed in frame.failed:
        message.failed.add(
            slot=failed.slot,
            kind=int(failed.kind),
            message=failed.message,
            param=failed.param,
            stamps=_stamps_to_pb(failed.stamps),
        )
    if frame.load is not None:
        message.load.CopyFrom(_load_to_pb(frame.load))
    if frame.pong is not None:
        message.pong.ping_sent_ns, message.pong.received_ns = frame.pong
    return message.SerializeToString()


def decode_engine_frame(data: bytes) -> EngineFrame:
    message = pb.EngineFrame.FromString(data)
    # HasField before every access: touching an absent submessage builds a Python object, and this runs once per step.
    has = message.HasField
    return EngineFrame(
        welcome=_welcome_from_pb(message.welcome) if has("welcome") else None,
        step=message.step,
        accepted=[Accepted(item.slot, item.received_ns) for item in message.accepted],
        started=[
            Started(item.slot, item.prompt_tokens, item.cached_tokens, _stamps_from_pb(item.stamps))
            for item in message.started
        ],
        deltas=_deltas_from_pb(message.deltas) if has("deltas") else None,
        finished=[
            Finished(
                slot=item.slot,
                reasons=tuple(item.reasons),
                prompt_tokens=item.prompt_tokens,
                cached_tokens=item.cached_tokens,
                output_tokens=item.output_tokens,
                preemptions=item.preemptions,
                stamps=_stamps_from_pb(item.stamps),
            )
            for item in message.finished
        ],
        failed=[
            Failed(
                slot=item.slot,
                kind=_FAILURE_KINDS.get(item.kind, FailureKind.INTERNAL),
                message=item.message,
                param=item.param,
                stamps=_stamps_from_pb(item.stamps),
            )
            for item in message.failed
        ],
        load=_load_from_pb(message.load) if has("load") else None,
        pong=(message.pong.ping_sent_ns, message.pong.received_ns) if has("pong") else None,
        draining=message.draining,
        sent_ns=message.sent_ns,
    )


def _fill_deltas(message: pb.DeltaBatch, deltas: Deltas) -> None:
    message.slot.extend(deltas.slots)
    message.text.extend(deltas.texts)
    message.token_count.extend(deltas.token_counts)
    message.token_id.extend(deltas.token_ids)
    message.choice.extend(deltas.choices)
    for row, tokens in deltas.logprobs.items():
        message.logprobs.add(row=row, tokens=[_logprob_to_pb(token) for token in tokens])


def _deltas_from_pb(message: pb.DeltaBatch) -> Deltas:
    return Deltas(
        slots=list(message.slot),
        texts=list(message.text),
        token_counts=list(message.token_count),
        token_ids=list(message.token_id),
        choices=list(message.choice),
        logprobs={item.row: tuple(_logprob_from_pb(token) for token in item.tokens) for item in message.logprobs},
    )


def _logprob_to_pb(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=token.token,
        logprob=token.logprob,
        token_bytes=token.token_bytes,
        top=[_logprob_to_pb(other) for other in token.top],
    )


def _logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        message.token, message.logprob, message.token_bytes, tuple(_logprob_from_pb(other) for other in message.top)
    )


def _stamps_to_pb(stamps: Stamps) -> pb.Stamps:
    return pb.Stamps(
        received_ns=stamps.received_ns,
        queued_ns=stamps.queued_ns,
        scheduled_ns=stamps.scheduled_ns,
        first_token_ns=stamps.first_token_ns,
        last_token_ns=stamps.last_token_ns,
    )


def _stamps_from_pb(message: pb.Stamps) -> Stamps:
    return Stamps(
        message.received_ns, message.queued_ns, message.scheduled_ns, message.first_token_ns, message.last_token_ns
    )


def _welcome_to_pb(welcome: Welcome) -> pb.Welcome:
    return pb.Welcome(
        protocol=welcome.protocol,
        worker=welcome.worker,
        boot_id=welcome.boot_id,
        version=welcome.version,
        model=_model_to_pb(welcome.model),
    )


def _welcome_from_pb(message: pb.Welcome) -> Welcome:
    return Welcome(
        protocol=message.protocol,
        worker=message.worker,
        boot_id=message.boot_id,
        version=message.version,
        model=_model_from_pb(message.model),
    )


def encode_model_info(model: ModelInfo) -> bytes:
    return _model_to_pb(model).SerializeToString()


def decode_model_info(data: bytes) -> ModelInfo:
    return _model_from_pb(pb.ModelInfo.FromString(data))


def encode_empty(_: None) -> bytes:
    """GetModelInfoRequest, which has no fields."""
    return b""


def decode_empty(_: bytes) -> bytes:
    """GetModelInfoRequest. Not None: grpcio takes None from a deserializer for a failure."""
    return b""


def _model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        names=model.names,
        backend=model.backend,
        backend_version=model.backend_version,
        simulated=model.simulated,
        context_tokens=model.context_tokens,
        max_sequences=model.max_sequences,
        max_batch_tokens=model.max_batch_tokens,
        kv_blocks=model.kv_blocks,
        kv_block_tokens=model.kv_block_tokens,
        has_chat_template=model.has_chat_template,
        device=model.device,
        dtype=model.dtype,
        quantization=model.quantization,
        tensor_parallel=model.tensor_parallel,
        profile=model.profile,
        adapters=model.adapters,
        makes_way=model.makes_way,
    )


def _model_from_pb(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        names=tuple(message.names),
        backend=message.backend,
        backend_version=message.backend_version,
        simulated=message.simulated,
        context_tokens=message.context_tokens,
        max_sequences=message.max_sequences,
        max_batch_tokens=message.max_batch_tokens,
        kv_blocks=message.kv_blocks,
        kv_block_tokens=message.kv_block_tokens,
        has_chat_template=message.has_chat_template,
        device=message.device,
        dtype=message.dtype,
        quantization=message.quantization,
        tensor_parallel=message.tensor_parallel,
        profile=message.profile,
        adapters=tuple(message.adapters),
        makes_way=message.makes_way,
    )


def _load_to_pb(load: Load) -> pb.Load:
    message = pb.Load(
        running=load.running,
        waiting=load.waiting,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_total=load.kv_blocks_total,
        preemptions=load.preemptions,
        step_ns=load.step_ns,
        queued_prefill_tokens=load.queued_prefill_tokens,
        prefix_queries=load.prefix_queries,
        prefix_hits=load.prefix_hits,
    )
    if load.host is not None:
        message.host.CopyFrom(_host_to_pb(load.host))
    return message


def _load_from_pb(message: pb.Load) -> Load:
    return Load(
        running=message.running,
        waiting=message.waiting,
        kv_blocks_used=message.kv_blocks_used,
        kv_blocks_total=message.kv_blocks_total,
        preemptions=message.preemptions,
        step_ns=message.step_ns,
        queued_prefill_tokens=message.queued_prefill_tokens,
        prefix_queries=message.prefix_queries,
        prefix_hits=message.prefix_hits,
        host=_host_from_pb(message.host) if message.HasField("host") else None,
    )


def _host_to_pb(host: Host) -> pb.Host:
    return pb.Host(
        cpu_percent=host.cpu_percent,
        memory_used_bytes=host.memory_used_bytes,
        memory_total_bytes=host.memory_total_bytes,
        gpus=[
            pb.Gpu(
                index=gpu.index,
                utilization_percent=gpu.utilization_percent,
                memory_used_bytes=gpu.memory_used_bytes,
                memory_total_bytes=gpu.memory_total_bytes,
            )
            for gpu in host.gpus
        ],
    )


def _host_from_pb(message: pb.Host) -> Host:
    return Host(
        message.cpu_percent,
        message.memory_used_bytes,
        message.memory_total_bytes,
        tuple(
            Gpu(gpu.index, gpu.utilization_percent, gpu.memory_used_bytes, gpu.memory_total_bytes)
            for gpu in message.gpus
        ),
    )
