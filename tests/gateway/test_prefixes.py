from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from gateway import prefixes
from gateway.prefixes import BLOCK_BYTES, BLOCK_ENDS, PrefixIndex, cut

TEXT = random.Random(1).randbytes(100_000)


def test_equal_beginnings_share_their_blocks_and_nothing_after_a_difference() -> None:
    other = bytearray(TEXT)
    other[5_000] ^= 1
    mine, theirs = cut(TEXT), cut(bytes(other))
    same = [a == b for a, b in zip(mine, theirs, strict=True)]
    assert same == [end <= 5_000 for end in BLOCK_ENDS[: len(mine)]]


def test_longer_prompt_begins_with_the_blocks_of_the_shorter() -> None:
    assert cut(TEXT)[: len(cut(TEXT[:30_000]))] == cut(TEXT[:30_000])
    assert cut(TEXT[:255]) == ()


def test_models_and_adapters_share_nothing() -> None:
    assert not set(cut(TEXT, "a")) & set(cut(TEXT, "b"))
    assert cut(TEXT, "a", b"{}") != cut(TEXT, "a", b"")


def test_blocks_are_few_however_long_the_prompt() -> None:
    assert len(cut(bytes(16 * 1024 * 1024))) == len(BLOCK_ENDS) == 213
    assert all(size <= max(256, end / 31) for size, end in zip(BLOCK_BYTES, BLOCK_ENDS, strict=True))


def test_match_is_known_to_the_block() -> None:
    index = PrefixIndex(10**6)
    index.use(cut(TEXT[:50_000]))
    matched = index.matched_bytes(cut(TEXT))
    assert 0.96 * 50_000 < matched <= 50_000
    assert index.matched_bytes(cut(TEXT[:1_000])) == 768
    assert index.matched_bytes(cut(b"x" * 1_000)) == 0
    assert index.matched_bytes(()) == 0


def test_least_recently_used_is_forgotten_from_its_end() -> None:
    index = PrefixIndex(8_192)
    old, new = cut(TEXT[:4_096]), cut(TEXT[50_000:54_096])
    index.use(old)
    index.use(new)
    assert index.held_bytes == 8_192
    index.use(cut(TEXT[60_000:61_024]))
    assert index.matched_bytes(old) == 3_072
    assert index.matched_bytes(new) == 4_096


def test_use_keeps_a_prompt_that_others_push_out() -> None:
    index = PrefixIndex(8_192)
    mine = cut(TEXT[:2_048])
    for number in range(20):
        index.use(mine)
        index.use(cut(TEXT[number * 4_096 + 10_000 : number * 4_096 + 14_096]))
    assert index.matched_bytes(mine) == 2_048


def test_trust_follows_what_workers_report() -> None:
    index = PrefixIndex(10**6)
    for _ in range(100):
        index.learn(expected_share=0.8, actual_share=0.0)
    assert index.trust < 0.01
    for _ in range(100):
        index.learn(expected_share=0.8, actual_share=0.9)
    assert index.trust > 0.99


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3_000), st.integers(0, 3_000)), max_size=40))
def test_index_is_bounded_and_holds_no_block_without_those_before_it(uses: list[tuple[int, int, int]]) -> None:
    index = PrefixIndex(6_000)
    seen = []
    for root, shared, own in uses:
        prompt = bytes([root]) * shared + TEXT[:own]
        seen.append(cut(prompt))
        index.use(seen[-1])
        assert index.held_bytes <= 6_000
        for blocks in seen:
            known = [block in index._blocks for block in blocks]
            assert known == sorted(known, reverse=True)
            assert index.matched_bytes(blocks) == sum(BLOCK_BYTES[: sum(known)])


def test_blocks_of_a_worker_are_bounded_in_number() -> None:
    index = PrefixIndex(10**12)
    for number in range(prefixes.MOST_BLOCKS // 64):
        index.use(cut(number.to_bytes(4, "big") * 6_500))
    assert len(index) == prefixes.MOST_BLOCKS
