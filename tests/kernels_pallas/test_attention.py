import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import Mask, attention


def draw(batch, length, heads, kv_heads, dim, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, heads, dim), (batch, length, kv_heads, dim), (batch, length, kv_heads, dim)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def plain(q, k, v, allowed):
    """float64, one query at a time: the definition, written without any of the code under test."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, length, heads, dim = q.shape
    for b in range(batch):
        for h in range(heads):
            source = h // (heads // k.shape[2])
            for i in range(length):
                keep = [j for j in range(length) if allowed(b, i, j)]
                if keep:
                    s = k[b, keep, source] @ q[b, i, h] / np.sqrt(dim)
                    p = np.exp(s - s.max())
                    out[b, i, h] = p / p.sum() @ v[b, keep, source]
    return out


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3]], np.int32)
DENSE = np.random.default_rng(0).random((2, 7, 7)) < 0.5
CASES = {
    "bidirectional": (Mask(), lambda b, i, j: True),
    "causal": (Mask(causal=True), lambda b, i, j: j <= i),
    "block": (Mask(block=3), lambda b, i, j: j // 3 <= i // 3),
    "window": (Mask(causal=True, window=2), lambda b, i, j: j <= i and i - j < 2),
    "segments": (
        Mask(segments=jnp.asarray(SEGMENTS)),
        lambda b, i, j: SEGMENTS[b, i] == SEGMENTS[b, j] and SEGMENTS[b, i] != 0,
    ),
    "causal segments": (
        Mask(causal=True, segments=jnp.asarray(SEGMENTS)),
        lambda b, i, j: SEGMENTS[b, i] == SEGMENTS[b, j] and SEGMENTS[b, i] != 0 and j <= i,
    ),
    "lengths": (Mask(lengths=jnp.array([5, 0])), lambda b, i, j: max(i, j) < (5, 0)[b]),
    "dense": (Mask(dense=jnp.asarray(DENSE)), lambda b, i, j: DENSE[b, i, j]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_forward_is_the_definition(case, impl, heads, kv_heads):
    mask, allowed = CASES[case]
    q, k, v = draw(2, 7, heads, kv_heads, 8)
    np.testing.assert_allclose(attention(q, k, v, mask, impl=impl), plain(q, k, v, allowed), atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients_agree_with_autodiff_of_the_reference(case, dtype, tolerance):
    mask, _ = CASES[case]
    args = draw(2, 7, 4, 2, 8, dtype)
    out = jax.random.normal(jax.random.key(9), args[0].shape)

    def loss(impl):
        return lambda q, k, v: jnp.sum(attention(q, k, v, mask, impl=impl).astype(jnp.float32) * out)

    ours, reference = (jax.grad(loss(impl), argnums=(0, 1, 2))(*args) for impl in ("xla", "reference"))
    for a, b in zip(ours, reference):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance * 4)


def test_padding_gives_zeros_and_stays_out_of_the_gradient():
    q, k, v = draw(2, 7, 2, 2, 8)
    mask = Mask(segments=jnp.asarray(SEGMENTS))
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    assert not np.asarray(out[0, 5:]).any()
    for gradient in pull(jnp.ones_like(out)):
        assert np.isfinite(gradient).all() and not np.asarray(gradient[0, 5:]).any()


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_block_diffusion_is_the_definition(impl):
    """Rows of a noisy and a clean text of 5 tokens, the second text 4 long, in blocks of 2, seen within 3 positions."""

    def allowed(b, i, j):
        (query, key), noisy, seen_noisy = (i % 5, j % 5), i < 5, j < 5
        if max(query, key) >= (5, 4)[b] or abs(query - key) >= 3:
            return False
        if seen_noisy:
            return noisy and query // 2 == key // 2
        return key // 2 < query // 2 or (key // 2 == query // 2 and not noisy)

    q, k, v = draw(2, 10, 4, 2, 8)
    mask = Mask(diffusion=2, window=3, lengths=jnp.array([5, 4]))
    np.testing.assert_allclose(attention(q, k, v, mask, impl=impl), plain(q, k, v, allowed), atol=2e-6)
    with pytest.raises(ValueError, match="a row of 9"):
        attention(q[:, 1:], k[:, 1:], v[:, 1:], Mask(diffusion=2), impl=impl)


@settings(max_examples=12)  # each shape compiles anew
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([(1, 1), (2, 1), (6, 3)]),
    st.sampled_from([2, 6]),
    st.integers(0, 4),
    st.booleans(),
)
def test_any_shape_agrees_with_the_reference(batch, length, heads, dim, block, causal):
    q, k, v = draw(batch, length, *heads, dim, seed=length)
    mask = Mask(causal=causal, block=block)
    ours, reference = jax.jit(lambda *args: [attention(*args, mask, impl=impl) for impl in ("xla", "reference")])(
        q, k, v
    )
    np.testing.assert_allclose(ours, reference, atol=3e-6)


def test_empty_batch_and_vmap():
    q, k, v = draw(0, 4, 2, 2, 8)
    assert attention(q, k, v).shape == (0, 4, 2, 8)
    args = [jnp.stack([a, a + 1]) for a in draw(2, 4, 2, 2, 8)]
    mapped = jax.vmap(attention)(*args)
    np.testing.assert_allclose(mapped[1], attention(*(a[1] for a in args)), atol=1e-6)


def test_heads_that_do_not_share_evenly_are_refused():
    q, k, v = draw(1, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="not a multiple"):
        attention(q, k, v)
