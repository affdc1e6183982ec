"""The key-value cache: chunks against one pass, padding, rows against their neighbours, going back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Mask
from ruvjax.core.params import init, unstack
from ruvjax.core.rope import RopeScaling
from ruvjax.errors import ConfigError
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=32, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, max_length=32)
VARIANTS = {
    "llama": TINY,
    "scanned": dataclasses.replace(TINY, unroll=False, kv_heads=4),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, tied_head=False),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, head_dim=16, kv_heads=1),
    "mistral": dataclasses.replace(TINY, window=4, rope_scaling=RopeScaling("yarn", 4.0, 16)),
}
LENGTH = 13
CAUSAL = Mask(causal=True)


@functools.cache
def drawn(model):
    params = init(model, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def text(rows=2, length=LENGTH):
    return jax.random.randint(jax.random.key(5), (rows, length), 0, 32, jnp.int32)


@functools.partial(jax.jit, static_argnames="model")
def step(model, params, tokens, cache, mask):
    output = model.apply(params, tokens, mask=mask, cache=cache)
    return output.logits, output.aux["cache"]


def in_chunks(model, params, tokens, sizes, mask=CAUSAL, capacity=16):
    cache, found, at = model.empty_cache(tokens.shape[0], capacity), [], 0
    for size in sizes:
        logits, cache = step(model, params, tokens[:, at : at + size], cache, mask)
        found.append(logits)
        at += size
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "mistral") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_chunks_equal_one_pass(name):
    model, params, tokens = VARIANTS[name], drawn(VARIANTS[name]), text()
    whole = model.apply(params, tokens, mask=CAUSAL).logits
    found, cache = in_chunks(model, unstack(params, 2), tokens, (5, 5, 1, 1, 1))
    np.testing.assert_allclose(found, whole, atol=3e-5)
    np.testing.assert_array_equal(cache.length, LENGTH)
    once, _ = in_chunks(model, params, tokens, (LENGTH,))
    np.testing.assert_allclose(once, whole, atol=3e-5)
    other, _ = in_chunks(model, params, tokens.at[:, 9].add(1) % 32, (5, 5, 1, 1, 1))
    assert np.abs(other - whole)[:, 10:].max() > 1e-2  # the check can fail


def test_bfloat16_chunks_follow_bfloat16_in_one_pass():
    model = dataclasses.replace(TINY, dtype="bfloat16")
    found, cache = in_chunks(model, drawn(TINY), text(), (6, 6, 1))
    whole = model.apply(drawn(TINY), text(), mask=CAUSAL).logits
    assert cache.keys[0].dtype == jnp.bfloat16 and found.dtype == jnp.float32
    np.testing.assert_allclose(found, whole, atol=0.03 * np.abs(whole).max())


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_anywhere_in_a_chunk_changes_nothing(name):
    """A row of 13 tokens beside one of 8, padded on the left, on the right and within."""
    model, params, tokens = VARIANTS[name], drawn(VARIANTS[name]), text()
    short = model.apply(params, tokens[1:, :8], mask=CAUSAL).logits[0]
    long = model.apply(params, tokens[:1], mask=CAUSAL).logits[0]
    for places in (range(5, 13), range(8), (0, 1, 3, 4, 5, 8, 10, 12)):
        places = np.array(places)
        row = jnp.zeros((LENGTH,), jnp.int32).at[places].set(tokens[1, :8])
        segments = jnp.zeros((2, LENGTH), jnp.int32).at[0].set(1).at[1, places].set(1)
        cache, found, mixed = model.empty_cache(2, 24), [], jnp.stack([tokens[0], row])
        for part in (slice(0, 7), slice(7, 12), slice(12, 13)):
            mask = Mask(causal=True, segments=segments[:, part])
            logits, cache = step(model, params, mixed[:, part], cache, mask)
            found.append(logits)
        answer = jnp.concatenate(found, axis=1)
        np.testing.assert_allclose(answer[0], long, atol=3e-5)
        np.testing.assert_allclose(answer[1, places], short, atol=3e-5)
        np.testing.assert_array_equal(cache.length, [13, 8])
        assert np.isfinite(answer).all()


def test_a_row_has_the_same_bits_in_every_slot_and_beside_any_neighbours():
    params, rows = unstack(drawn(TINY), 2), text(5)

    def last(rows):
        return in_chunks(TINY, params, rows, (8, 1, 1, 1))[0]

    one = last(rows[:4])
    for order in ([3, 2, 1, 0], [1, 4, 4, 0], [4, 4, 4, 1]):
        other = last(rows[jnp.array(order)])
        for slot, row in enumerate(order):
            if row < 4:
                np.testing.assert_array_equal(other[slot], one[row])


def test_going_back_is_setting_the_length():
    params, tokens = drawn(TINY), text()
    _, cache = in_chunks(TINY, params, tokens, (8,))
    _, wrong = step(TINY, params, (tokens[:, 8:11] + 1) % 32, cache, CAUSAL)
    back = dataclasses.replace(wrong, length=cache.length)
    found, _ = step(TINY, params, tokens[:, 8:], back, CAUSAL)
    whole = TINY.apply(params, tokens, mask=CAUSAL).logits[:, 8:]
    np.testing.assert_allclose(found, whole, atol=3e-5)
    kept, _ = step(TINY, params, tokens[:, 8:9], wrong, CAUSAL)
    assert np.abs(kept[:, 0] - whole[:, 0]).max() > 1e-2


def test_blocks_see_themselves_whole():
    """A block-causal chunk is bidirectional within, as block diffusion reads it."""
    params, tokens, mask = drawn(TINY), text(2, 12), Mask(block=4)
    whole = TINY.apply(params, tokens, mask=mask).logits
    found, _ = in_chunks(TINY, params, tokens, (4, 4, 4), mask)
    np.testing.assert_allclose(found, whole, atol=3e-5)


def test_errors():
    params, cache = drawn(TINY), TINY.empty_cache(2, 4)
    with pytest.raises(ConfigError, match="longer than the cache's capacity of 4"):
        TINY.apply(params, text(), cache=cache)
    with pytest.raises(ConfigError, match="holds 2 rows, the tokens 1"):
        TINY.apply(params, text(1, 2), cache=cache)
    for mask in (Mask(dense=jnp.ones((1, 2, 2), bool)), Mask(lengths=jnp.array([1, 2])), Mask(diffusion=1)):
        with pytest.raises(ConfigError, match="does not go with a cache"):
            TINY.apply(params, text(2, 2), cache=cache, mask=mask)
    with pytest.raises(ConfigError, match="shifted logits has no cache"):
        dataclasses.replace(TINY, shift=True).apply(params, text(2, 2), cache=cache)
