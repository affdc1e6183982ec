"""Weights with an update beside them, against the dense weight that both make."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quant_matmul import quantize
from ruvjax.core.adapted import Adapted, Lora, Selected, column_norms, delta, low_rank, merged
from ruvjax.core.linear import linear
from ruvjax.core.mixing import mix
from ruvjax.errors import ConfigError

INNER, OUTER, RANK, SCALE = 32, 24, 3, 0.7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def update(dora=False, seed=0):
    magnitude = jnp.abs(normal(seed + 3, OUTER)) + 1.0 if dora else None
    return Lora(normal(seed + 1, INNER, RANK), normal(seed + 2, RANK, OUTER), jnp.float32(SCALE), magnitude)


def dense(weight, lora):
    """In float64: the adapted weight, and the lengths of its columns before DoRA sets them."""
    w, a, b = (np.asarray(x, np.float64) for x in (weight, lora.a, lora.b))
    total = w + float(lora.scale) * a @ b
    lengths = np.sqrt((total**2).sum(0))
    if lora.magnitude is not None:
        total = total * np.asarray(lora.magnitude, np.float64) / lengths
    return total, lengths


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["array", "Q8_0", "Q4_0"])
def test_the_product_is_that_with_the_dense_weight(dora, kind):
    plain, lora = normal(0, INNER, OUTER), update(dora)
    weight = plain if kind == "array" else quantize(plain, kind)
    values = plain if kind == "array" else weight.dequantize()
    x = normal(9, 2, 5, INNER)
    expected = np.asarray(x, np.float64) @ dense(values, lora)[0]
    found = linear(x, Adapted(weight, lora))
    # The quantized product rounds x to 8 bits: its own error is what `linear` without an update has.
    own = 0 if kind == "array" else np.abs(linear(x, weight) - np.asarray(x, np.float64) @ np.asarray(values)).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 + 3 * own)
    assert found.dtype == x.dtype


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_the_dense_weight(dora):
    """In float64; DoRA's lengths are held constant, as the paper and PEFT have it."""
    with jax.enable_x64(True):
        weight, lora, x, dy = (
            jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)
            for tree in (normal(0, INNER, OUTER), update(dora), normal(9, 7, INNER), normal(8, 7, OUTER))
        )
        lengths = jnp.asarray(dense(weight, lora)[1])

        def plain(weight, lora, x):
            total = weight + lora.scale * (lora.a @ lora.b)
            total = total if lora.magnitude is None else total * (lora.magnitude / lengths)[None, :]
            return jnp.sum((x @ total) * dy)

        def ours(weight, lora, x):
            return jnp.sum(linear(x, Adapted(weight, lora)) * dy)

        found, expected = (jax.grad(f, argnums=(0, 1, 2))(weight, lora, x) for f in (ours, plain))
        assert float(found[1].scale) == 0.0  # a constant
        expected = (expected[0], dataclasses.replace(expected[1], scale=found[1].scale), expected[2])
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def flops(function, *operands):
    return jax.jit(function).lower(*operands).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("dora", [False, True])
def test_the_weights_gradient_is_not_computed_where_the_update_alone_is_trained(dora):
    rows, size = 64, 128
    weight, x = normal(0, size, size), normal(1, rows, size)
    lora = Lora(normal(2, size, 2), normal(3, 2, size), jnp.float32(1), jnp.ones(size) if dora else None)

    def loss(lora, weight):
        return jnp.sum(jnp.square(linear(jnp.tanh(linear(x, Adapted(weight, lora))), Adapted(weight, lora))))

    product = 2 * rows * size * size
    alone, both = flops(jax.grad(loss), lora, weight), flops(jax.grad(loss, argnums=(0, 1)), lora, weight)
    # Two products forward and one backward; with the weight's gradient two more.
    assert both - alone > 1.9 * product
    assert alone < 3.9 * product


@pytest.mark.parametrize("dora", [False, True])
def test_scan_over_stacked_layers_and_the_layers_one_by_one_agree(dora):
    one = [
        Adapted(normal(i, INNER, INNER), dataclasses.replace(update(seed=i), b=normal(i, RANK, INNER))) for i in (0, 1)
    ]
    if dora:
        one = [w.replace(update=w.update.replace(magnitude=normal(50 + i, INNER))) for i, w in enumerate(one)]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *one)
    x = normal(9, 4, INNER) / 10
    scanned, _ = jax.lax.scan(lambda x, w: (jnp.tanh(linear(x, w)), None), x, stacked)
    for w in one:
        x = jnp.tanh(linear(x, w))
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_position", [False, True])
def test_selected_updates_are_each_rows_own(per_position):
    weight, x = normal(0, INNER, OUTER), normal(9, 3, 4, INNER)
    bank = [update(seed=10 * i) for i in range(4)]
    a, b = jnp.stack([lora.a for lora in bank]), jnp.stack([lora.b for lora in bank])
    random = np.random.default_rng(1)
    shape = (3, 4, 2) if per_position else (3, 2)
    ids = random.integers(-1, 4, shape).astype(np.int32)
    weights = random.normal(size=shape).astype(np.float32)
    chosen = Selected(a, b, jnp.asarray(ids), jnp.asarray(weights))
    found = linear(x, Adapted(weight, chosen))
    for row in range(3):
        for place in range(4):
            at = (row, place) if per_position else (row,)
            total = np.asarray(weight, np.float64)
            for number, factor in zip(ids[at], weights[at]):
                if number >= 0:
                    total = total + factor * np.asarray(a[number], np.float64) @ np.asarray(b[number], np.float64)
            np.testing.assert_allclose(found[row, place], np.asarray(x[row, place]) @ total, atol=2e-4)


def test_updates_chosen_for_other_rows_are_refused():
    chosen = Selected(normal(0, 4, INNER, 2), normal(1, 4, 2, OUTER), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1)))
    for shape in ((3, INNER), (2, 4, INNER)):
        with pytest.raises(ConfigError, match=r"ids of shape \(3, 1\)"):
            linear(normal(2, *shape), Adapted(normal(3, INNER, OUTER), chosen))
    with pytest.raises(ConfigError, match="row by row"):
        mix(normal(2, INNER, 3), Adapted(normal(3, INNER, OUTER), chosen))
    with pytest.raises(ConfigError, match="DoRA"):
        low_rank(normal(2, 1, INNER), update(dora=True))


@pytest.mark.parametrize("dora", [False, True])
def test_mixing_from_the_left_takes_an_adapted_weight_too(dora):
    weight, lora, x = normal(0, INNER, OUTER), update(dora), normal(9, INNER, 2, 5)
    expected = np.einsum("io,ibw->obw", dense(weight, lora)[0], np.asarray(x, np.float64))
    np.testing.assert_allclose(mix(x, Adapted(weight, lora)), expected, atol=1e-4)


def test_a_layer_of_scale_zero_is_not_adapted_whatever_its_magnitude():
    """To the bit, and its magnitude gets no gradient: so the layers of a stack may differ in being adapted at all."""
    weight, x = normal(0, INNER, OUTER), normal(9, 4, INNER)
    lora = dataclasses.replace(update(dora=True), scale=jnp.float32(0))
    np.testing.assert_array_equal(linear(x, Adapted(weight, lora)), linear(x, weight))
    gradient = jax.grad(lambda m: jnp.sum(linear(x, Adapted(weight, lora.replace(magnitude=m)))))(lora.magnitude)
    np.testing.assert_array_equal(gradient, np.zeros(OUTER))


def test_a_column_of_zeros_gives_numbers():
    """adaLN's modulation starts at zero; DoRA divides by the length of its columns."""
    weight = jnp.zeros((INNER, OUTER))
    lora = dataclasses.replace(update(dora=True), b=jnp.zeros((RANK, OUTER)), magnitude=column_norms(weight))
    gradient = jax.grad(lambda lora: jnp.sum(linear(normal(9, 4, INNER), Adapted(weight, lora))))(lora)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("dora", [False, True])
def test_delta_and_merged_are_the_dense_definition_in_float64(dora):
    with jax.enable_x64(True):
        weight, lora = (
            jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)
            for tree in (normal(0, INNER, OUTER), update(dora))
        )
        np.testing.assert_allclose(merged(weight, lora), dense(weight, lora)[0], rtol=1e-12)
        np.testing.assert_allclose(delta(lora), float(lora.scale) * np.asarray(lora.a) @ np.asarray(lora.b), rtol=1e-10)


def test_in_bfloat16_the_result_stays_bfloat16():
    weight, lora = normal(0, INNER, OUTER), update(dora=True)
    x = normal(9, 4, INNER).astype(jnp.bfloat16)
    found = linear(x, Adapted(weight, lora))
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ dense(weight, lora)[0]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.03 * np.abs(expected).max())
