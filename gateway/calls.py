"""What a client asked for, checked: JSON bodies in, a `Call` or an InvalidRequest out. Loose dicts stop here.

Fields that we do not know are tolerated, because clients send them; fields that we know and do not support are refused
by name, because ignoring them would change the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

from protos.core.contract import ChatPrompt, Prompt, Sampling, TextPrompt, TokenPrompt
from protos.core.errors import InvalidRequest

INT64_MAX = 2**63 - 1
Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-INT64_MAX - 1, le=INT64_MAX)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
ModelName = Annotated[str, msgspec.Meta(max_length=1024)]
"""Bounded, as the next one is, because a refusal repeats it: to the client, in its record and in its trace."""
BandName = Annotated[str, msgspec.Meta(max_length=64)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(min_length=1)]
Stop = Text | Annotated[list[Text], msgspec.Meta(max_length=16)]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _rule(description: str, **schema: Any) -> msgspec.Meta:
    """What the published schema says of a field beyond its type: rules that are checked after decoding."""
    return msgspec.Meta(description=description, extra_json_schema=schema)


NOT_SUPPORTED = "Not supported."
TEXT_FORMAT = {"required": ["type"], "properties": {"type": {"const": "text"}}}
TextFormat = Annotated[dict[str, Any], _rule("Text only.", **TEXT_FORMAT)]
OnlyTrue = Annotated[bool, _rule("False is not supported.", const=True)]
NoList = Annotated[list[Any], _rule(NOT_SUPPORTED, maxItems=0)]
NoValue = Annotated[Any, _rule(NOT_SUPPORTED, enum=[None, False, 0, "", [], {}])]
LogitBias = Annotated[
    dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]],
    _rule("By token id.", propertyNames={"pattern": "^(0|[1-9][0-9]{0,8})$"}),
]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _SamplingFields(msgspec.Struct, kw_only=True):
    """What the endpoints share; the second group are vLLM's extensions, the third those that are not supported."""

    model: ModelName | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions, _rule("Only with `stream: true`.")] | None = None
    user: str | None = None

    priority: BandName | Annotated[int, msgspec.Meta(ge=0, le=63)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1, description="At most `max_tokens`.")] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    structured_outputs: NoValue = None
    guided_json: NoValue = None
    guided_regex: NoValue = None
    guided_choice: NoValue = None
    guided_grammar: NoValue = None
    allowed_token_ids: NoValue = None
    bad_words: NoValue = None
    use_beam_search: NoValue = None
    truncate_prompt_tokens: NoValue = None
    prompt_logprobs: NoValue = None
    return_token_ids: NoValue = None
    return_tokens_as_token_ids: NoValue = None
    cache_salt: NoValue = None


class ChatBody(_SamplingFields, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: msgspec.Raw
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20, description="Needs `logprobs: true`.")] | None = None
    chat_template_kwargs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    """Empty where absent; msgspec takes `Raw | None` for None."""

    tools: NoList | None = None
    tool_choice: Annotated[Any, _rule(NOT_SUPPORTED, enum=[None, "none", "auto"])] = None
    functions: NoList | None = None
    function_call: NoValue = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[str], _rule("Text only.", const=["text"])] | None = None
    audio: NoValue = None

    add_generation_prompt: OnlyTrue | None = None
    continue_final_message: NoValue = None
    add_special_tokens: NoValue = None
    chat_template: NoValue = None
    documents: NoValue = None
    echo: NoValue = None


class CompletionBody(_SamplingFields, kw_only=True):
    """Body of POST /v1/completions. One prompt: text or token ids."""

    prompt: str | list[Any]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: Annotated[bool, _rule(NOT_SUPPORTED, const=False)] | None = None
    suffix: Annotated[str, _rule(NOT_SUPPORTED, maxLength=0)] | None = None
    best_of: Annotated[int, _rule("Not supported, but as `n`.")] | None = None
    response_format: TextFormat | None = None
    add_special_tokens: OnlyTrue | None = None
    prompt_embeds: NoValue = None


class GenerateBody(_SamplingFields, kw_only=True):
    """Body of POST /generate: one text in, one text out, at once."""

    prompt: Text
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    stream: NoValue = None
    logprobs: NoValue = None
    echo: NoValue = None
    response_format: TextFormat | None = None
    add_special_tokens: OnlyTrue | None = None


class TextPart(msgspec.Struct):
    type: Annotated[str, _rule("Text only.", const="text")]
    text: str | None = None


Part = Annotated[TextPart, _rule("Text only.", required=["text"], properties={"text": {"type": "string"}})]


class Message(msgspec.Struct):
    role: Annotated[str, _rule("Who speaks.", enum=list(ROLES))]
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None


Messages = Annotated[
    list[
        Annotated[
            Message,
            _rule(
                "With `content`, or with `tool_calls`.",
                anyOf=[
                    {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
                    {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
                ],
            ),
        ]
    ],
    msgspec.Meta(min_length=1),
]
PROMPTS = (
    Text,
    TokenIds,
    Annotated[list[Text], msgspec.Meta(min_length=1, max_length=1)],
    Annotated[list[TokenIds], msgspec.Meta(min_length=1, max_length=1)],
)
LATE_FIELDS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("ChatBody", "messages"): (Messages,),
    ("ChatBody", "chat_template_kwargs"): (dict[str, Any], None),
    ("CompletionBody", "prompt"): PROMPTS,
}
"""What fields hold that are decoded after their body, because workers get them as they came."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One checked request. `prompt_bytes` is the prompt in canonical form: what captures hash and estimates count."""

    model: str | None
    prompt: Prompt
    prompt_bytes: bytes
    sampling: Sampling
    priority: str | int | None = None
    """Band by name, or by number from the top."""
    max_tokens_field: str = "max_tokens"
    """What the client calls it."""
    is_stream: bool = False
    wants_usage: bool = False

    @property
    def prompt_tokens(self) -> int | None:
        """None where the worker has to count them."""
        return len(self.prompt.token_ids) if isinstance(self.prompt, TokenPrompt) else None


T = TypeVar("T")
Parser = Callable[[bytes], Call | InvalidRequest]

_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]+)`")
_PATH = re.compile(r" - at `(?:key in )?\$\.?(?P<path>[^`]*)`$")
_chat_decoder = msgspec.json.Decoder(ChatBody)
_completion_decoder = msgspec.json.Decoder(CompletionBody)
_generate_decoder = msgspec.json.Decoder(GenerateBody)
_messages_decoder = msgspec.json.Decoder(Messages)
_kwargs_decoder = msgspec.json.Decoder(dict[str, Any])
_token_ids_decoder_type = tuple[TokenId, ...]


def _names_of(*types: Any) -> dict[type[msgspec.Struct], tuple[str, ...]]:
    """Fields of these types, by body."""
    return {
        body: tuple(field.name for field in msgspec.structs.fields(body) if field.type in types)
        for body in (ChatBody, CompletionBody, GenerateBody)
    }


_UNSUPPORTED = _names_of(NoValue, NoList | None)
_ONLY_TRUE = _names_of(OnlyTrue | None)


def parse_chat(body: bytes) -> Call | InvalidRequest:
    """A body of /v1/chat/completions."""
    return checked(_parse_chat, body)


def parse_completion(body: bytes) -> Call | InvalidRequest:
    """A body of /v1/completions."""
    return checked(_parse_completion, body)


def parse_generate(body: bytes) -> Call | InvalidRequest:
    """A body of /generate."""
    return checked(_parse_generate, body)


def checked(parse: Callable[[bytes], T], body: bytes) -> T | InvalidRequest:
    """What `parse` makes of a body of JSON, or what is wrong with it in the client's terms."""
    try:
        if not body.isascii():
            body.decode()  # msgspec checks only the strings that it keeps; workers and captures read all of them
        return parse(body)
    except InvalidRequest as error:
        return error
    except msgspec.ValidationError as error:
        return _explain(str(error))
    except UnicodeDecodeError as error:
        return InvalidRequest(f"the body is not UTF-8, or is compressed: {error}", code="invalid_json")
    except msgspec.DecodeError as error:
        return InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json")
    except RecursionError:
        return InvalidRequest("the body is nested too deeply", code="invalid_json")


def _explain(message: str) -> InvalidRequest:
    """msgspec's message as one that names the field in the client's terms."""
    path = match["path"] if (match := _PATH.search(message)) else ""
    what = _PATH.sub("", message).replace("`", "")
    if missing := _MISSING.search(message):
        param = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"{param}: is required", param=param, code="missing_required_parameter")
    param = path or None
    where = f"{param}: " if param else "the body: "
    return InvalidRequest(f"{where}{what[:1].lower()}{what[1:]}", param=param)


def _parse_chat(body: bytes) -> Call:
    chat = _chat_decoder.decode(body)
    messages = bytes(chat.messages)
    _check_messages(messages)
    _refuse_unsupported(chat)
    if chat.tool_choice not in (None, "none", "auto"):
        raise _unsupported("tool_choice")
    if chat.modalities not in (None, ["text"]):
        raise _unsupported("modalities")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    template_kwargs = bytes(chat.chat_template_kwargs)
    if template_kwargs == b"null":
        template_kwargs = b""
    if template_kwargs:
        _decode_field(_kwargs_decoder, template_kwargs, "chat_template_kwargs")
    return _call(
        chat,
        prompt=ChatPrompt(messages, template_kwargs),
        prompt_bytes=messages,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        max_tokens_field="max_completion_tokens" if chat.max_completion_tokens else "max_tokens",
    )


def _parse_completion(body: bytes) -> Call:
    completion = _completion_decoder.decode(body)
    _refuse_unsupported(completion)
    if completion.echo:
        raise _unsupported("echo")
    if completion.suffix:
        raise _unsupported("suffix")
    if completion.best_of is not None and completion.best_of != (completion.n or 1):
        raise _unsupported("best_of")
    prompt = _completion_prompt(completion.prompt)
    prompt_bytes = prompt.text.encode() if isinstance(prompt, TextPrompt) else msgspec.json.encode(prompt.token_ids)
    return _call(
        completion,
        prompt=prompt,
        prompt_bytes=prompt_bytes,
        max_tokens=completion.max_tokens or 16,  # OpenAI's default for this endpoint
        logprobs=completion.logprobs,
    )


def _parse_generate(body: bytes) -> Call:
    generate = _generate_decoder.decode(body)
    _refuse_unsupported(generate)
    return _call(
        generate,
        prompt=TextPrompt(generate.prompt),
        prompt_bytes=generate.prompt.encode(),
        max_tokens=generate.max_tokens or 16,
        logprobs=None,
    )


def _call(
    fields: _SamplingFields,
    *,
    prompt: Prompt,
    prompt_bytes: bytes,
    max_tokens: int | None,
    logprobs: int | None,
    max_tokens_field: str = "max_tokens",
) -> Call:
    is_stream = bool(fields.stream)
    if fields.stream_options is not None and not is_stream:
        raise InvalidRequest("stream_options: only allowed when stream is true", param="stream_options")
    if fields.min_tokens is not None and max_tokens is not None and fields.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: must not exceed {max_tokens_field} ({max_tokens})", param="min_tokens")
    return Call(
        model=fields.model,
        prompt=prompt,
        prompt_bytes=prompt_bytes,
        priority=fields.priority,
        max_tokens_field=max_tokens_field,
        is_stream=is_stream,
        wants_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=fields.top_k,
            min_p=fields.min_p,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            repetition_penalty=fields.repetition_penalty,
            stop=_stop(fields.stop),
            stop_token_ids=tuple(fields.stop_token_ids or ()),
            seed=fields.seed,
            min_tokens=fields.min_tokens,
            ignore_eos=bool(fields.ignore_eos),
            n=fields.n or 1,
            logprobs=logprobs,
            logit_bias=_logit_bias(fields.logit_bias),
            include_stop_in_output=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens,
        ),
    )


def _check_messages(messages: bytes) -> None:
    for index, message in enumerate(_decode_field(_messages_decoder, messages, "messages")):
        at = f"messages[{index}]"
        if message.role not in ROLES:
            raise InvalidRequest(f"{at}.role: must be one of {', '.join(ROLES)}", param=f"{at}.role")
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(f"{at}.content: is required", param=f"{at}.content")
        if isinstance(message.content, list):
            _check_parts(message.content, f"{at}.content")


def _check_parts(parts: list[TextPart], at: str) -> None:
    for index, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            param = f"{at}[{index}].type"
            raise InvalidRequest(f"{param}: only text parts are supported", param=param, code="unsupported_parameter")


def _completion_prompt(prompt: str | list[Any]) -> TextPrompt | TokenPrompt:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a batch of one
    if not prompt:
        raise InvalidRequest("prompt: must not be empty", param="prompt")
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if all(isinstance(item, str | list) for item in prompt):
        raise InvalidRequest("prompt: one prompt per request; send several requests", param="prompt")
    try:
        return TokenPrompt(msgspec.convert(prompt, _token_ids_decoder_type))
    except msgspec.ValidationError as error:
        raise _explain_within("prompt", error) from None


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise InvalidRequest("stop: must not hold an empty string", param="stop")
    return stops


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {msgspec.convert(token, TokenId, strict=False): value for token, value in (bias or {}).items()}
    except msgspec.ValidationError:
        raise InvalidRequest("logit_bias: keys must be token ids", param="logit_bias") from None


def _refuse_unsupported(fields: ChatBody | CompletionBody | GenerateBody) -> None:
    for name in _UNSUPPORTED[type(fields)]:
        if getattr(fields, name):
            raise _unsupported(name)
    for name in _ONLY_TRUE[type(fields)]:
        if getattr(fields, name) is False:
            raise _unsupported(name)
    if fields.response_format is not None and fields.response_format.get("type") != "text":
        raise _unsupported("response_format")


def _unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: is not supported", param=name, code="unsupported_parameter")


def _decode_field(decoder: msgspec.json.Decoder[Any], data: bytes, field: str) -> Any:
    """Decode a Raw field; its errors name the path below the field."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _explain_within(field, error) from None


def _explain_within(field: str, error: msgspec.ValidationError) -> InvalidRequest:
    message = str(error)
    return _explain(message.replace("`$", f"`$.{field}") if "`$" in message else f"{message} - at `$.{field}`")
