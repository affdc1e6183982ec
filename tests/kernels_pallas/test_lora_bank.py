"""Selected low-rank updates against their definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.dispatch import ImplError
from kernels_pallas.lora_bank import compact, lora_bank, xla

BATCH, LENGTH, INNER, OUTER, RANK = 2, 5, 8, 6, 3


def operands(bank, k, per_position, seed=0):
    random = np.random.default_rng(seed)
    x, a, b = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((BATCH, LENGTH, INNER), (bank, INNER, RANK), (bank, RANK, OUTER))
    )
    shape = (BATCH, LENGTH, k) if per_position else (BATCH, k)
    ids = random.integers(-1, bank, shape).astype(np.int32)  # -1 selects nothing
    return tuple(jnp.asarray(value) for value in (x, a, b, ids, random.normal(size=shape).astype(np.float32)))


def plain(x, a, b, ids, weights, scale=1.0):
    x, a, b, ids, weights = (np.asarray(value, value.dtype) for value in (x, a, b, ids, weights))
    out = np.zeros((BATCH, LENGTH, OUTER))
    for row in range(BATCH):
        for place in range(LENGTH):
            chosen = (ids[row], weights[row]) if ids.ndim == 2 else (ids[row, place], weights[row, place])
            for number, weight in zip(*chosen):
                if number >= 0:
                    out[row, place] += scale * weight * (x[row, place].astype(np.float64) @ a[number] @ b[number])
    return out


@pytest.mark.parametrize("impl", [None, "reference", "interpret"])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize(("bank", "k"), [(1, 1), (7, 3)])
def test_it_is_the_sum_of_the_selected_updates(impl, per_position, bank, k):
    x, a, b, ids, weights = operands(bank, k, per_position)
    if impl == "interpret" and not per_position:
        with pytest.raises(ImplError, match="ordinary products"):
            lora_bank(x, a, b, ids, weights, impl=impl)
        return
    found = jax.jit(lambda *operands: lora_bank(*operands, scale=0.5, impl=impl))(x, a, b, ids, weights)
    np.testing.assert_allclose(found, plain(x, a, b, ids, weights, 0.5), atol=1e-5)


@pytest.mark.parametrize("per_position", [False, True])
def test_both_xla_forms_agree_and_so_do_their_gradients(per_position):
    x, a, b, ids, weights = operands(4, 2, per_position)
    rows = (BATCH, LENGTH) if not per_position else (BATCH * LENGTH, 1)
    flat, one = x.reshape(*rows, INNER), jnp.maximum(ids, 0).reshape(rows[0], -1)
    factors = jnp.where(ids >= 0, weights, 0).reshape(rows[0], -1)

    def loss(form):
        return lambda x, a, b, w: jnp.sum(jnp.sin(form(x, a, b, one, w)))

    dense, gathered = (jax.grad(loss(f), argnums=(0, 1, 2, 3))(flat, a, b, factors) for f in (xla.dense, xla.gathered))
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5), dense, gathered)


def test_compact_selects_the_same_updates_from_a_smaller_bank():
    x, a, b, ids, weights = operands(50, 2, True)
    selected, local = compact(ids, 50)
    assert selected.size == ids.size
    found = lora_bank(x, a[selected], b[selected], local, weights)
    np.testing.assert_allclose(found, lora_bank(x, a, b, ids, weights), atol=1e-5)


@settings(max_examples=8)  # each shape compiles anew
@given(*[st.integers(0, 3)] * 2, st.integers(1, 9), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_any_shape_agrees_with_the_reference(batch, length, bank, rank, k, per_position):
    random = np.random.default_rng(batch + 10 * length + 100 * bank)
    shapes = ((batch, length, 5), (bank, 5, rank), (bank, rank, 7))
    x, a, b = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    shape = (batch, length, k) if per_position else (batch, k)
    ids = jnp.asarray(random.integers(-2, bank + 2, shape), jnp.int32)  # some outside of the bank
    weights = jnp.asarray(random.normal(size=shape), jnp.float32)
    found, expected = jax.jit(lambda *o: [lora_bank(*o, impl=impl) for impl in (None, "reference")])(
        x, a, b, ids, weights
    )
    assert found.shape == (batch, length, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_selected_and_nothing_given():
    x, a, b, ids, weights = operands(3, 2, False)
    assert (lora_bank(x, a, b, jnp.full_like(ids, -1), weights) == 0).all()
    assert lora_bank(x[:0], a, b, ids[:0], weights[:0]).shape == (0, LENGTH, OUTER)
    assert (lora_bank(x, a[:0], b[:0], ids, weights) == 0).all()
