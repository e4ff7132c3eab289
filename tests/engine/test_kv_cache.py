"""Blocks of a prefix cache: which are found, which go first."""

from __future__ import annotations

from engine.sim.kv_cache import KvCache


def cached(cache: KvCache, *hashes: int) -> None:
    """Let a sequence fill these blocks and end."""
    cache.allocate(len(hashes))
    assert all(cache.publish(block) for block in hashes)
    cache.release(hashes, number=1, run=0, blocks=0)


def test_blocks_released_longest_ago_are_evicted_first_and_tails_before_heads() -> None:
    cache = KvCache(8)
    cached(cache, 10, 11, 12)
    cached(cache, 20, 21, 22)
    cache.allocate(4)
    assert (cache.find([10, 11, 12]), cache.find([20, 21, 22])) == ([10], [20, 21, 22])


def test_a_block_that_was_used_again_outlives_those_that_were_not() -> None:
    cache = KvCache(4)
    cached(cache, 10, 11)
    cached(cache, 20, 21)
    cache.hold([10, 11])
    cache.release([10, 11], number=2, run=0, blocks=0)
    cache.allocate(2)
    assert (cache.find([10, 11]), cache.find([20, 21])) == ([10, 11], [])


def test_blocks_without_content_go_before_cached_ones() -> None:
    cache = KvCache(4)
    cached(cache, 10, 11)
    cache.allocate(2)
    cache.release([], number=2, run=0, blocks=2)
    cache.allocate(2)
    assert cache.find([10, 11]) == [10, 11]


def test_a_run_is_evicted_from_its_end() -> None:
    cache = KvCache(8)
    cache.allocate(6)
    cache.release([], number=7, run=6, blocks=0)
    cached(cache, 10)
    cache.allocate(3)
    assert (cache.count_run(7), cache.find([10])) == (4, [10])


def test_a_second_block_of_the_same_content_stays_private() -> None:
    cache = KvCache(4)
    cache.allocate(2)
    assert [cache.publish(10), cache.publish(10)] == [True, False]
    cache.release([10], number=1, run=0, blocks=1)
    assert cache.free == 4
    assert cache.find([10]) == [10]
