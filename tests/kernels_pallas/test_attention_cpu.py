"""Attention in C++ against the float32 oracle. Skipped where no compiler is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import native
from kernels_pallas.attention import Mask, attention, cpu

reason = native.unavailable(cpu.SOURCE, cpu.TARGETS)
needs_compiler = pytest.mark.skipif(bool(reason), reason=f"no native attention: {reason}")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def operands(dtype, batch=2, length=19, heads=4, kv_heads=2, dim=16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(batch, length, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def masks(length):
    segments = jnp.array([[1] * (length // 2) + [2] * (length - length // 2 - 3) + [0] * 3, [1] * length], jnp.int32)
    return {"none": None, "causal": Mask(causal=True), "segments": Mask(segments=segments), "block": Mask(block=4)}


def both(q, k, v, mask, impl):
    """Output and the gradients of q, k and v."""

    def weighed(q, k, v):
        out = attention(q, k, v, mask, impl=impl)
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    gradients = jax.jit(jax.grad(weighed, argnums=(0, 1, 2)))
    return attention(q, k, v, mask, impl=impl), *gradients(q, k, v)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["none", "causal", "segments", "block"])
def test_forward_and_gradients_are_the_oracles(dtype, name):
    q, k, v, _ = operands(dtype)
    mask = masks(q.shape[1])[name]
    assert "ruvjax_attention" in jax.jit(lambda *x: attention(*x, mask)).lower(q, k, v).as_text()
    for ours, expected in zip(both(q, k, v, mask, None), both(q, k, v, mask, "reference"), strict=True):
        assert ours.dtype == q.dtype
        ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
        np.testing.assert_allclose(ours, expected, atol=2 * TOLERANCE[dtype] * max(1, np.abs(expected).max()))


def rotated(q, k, v, rotation, impl):
    """Output and gradients where q and k are rotated by the op."""

    def weighed(q, k, v):
        out = attention(q, k, v, Mask(causal=True), rotation=rotation, impl=impl)
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(q, k, v)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "length"), [(1, 19), (2, 300)])
def test_it_rotates_queries_and_keys(dtype, rows, length):
    q, k, v, _ = operands(dtype, length=length)
    angle = jnp.arange(rows * length * 8, dtype=jnp.float32).reshape(rows, length, 8) * 0.1
    rotation = (jnp.cos(angle), jnp.sin(angle))
    assert "ruvjax_attention" in jax.jit(lambda *x: attention(*x, rotation=rotation)).lower(q, k, v).as_text()
    oracle = jax.tree.leaves(rotated(q, k, v, rotation, "reference"))
    for ours, expected in zip(jax.tree.leaves(rotated(q, k, v, rotation, None)), oracle, strict=True):
        ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
        np.testing.assert_allclose(ours, expected, atol=3 * TOLERANCE[dtype] * max(1, np.abs(expected).max()))
    assert not np.allclose(oracle[1], rotated(q, k, v, (rotation[0], -rotation[1]), "reference")[1][0], atol=0.05)


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "dim", "heads", "kv_heads"), [(1, 8, 1, 1), (33, 64, 6, 1), (300, 32, 2, 2), (531, 40, 2, 1)]
)
def test_odd_sizes(dtype, length, dim, heads, kv_heads):
    q, k, v, _ = operands(dtype, 1, length, heads, kv_heads, dim)
    for ours, expected in zip(both(q, k, v, None, None), both(q, k, v, None, "reference"), strict=True):
        ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
        np.testing.assert_allclose(ours, expected, atol=2 * TOLERANCE[dtype] * max(1, np.abs(expected).max()))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_far_below_zero_leave_what_pads_a_block_out(dtype):
    q, _, v, _ = operands(dtype, 1, 37, 2, 2, 16)
    k = -20 * jnp.ones_like(q)
    ours = both(20 * jnp.ones_like(q), k, v, None, None)
    for x, expected in zip(ours, both(20 * jnp.ones_like(q), k, v, None, "reference"), strict=True):
        x, expected = (np.asarray(y, np.float32) for y in (x, expected))
        np.testing.assert_allclose(x, expected, atol=3 * TOLERANCE[dtype] * max(1, np.abs(expected).max()))


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_see_nothing_are_zero_and_nothing_leaks_from_what_is_masked(dtype):
    q, k, v, _ = operands(dtype)
    segments = jnp.ones((2, 19), jnp.int32).at[0, 15:].set(0)
    spoiled = [x.at[0, 15:].set(jnp.nan) for x in (k, v)]
    clean = attention(q, k, v, Mask(segments=segments))
    assert (clean[0, 15:] == 0).all()
    np.testing.assert_array_equal(attention(q, *spoiled, Mask(segments=segments))[:, :15], clean[:, :15])


@needs_compiler
def test_nothing_leaks_where_xla_splits_the_arrays():
    """The XLA form in the place of the native one: NaN beyond the rows' lengths, forward and backward."""
    split = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    q, k, v, dout = (jax.device_put(x, split) for x in operands("float32"))
    lengths = jax.device_put(jnp.array([15, 11], jnp.int32), split)

    @jax.jit
    def value(q, k, v, dout, lengths):
        out, pull = jax.vjp(lambda *x: attention(*x, Mask(lengths=lengths)), q, k, v)
        return out, pull(dout)

    assert "ruvjax_attention" not in value.lower(q, k, v, dout, lengths).as_text()
    padded = jnp.arange(19)[None, :, None, None] >= lengths[:, None, None, None]
    spoiled = value(q, *(jnp.where(padded, jnp.nan, x) for x in (k, v)), dout, lengths)
    for ours, clean in zip(jax.tree.leaves(spoiled), jax.tree.leaves(value(q, k, v, dout, lengths)), strict=True):
        np.testing.assert_array_equal(ours, clean)


@needs_compiler
def test_it_runs_under_jit_scan_vmap_and_alike_every_time():
    q, k, v, _ = operands("float32")
    first = attention(q, k, v)
    np.testing.assert_array_equal(jax.jit(attention)(q, k, v), first)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, attention(x, k, v)), 0, q[None])
    np.testing.assert_array_equal(scanned[0], first)
    stacked = jax.vmap(attention)(*(jnp.stack([x, 2 * x]) for x in (q, k, v)))
    np.testing.assert_allclose(stacked[0], first, atol=1e-6)
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 19, 4, 16)


def test_switched_off_the_xla_form_runs(monkeypatch):
    q, k, v, _ = operands("float32")
    monkeypatch.setenv("RUVJAX_NATIVE", "0")
    text = jax.jit(lambda q, k, v: attention(q, k, v)).lower(q, k, v).as_text()
    assert "ruvjax_attention" not in text
    np.testing.assert_allclose(attention(q, k, v), attention(q, k, v, impl="reference"), atol=1e-5)
    assert "RUVJAX_NATIVE" in native.unavailable(cpu.SOURCE, cpu.TARGETS)
