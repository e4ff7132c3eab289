"""Deterministic text: the same prompt and seed always give the same words, and any word of them in constant time.

A token is a word of an invented language, four characters with its space. Token i of a sequence is word
(start + i * stride) mod 4096 of the vocabulary, start and stride hashed from prompt, seed and choice.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

from engine.sim.parameters import SimParameters
from protos.core.contract import ChatPrompt, Prompt, Sampling, TextPrompt, TokenLogprob, TokenPrompt

VOCABULARY_SIZE = 4096
_MASK = VOCABULARY_SIZE - 1
SHORTEST_OUTPUT_TOKENS = 4
SENTENCE_WORDS = 16


def _make_vocabulary() -> tuple[str, ...]:
    consonants, vowels = "bcdfghjklmnprstvw", "aeiou"
    shuffle = random.Random(VOCABULARY_SIZE)
    ends = [a + b + mark for a, b, mark in itertools.product(consonants, vowels, ".,?!")]
    shapes = [(a, b, c) for a, b, c in itertools.product((consonants, vowels), repeat=3) if a != b or b != c]
    words = [a + b + c for shape in shapes for a, b, c in itertools.product(*shape)]
    sentence_ends = shuffle.sample(ends, VOCABULARY_SIZE // SENTENCE_WORDS)
    others = shuffle.sample(words, VOCABULARY_SIZE - len(sentence_ends))
    return tuple(f" {word}" for word in itertools.chain(sentence_ends, others))


VOCABULARY = _make_vocabulary()


class Script:
    """All that a sequence is going to say."""

    __slots__ = ("finish_reason", "output_tokens", "start", "stride", "texts")

    def __init__(self, start: int, stride: int) -> None:
        self.start = start
        self.stride = stride
        self.output_tokens = 0
        self.finish_reason = "length"
        self.texts: list[str] | None = None
        """Text per token where stop strings cut it; otherwise it follows from the ids."""

    def token_id(self, index: int) -> int:
        return (self.start + index * self.stride) & _MASK

    def text(self, index: int) -> str:
        if self.texts is not None:
            return self.texts[index]
        word = VOCABULARY[(self.start + index * self.stride) & _MASK]
        return word if index else word[1:]

    @property
    def token_ids(self) -> tuple[int, ...]:
        start, stride = self.start, self.stride
        return tuple([(start + index * stride) & _MASK for index in range(self.output_tokens)])

    @property
    def words(self) -> str:
        """All tokens as they are, with the first one's space and what a stop string cuts off."""
        return "".join(VOCABULARY[token_id] for token_id in self.token_ids)


def write_script(
    prompt: Prompt, sampling: Sampling, choice: int, limit_tokens: int, parameters: SimParameters, adapter: str = ""
) -> Script:
    """Decide what a sequence says and why it ends; it says at least one and at most `limit_tokens` tokens."""
    digest = _digest(prompt, sampling.seed or 0, choice, adapter)
    script = Script(digest & _MASK, (digest >> 12) & _MASK | 1)
    length = _natural_length(digest >> 24, parameters.mean_output_tokens)
    shortest = min(sampling.min_tokens or 0, limit_tokens)
    if sampling.ignore_eos or length > limit_tokens:
        script.output_tokens = limit_tokens
    else:
        script.output_tokens = max(length, shortest)
        script.finish_reason = "stop"
    if sampling.stop_token_ids:
        _stop_at_token(script, frozenset(sampling.stop_token_ids), shortest)
    if sampling.stop:
        _stop_at_string(script, sampling.stop, shortest, sampling.include_stop_in_output)
    return script


def fake_logprob(script: Script, index: int, alternatives: int) -> TokenLogprob:
    """Well-formed and meaningless: the sampled token first, each alternative half as likely as the one before."""
    token_id = script.token_id(index)
    logprob = -(1 + token_id % 97) / 97
    top = tuple(
        _token_logprob(VOCABULARY[(token_id + rank) & _MASK] if rank else script.text(index), logprob - 0.6931 * rank)
        for rank in range(alternatives)
    )
    text = script.text(index)
    return TokenLogprob(text, logprob, text.encode(), top)


def _token_logprob(text: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(text, logprob, text.encode())


def _digest(prompt: Prompt, seed: int, choice: int, adapter: str) -> int:
    match prompt:
        case TextPrompt(text):
            data = text.encode(errors="surrogatepass")
        case TokenPrompt(token_ids):
            data = repr(token_ids).encode()
        case ChatPrompt(messages_json, template_kwargs_json):
            data = messages_json + template_kwargs_json
    salt = f"{seed}/{choice}{adapter}".encode()
    return int.from_bytes(hashlib.blake2b(data + salt, digest_size=8).digest(), "little")


def _natural_length(digest: int, mean: int) -> int:
    return SHORTEST_OUTPUT_TOKENS + digest % max(1, 2 * (mean - SHORTEST_OUTPUT_TOKENS))


def _stop_at_token(script: Script, stop_token_ids: frozenset[int], shortest: int) -> None:
    for index in range(shortest, script.output_tokens):
        if script.token_id(index) in stop_token_ids:
            script.output_tokens = index + 1
            script.finish_reason = "stop"
            return


def _stop_at_string(script: Script, stops: tuple[str, ...], shortest: int, is_included: bool) -> None:
    """End at the first token that completes a stop string, and cut the text before (or after) it."""
    longest = max(map(len, stops))
    text = ""
    ends: list[int] = []
    for index, word in enumerate(_words(script)):
        searched = max(0, len(text) - longest + 1)
        text += word
        ends.append(len(text))
        found = [(at, stop) for stop in stops if (at := text.find(stop, searched)) >= 0] if index >= shortest else []
        if found:
            at, stop = min(found)
            script.output_tokens = index + 1
            script.finish_reason = "stop"
            script.texts = _cut(text, ends, at + len(stop) if is_included else at)
            return


def _words(script: Script) -> Iterator[str]:
    return (script.text(index) for index in range(script.output_tokens))


def _cut(text: str, ends: list[int], length: int) -> list[str]:
    return [text[min(start, length) : min(end, length)] for start, end in itertools.pairwise([0, *ends])]
