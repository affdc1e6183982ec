"""The documented two-tier cache: what it holds, what it counts, and that a rollback never reads the store."""

import dataclasses
import inspect

import numpy as np
import pytest

from ruvjax.api.ruvllm_kv import CacheQuantization, KvCacheConfig, TwoTierKvCache
from ruvjax.errors import ConfigError, InputError

HEADS, DIM, PAGE = 2, 8, 4
SMALL = KvCacheConfig(8, "float32", CacheQuantization.INT8, 32, HEADS, DIM, PAGE)
SCALE = DIM**-0.5


def tokens(count, seed=0):
    return np.random.default_rng(seed).normal(size=(2, count, HEADS, DIM)).astype(np.float32)


def filled(count, config=SMALL):
    cache = TwoTierKvCache.new(config)
    k, v = tokens(count)
    cache.append(k, v)
    return cache, k, v


def attention(q, k, v):
    group = len(q) // HEADS
    scores = SCALE * np.einsum("hd,lhd->hl", q, np.repeat(k, group, 1))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hl,lhd->hd", weights / weights.sum(-1, keepdims=True), np.repeat(v, group, 1))


QUERY = np.random.default_rng(9).normal(size=(2 * HEADS, DIM)).astype(np.float32)


def test_documented_names():
    for name in "new append get_all_kv attend stats clear update_policy".split():
        assert inspect.getdoc(getattr(TwoTierKvCache, name))
    fields = [field.name for field in dataclasses.fields(KvCacheConfig)]
    assert fields[:3] == ["tail_length", "tail_precision", "store_precision"]
    assert fields[3:] == ["max_tokens", "num_kv_heads", "head_dim", "migration_batch"]
    stats = TwoTierKvCache(SMALL).stats()
    assert dataclasses.astuple(stats) == (0, 0, 0, 0, 0, 0.0)


def test_a_short_text_is_attended_to_exactly_also_in_pieces_and_flat():
    cache, k, v = filled(7)
    np.testing.assert_allclose(cache.attend(QUERY, SCALE), attention(QUERY, k, v), atol=1e-5)
    pieces = TwoTierKvCache(SMALL)
    for i in range(7):
        pieces.append(k[i].ravel(), v[i].ravel())
    for one, other, true in zip(cache.get_all_kv(), pieces.get_all_kv(), (k, v)):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, true)
    assert cache.stats().store_tokens == 0 and cache.stats().store_bytes == 0


@pytest.mark.parametrize("policy", CacheQuantization)
def test_old_tokens_move_to_the_store_with_the_error_of_its_bits(policy):
    cache, k, v = filled(30, dataclasses.replace(SMALL, store_precision=policy))
    stats = cache.stats()
    assert (stats.total_tokens, stats.store_tokens, stats.tail_tokens) == (30, 20, 10)
    held_k, held_v = cache.get_all_kv()
    np.testing.assert_array_equal(held_k[20:], k[20:])
    error = max(np.abs(held_k - k).max(), np.abs(held_v - v).max())
    assert 0 < error < (0.02 if policy is CacheQuantization.INT8 else 0.6)
    np.testing.assert_allclose(cache.attend(QUERY, SCALE), attention(QUERY, held_k, held_v), atol=1e-4)


def test_bytes_are_those_of_both_tiers():
    """Counted by hand: pages of float32 in the tail; codes and two bfloat16 a channel (keys) or token (values)."""
    cache, _, _ = filled(30)
    stats = cache.stats()
    page = 2 * PAGE * HEADS * DIM
    assert stats.tail_bytes == 3 * page * 4  # ten tokens begin a third page
    assert stats.store_bytes == 5 * (page + 4 * HEADS * DIM + 4 * HEADS * PAGE)
    assert stats.compression_ratio == pytest.approx(30 * 2 * HEADS * DIM * 4 / (stats.tail_bytes + stats.store_bytes))
    small, _, _ = filled(30, dataclasses.replace(SMALL, store_precision=CacheQuantization.INT4))
    assert stats.store_bytes - small.stats().store_bytes == 5 * page // 2


def test_the_oldest_tokens_are_dropped_and_clear_begins_anew():
    cache, k, v = filled(61)
    assert 28 < cache.stats().total_tokens <= 32
    held_k, _ = cache.get_all_kv()
    np.testing.assert_allclose(held_k, k[61 - len(held_k) :], atol=0.02)
    cache.clear()
    assert cache.stats().total_tokens == cache.stats().store_bytes == 0 and not cache.attend(QUERY, SCALE).any()
    cache.append(k[:3], v[:3])
    np.testing.assert_array_equal(cache.get_all_kv()[0], k[:3])


def test_a_rollback_gives_the_cache_as_it_was_and_never_reads_the_store():
    cache, k, v = filled(28)
    before, held = cache.attend(QUERY, SCALE), cache.stats()
    drafts = tokens(3, seed=1)
    cache.append(*drafts)
    assert np.abs(cache.attend(QUERY, SCALE) - before).max() > 1e-3
    store = cache._tiers.store_k.codes
    cache._tiers = cache._tiers.replace(store_k=None, store_v=None)  # pyright: ignore[reportAttributeAccessIssue]
    kept = cache._tiers
    cache.rollback(28)
    assert cache._tiers is kept and store is not None
    again, _, _ = filled(28)
    cache._tiers = dataclasses.replace(kept, store_k=again._tiers.store_k, store_v=again._tiers.store_v)
    np.testing.assert_array_equal(cache.attend(QUERY, SCALE), before)
    assert cache.stats() == held
    for length in (19, 29, -1, True):
        with pytest.raises(InputError, match="rollback"):
            cache.rollback(length)
    np.testing.assert_array_equal(cache.attend(QUERY, SCALE), before)


def test_another_policy_quantizes_the_store_again():
    cache, k, v = filled(30)
    cache.update_policy(CacheQuantization.INT4_ROTATED)
    direct, _, _ = filled(30, dataclasses.replace(SMALL, store_precision=CacheQuantization.INT4_ROTATED))
    assert cache.stats() == direct.stats()
    held = cache.get_all_kv()[0]
    assert 0.02 < np.abs(held - k).max() < 0.6
    cache.append(*tokens(2, seed=2))  # and goes on under it
    assert cache.stats().store_tokens == 24 and np.isfinite(cache.attend(QUERY, SCALE)).all()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tail_length": 0}, "tail_length"),
        ({"migration_batch": 3}, "even"),
        ({"tail_precision": "int8"}, "tail_precision"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"store_precision": "int8"}, "CacheQuantization"),
        ({"head_dim": 7, "store_precision": CacheQuantization.INT4_ROTATED}, "even head_dim"),
    ],
)
def test_configurations_that_make_no_cache(change, says):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(SMALL, **change)


def test_bad_tokens_change_nothing():
    cache, k, v = filled(5)
    held = cache.stats()
    for keys, values in ((k[:, :1], v[:, :1]), (k[:2], v[:3]), (np.full_like(k, np.nan), v)):
        with pytest.raises(InputError):
            cache.append(keys, values)
    for query in (np.zeros(5), np.zeros((1, DIM)), np.zeros((2, 4))):
        with pytest.raises(InputError, match="query"):
            cache.attend(query, SCALE)
    assert cache.stats() == held
