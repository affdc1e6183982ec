"""Decode attention over paged tiers, against dense attention and against what the store may round away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask, attention
from kernels_pallas.kv_attention import (
    CacheError,
    append,
    check,
    dense,
    empty_pages,
    empty_tiers,
    kv_attention,
    migrate,
    rollback,
    share,
    usage,
)

BATCH, HEADS, KV_HEADS, DIM, PAGE = 2, 4, 2, 16, 4


def keys_and_values(length, seed=0, outlier=0.0):
    random = np.random.default_rng(seed)
    k, v = (random.normal(size=(BATCH, length, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    k[..., 3] *= 1 + outlier
    return jnp.asarray(k), jnp.asarray(v)


def filled(length, *, store_slots=0, seed=0, outlier=0.0, **kinds):
    pages = empty_pages(BATCH, page=PAGE, tail_slots=8, store_slots=store_slots)
    tiers = empty_tiers(pages, KV_HEADS, DIM, dtype=jnp.float32, **kinds)
    k, v = keys_and_values(length, seed, outlier)
    return *append(pages, tiers, k, v), k, v


def queries(length, seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, HEADS, DIM)), jnp.float32)


@pytest.mark.parametrize("impl", [None, "reference", "interpret"])
@pytest.mark.parametrize("length", [1, 13])
def test_an_unquantized_cache_is_causal_attention(impl, length):
    pages, tiers, k, v = filled(length)
    q = queries(length)
    found = jax.jit(lambda *x: kv_attention(*x, impl=impl))(q, tiers, pages)
    np.testing.assert_allclose(found, attention(q, k, v, Mask(causal=True), impl="reference"), atol=1e-5)


@pytest.mark.pallas
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_bodies_agree_on_a_quantized_store_and_the_store_keeps_its_bound(bits, rotated):
    kinds = {"key_bits": bits, "value_bits": bits, "rotated": rotated}
    pages, tiers, k, v = filled(18, store_slots=8, **kinds)
    pages, tiers = migrate(pages, tiers, keep=PAGE)
    assert int(pages.stored.min()) >= 2 * PAGE
    q = queries(1)
    one, *others = (kv_attention(q, tiers, pages, impl=impl) for impl in ("reference", None, "interpret"))
    for other in others:
        np.testing.assert_allclose(other, one, atol=2e-5)
    held_k, held_v, position, valid = dense(tiers, pages)
    for held, true in ((held_v, v), *(() if rotated else ((held_k, k),))):
        error = np.abs(np.asarray(held - true[jnp.arange(BATCH)[:, None], jnp.clip(position, 0, 17)]))[
            np.asarray(valid)
        ]
        # Half a step of a range that a page of normal numbers does not exceed, and bfloat16 of the scale.
        assert error.max() < 8.5 / (2**bits - 1) / 2 * 1.05


def test_outlier_channels_of_keys_survive_by_channel_and_not_by_token():
    def distance(scales):
        pages, tiers, k, v = filled(18, store_slots=8, outlier=100.0, key_bits=4, key_scales=scales)
        pages, tiers = migrate(pages, tiers)
        held, _, position, valid = dense(tiers, pages)
        error = jnp.abs(held - k[jnp.arange(BATCH)[:, None], jnp.clip(position, 0, 17)])
        others = jnp.delete(error, 3, axis=-1)
        return float(jnp.max(jnp.where(valid[:, :, None, None], others, 0)))

    assert distance("channel") < 0.4 < distance("token")


def test_a_rollback_leaves_the_cache_as_if_the_tokens_had_never_come():
    pages, tiers, _, _ = filled(9, store_slots=8)
    pages, tiers = migrate(pages, tiers)
    before = kv_attention(queries(1), tiers, pages)
    more_k, more_v = keys_and_values(5, seed=3)
    longer, written = append(pages, tiers, more_k, more_v)
    assert not np.array_equal(kv_attention(queries(1), written, longer), before)
    back = rollback(longer, pages.lengths)
    np.testing.assert_array_equal(kv_attention(queries(1), written, back), before)
    refused = rollback(longer, jnp.zeros(BATCH, jnp.int32))  # past the tail, which would read the store
    with pytest.raises(CacheError, match="rollback past the tail"):
        check(refused)


def test_a_shared_prefix_is_copied_before_it_is_written():
    pages, tiers, k, v = filled(6)
    pages = share(pages, 0, 1, 6)
    q = queries(1)
    both = kv_attention(jnp.broadcast_to(q[:1], q.shape), tiers, pages)
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)
    held = usage(pages, tiers)
    new_k, new_v = keys_and_values(1, seed=5)
    pages, tiers = append(pages, tiers, new_k, new_v, jnp.array([0, 1]))
    assert int(usage(pages, tiers).tail_bytes) > int(held.tail_bytes)
    weights = jax.nn.softmax(jnp.einsum("hd,lhd->hl", q[0, 0], jnp.repeat(k[0], 2, axis=1)) / 4, axis=-1)
    expected = jnp.einsum("hl,lhd->hd", weights, jnp.repeat(v[0], 2, axis=1))[None, None]
    np.testing.assert_allclose(kv_attention(q, tiers, pages)[:1], expected, atol=1e-5)


def test_nan_in_pages_that_hold_nothing_does_not_leak_and_an_empty_cache_gives_zeros():
    pages, tiers, _, _ = filled(5)
    free = jnp.where(pages.tail_users == 0)[0]
    poison = tiers.tail_k.bits.at[free].set(-1)  # all bits set: a NaN
    spoiled = tiers.replace(tail_k=tiers.tail_k.replace(bits=poison))  # pyright: ignore
    np.testing.assert_array_equal(kv_attention(queries(1), spoiled, pages), kv_attention(queries(1), tiers, pages))
    empty = empty_pages(BATCH, page=PAGE, tail_slots=2)
    nothing = empty_tiers(empty, KV_HEADS, DIM, dtype=jnp.float32)
    assert (kv_attention(queries(1), nothing, empty) == 0).all()


def test_errors():
    pages, tiers, _, _ = filled(3)
    with pytest.raises(ValueError, match="channels"):
        kv_attention(jnp.zeros((BATCH, 1, HEADS, 8)), tiers, pages)
    with pytest.raises(ValueError, match="rows of queries"):
        kv_attention(queries(1)[:1], tiers, pages)
    with pytest.raises(CacheError, match="even"):
        empty_pages(1, page=3, tail_slots=1)
    with pytest.raises(CacheError, match="key_bits=5"):
        empty_tiers(pages, KV_HEADS, DIM, key_bits=5)
