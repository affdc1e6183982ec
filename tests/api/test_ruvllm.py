"""The documented attention of RuvLLM against float64 in numpy, its cache, one clear error for what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from ruvjax.api import ruvllm
from ruvjax.api.ruvllm import (
    AttentionConfig,
    PagedKvCache,
    RuvLLMError,
    flash_attention,
    grouped_query_attention,
    multi_query_attention,
    paged_attention,
)
from ruvjax.errors import RuvjaxError

HEADS, KV_HEADS, DIM = 4, 2, 8
CONFIG = AttentionConfig(HEADS, KV_HEADS, DIM)


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def one_head(query, keys, values, scale):
    """softmax(scale query keys^T) values in float64, for one query [dim]."""
    scores = scale * keys.astype(np.float64) @ query.astype(np.float64)
    weights = np.exp(scores - scores.max())
    return weights @ values.astype(np.float64) / weights.sum()


def every_head(query, keys, values, scale):
    """[heads, dim] of a query [heads, dim] over [kv_len, kv_heads, dim]."""
    group = query.shape[0] // keys.shape[1]
    return np.stack([one_head(q, keys[:, h // group], values[:, h // group], scale) for h, q in enumerate(query)])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_len", [1, 5, 150])
def test_flash_attention_is_softmax_attention(kv_len, causal):
    query, key, value = draw(DIM), draw(kv_len, DIM), draw(kv_len, DIM, seed=1)
    found = flash_attention(query, key, value, 0.3, causal)
    assert found.shape == (DIM,)
    np.testing.assert_allclose(found, one_head(query, key, value, 0.3), atol=1e-5)


def test_several_queries_are_the_last_positions():
    query, key, value = draw(3, DIM), draw(7, DIM), draw(7, DIM, seed=1)
    causal, full = (flash_attention(query, key, value, 0.5, flag) for flag in (True, False))
    for i in range(3):
        end = 7 - 2 + i
        np.testing.assert_allclose(causal[i], one_head(query[i], key[:end], value[:end], 0.5), atol=1e-5)
        np.testing.assert_allclose(full[i], one_head(query[i], key, value, 0.5), atol=1e-5)
    assert np.abs(causal[0] - full[0]).max() > 1e-3


@pytest.mark.parametrize("kv_len", [3, 70])
def test_each_group_reads_its_own_head(kv_len):
    queries, keys, values = draw(HEADS, DIM), draw(kv_len, KV_HEADS, DIM), draw(kv_len, KV_HEADS, DIM, seed=1)
    found = grouped_query_attention(queries, keys, values, CONFIG)
    scale = DIM**-0.5
    np.testing.assert_allclose(found, every_head(queries, keys, values, scale), atol=1e-5)
    swapped = every_head(queries, keys[:, ::-1], values[:, ::-1], scale)
    assert np.abs(found - swapped).max() > 1e-2  # heads that were taken for one another would be seen
    rows = grouped_query_attention(np.stack([queries, queries]), keys, values, CONFIG)
    np.testing.assert_allclose(rows[1], found, atol=1e-5)
    np.testing.assert_allclose(rows[0], every_head(queries, keys[:-1], values[:-1], scale), atol=1e-5)


def test_multi_query_attention_is_one_head_for_all():
    queries, key, value = draw(HEADS, DIM), draw(9, DIM), draw(9, DIM, seed=1)
    found = multi_query_attention(queries, key, value, AttentionConfig(HEADS, 1, DIM, causal=False, scale=0.7))
    for q, one in zip(queries, found):
        np.testing.assert_allclose(one, one_head(q, key, value, 0.7), atol=1e-5)
    with pytest.raises(RuvLLMError.InvalidOperation, match="num_kv_heads=2"):
        multi_query_attention(queries, key, value, CONFIG)


def test_the_configuration():
    assert CONFIG.gqa_ratio() == 2 and CONFIG.effective_scale() == pytest.approx(DIM**-0.5)
    assert AttentionConfig(8, 8, 64, scale=2.0).effective_scale() == 2.0
    for arguments in ((3, 2, 8), (0, 1, 8), (4, 2, 8.0), (4, True, 8)):
        with pytest.raises(RuvLLMError.Config):
            AttentionConfig(*arguments)
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(RuvLLMError.Config, match="scale="):
            AttentionConfig(4, 2, 8, scale=scale)


def test_the_documented_aliases_are_the_functions():
    for name in ("flash_attention", "paged_attention", "grouped_query_attention", "multi_query_attention"):
        assert getattr(ruvllm, f"{name}_neon") is getattr(ruvllm, name)
    assert all(hasattr(ruvllm, name) for name in ruvllm.__all__)


def test_paged_attention_reads_the_blocks_of_two_sequences():
    cache = PagedKvCache(KV_HEADS, DIM, max_blocks=6, block_size=4, sequences=2)
    held = {0: [], 1: []}
    for turn, (sequence, tokens) in enumerate([(0, 3), (1, 3), (0, 3), (1, 3), (0, 3)]):
        k, v = (draw(tokens, KV_HEADS, DIM, seed=seed + turn) for seed in (10, 20))
        cache.append(k, v, sequence)
        held[sequence].append((k, v))
    query = draw(HEADS, DIM)
    for sequence, tokens in ((0, 9), (1, 6)):
        keys, values = (np.concatenate(parts) for parts in zip(*held[sequence]))
        table = cache.block_tables(sequence)
        assert cache.num_tokens(sequence) == tokens and len(table) == -(-tokens // 4)
        found = paged_attention(query, cache, table, 0.4)
        np.testing.assert_allclose(found, every_head(query, keys, values, 0.4), atol=1e-5)
        prefix = paged_attention(query, cache, table[:1], 0.4)
        np.testing.assert_allclose(prefix, every_head(query, keys[:4], values[:4], 0.4), atol=1e-5)
        assert np.abs(found - prefix).max() > 1e-3
    assert not set(cache.block_tables(0)) & set(cache.block_tables(1))
    config = AttentionConfig(HEADS, KV_HEADS, DIM, scale=0.4)
    np.testing.assert_allclose(found, grouped_query_attention(query, keys, values, config), atol=1e-5)


def test_a_full_cache_refuses_and_stays_as_it_was():
    cache = PagedKvCache(1, DIM, max_blocks=2, block_size=4, sequences=2)
    k = draw(6, 1, DIM)
    cache.append(k, k)
    before = paged_attention(draw(2, DIM), cache, cache.block_tables(), 1.0)
    for sequence, tokens in ((0, 3), (1, 1)):
        with pytest.raises(RuvLLMError.KvCache, match=f"{tokens} tokens do not fit into 0 free blocks"):
            cache.append(k[:tokens], k[:tokens], sequence)
    assert (cache.num_tokens(0), cache.num_tokens(1)) == (6, 0)
    np.testing.assert_array_equal(paged_attention(draw(2, DIM), cache, cache.block_tables(), 1.0), before)
    cache.append(k[:2], k[:2])
    cache.clear()
    assert cache.num_tokens() == 0 and cache.block_tables() == []
    cache.append(k, k, 1)
    assert cache.num_tokens(1) == 6


@pytest.fixture
def cache():
    made = PagedKvCache(KV_HEADS, DIM, max_blocks=4, block_size=4)
    made.append(draw(6, KV_HEADS, DIM), draw(6, KV_HEADS, DIM))
    return made


WRONG_TABLES = {"empty": [], "twice": [0, 0], "unknown": [0, 3], "negative": [-1], "not full, not last": [1, 0]}


@pytest.mark.parametrize("table", WRONG_TABLES)
def test_a_wrong_block_table_is_one_line(cache, table):
    assert cache.block_tables() == [0, 1]
    with pytest.raises(RuvLLMError.PagedAttention) as error:
        paged_attention(draw(HEADS, DIM), cache, WRONG_TABLES[table], 1.0)
    assert "\n" not in error.value.line() and error.value.hint


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: flash_attention(draw(DIM), draw(5, DIM + 1), draw(5, DIM + 1), 1.0, True), "head_dim=8"),
        (lambda: flash_attention(draw(DIM), draw(5, DIM), draw(4, DIM), 1.0, True), "values"),
        (lambda: flash_attention(draw(DIM), draw(0, DIM), draw(0, DIM), 1.0, True), "one token or more"),
        (lambda: flash_attention(draw(DIM), draw(5, DIM), draw(5, DIM), float("nan"), True), "scale=nan"),
        (lambda: flash_attention(draw(1, 1, DIM), draw(5, DIM), draw(5, DIM), 1.0, True), "query has shape"),
        (lambda: flash_attention([[1.0], [1.0, 2.0]], draw(5, DIM), draw(5, DIM), 1.0, True), "no array"),
        (lambda: grouped_query_attention(draw(3, DIM), draw(5, 2, DIM), draw(5, 2, DIM), CONFIG), "num_heads=4"),
        (lambda: grouped_query_attention(draw(4, DIM), draw(5, 1, DIM), draw(5, 1, DIM), CONFIG), "num_kv_heads=2"),
        (lambda: grouped_query_attention(draw(4, DIM), draw(5, DIM), draw(5, DIM), CONFIG), "3 axes"),
        (lambda: PagedKvCache(2, DIM, max_blocks=2, block_size=3), "block_size=3"),
        (lambda: PagedKvCache(0, DIM, max_blocks=2), "num_kv_heads=0"),
    ],
)
def test_what_does_not_fit_is_one_line(call, word):
    with pytest.raises(RuvLLMError) as error:
        call()
    assert isinstance(error.value, RuvjaxError) and error.value.exit_code == 2
    assert word in error.value.line() and "\n" not in error.value.line() and error.value.hint


def test_what_does_not_fit_the_cache(cache):
    with pytest.raises(RuvLLMError.KvCache, match="keys have shape"):
        cache.append(draw(2, 1, DIM), draw(2, 1, DIM))
    with pytest.raises(RuvLLMError.KvCache, match="sequence=1"):
        cache.append(draw(2, KV_HEADS, DIM), draw(2, KV_HEADS, DIM), 1)
    for query in (draw(3, DIM), draw(HEADS, DIM + 2)):
        with pytest.raises(RuvLLMError.InvalidOperation, match="query has shape"):
            paged_attention(query, cache, [0], 1.0)


def test_bfloat16_stays_bfloat16():
    query, key = (jnp.asarray(x, jnp.bfloat16) for x in (draw(DIM), draw(9, DIM)))
    found = flash_attention(query, key, key, 0.3, True)
    assert found.dtype == jnp.bfloat16
    exact = one_head(np.asarray(query, np.float32), *[np.asarray(key, np.float32)] * 2, 0.3)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, atol=2e-2)
