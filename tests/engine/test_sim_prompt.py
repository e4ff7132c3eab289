"""What the simulated engine reads, in tokens and blocks."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.sim.parameters import SimParameters
from engine.sim.prompt import TOKEN_BYTES, hash_blocks, read_tokens
from engine.sim.text import write_script
from protos.core.contract import ChatPrompt, Sampling, TextPrompt, TokenPrompt


def chat(*contents: object) -> ChatPrompt:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return ChatPrompt(msgspec.json.encode(messages))


def count(prompt: ChatPrompt | TextPrompt | TokenPrompt) -> float:
    return len(read_tokens(prompt)) / TOKEN_BYTES


def test_four_bytes_are_a_token() -> None:
    assert count(TextPrompt("x" * 40)) == 10
    assert count(TextPrompt("\u00e9")) == 1
    assert count(TokenPrompt((1, 2, 3))) == 3


def test_messages_cost_their_role_and_text_whatever_shape_it_has() -> None:
    text = chat("x" * 39)
    parts = chat([{"type": "text", "text": "x" * 39}, {"type": "image_url", "image_url": {"url": "data:"}}])
    assert count(text) == count(parts) == 1 + 10 + 1
    assert count(chat(None)) == 2


def test_the_next_turn_begins_with_the_tokens_of_the_turn_before() -> None:
    prompt = chat("What is the sea?")
    script = write_script(prompt, Sampling(ignore_eos=True), 0, 50, SimParameters())
    answer = "".join(map(script.text, range(50)))
    assert read_tokens(chat("What is the sea?", answer, "More.")).startswith(
        read_tokens(prompt) + script.words.encode()
    )


@given(st.binary(max_size=64 * 6), st.integers(1, 6), st.integers(0, 64 * 6 - 1))
def test_blocks_are_alike_up_to_the_first_difference(tokens: bytes, block_tokens: int, place: int) -> None:
    size = block_tokens * TOKEN_BYTES
    hashes = hash_blocks(tokens, block_tokens)
    assert len(hashes) == len(tokens) // size
    assert all(block >= 0 for block in hashes)
    if place < len(tokens):
        changed = bytearray(tokens)
        changed[place] ^= 1
        others = hash_blocks(bytes(changed), block_tokens)
        same = [a == b for a, b in zip(hashes, others, strict=True)]
        assert same == [block < place // size for block in range(len(hashes))]
