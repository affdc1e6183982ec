"""Products with quantized weights, every body against float64 of the dequantized weights.

The encoders have tests of their own; here a weight is what `dequantize` says, and `dequantize` what the formats decode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import native
from kernels_pallas.dispatch import ImplError
from kernels_pallas.quant_matmul import KINDS, cpu, formats, quant_matmul, quantize, take, to_blocks, tpu, xla

reason = native.unavailable(cpu.SOURCE, cpu.TARGETS)
needs_compiler = pytest.mark.skipif(bool(reason), reason=f"no native product: {reason}")
# 24 blocks a row: one and a half of the sixteen that the CPU kernel takes at a time, and whole ones of Q4_K.
INNER, OUTER = 768, 131
# Unit roundoffs.
FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8 / 2


@pytest.fixture(scope="module")
def weights():
    random = np.random.default_rng(0)
    return {kind: quantize(random.normal(size=(INNER, OUTER)).astype(np.float32), kind) for kind in KINDS}


def draw(rows, inner=INNER, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, inner)), dtype)


def exact(x, weight):
    """The product in float64, and the same of absolute values, in which rounding errors are counted."""
    x, w = np.asarray(x, np.float64), np.asarray(weight.dequantize(), np.float64)
    return x @ w, np.abs(x) @ np.abs(w)


def run(x, weight, impl=None):
    return jax.jit(lambda x, weight: quant_matmul(x, weight, impl))(x, weight)


def distance(found, expected):
    """The largest error, by the largest entry."""
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.fixture
def without_compiler(monkeypatch):
    """The XLA form itself: neither the environment nor a chunk size is part of what jax caches by."""
    monkeypatch.setenv("RUVJAX_NATIVE", "0")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_what_its_blocks_decode_to(weights, kind):
    weight = weights[kind]
    decoded = formats.decode(kind, to_blocks(weight))
    np.testing.assert_array_equal(weight.dequantize(), decoded.T)
    np.testing.assert_array_equal(take(weight, jnp.array([[3, 130]])), decoded[None, [3, 130]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [None, "reference", "interpret"])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_product_is_that_of_the_dequantized_weight(weights, kind, impl, rows):
    x = draw(rows)
    found = run(x, weights[kind], impl)
    assert found.shape == (rows, OUTER) and found.dtype == jnp.float32
    assert distance(found, exact(x, weights[kind])[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [None, "reference", "interpret"])
def test_no_rows(weights, kind, impl):
    found, pull = jax.vjp(lambda x: quant_matmul(x, weights[kind], impl), jnp.zeros((2, 0, INNER), jnp.bfloat16))
    assert found.shape == (2, 0, OUTER) and found.dtype == jnp.float32
    assert pull(found)[0].shape == (2, 0, INNER)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_many_rows(weights, kind, impl):
    """On a CPU a dot with a weight that is dequantized once."""
    x = draw(xla.MANY_ROWS + 1)
    assert distance(run(x, weights[kind], impl), exact(x, weights[kind])[0]) < 1e-5
    with pytest.raises(ImplError, match="97 rows are more than 32"):
        quant_matmul(x, weights[kind], "interpret")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("impl", "rows"), [(None, 3), (None, 31), ("reference", 3), ("interpret", 3)])
def test_bfloat16_rows_round_a_weight_once_at_most(weights, kind, impl, rows):
    """Codes of the TPU kernel are exact in bfloat16; elsewhere a product scale * code may be rounded to it."""
    x, weight = draw(rows, dtype="bfloat16"), weights[kind]
    found = run(x, weight, impl)
    expected, _ = exact(x, weight)
    assert found.dtype == jnp.float32
    if impl is not None:
        assert distance(found, expected) < 1e-5
    # A code of Q4_K stands for scale * code, which its minimum makes smaller again.
    largest = np.abs(np.asarray(weight.dequantize(), np.float64)) + np.repeat(lowest(weight), 32, axis=0)
    bound = BFLOAT16 * np.abs(np.asarray(x, np.float64)) @ largest
    assert (np.abs(np.asarray(found) - expected) <= bound + 1e-5 * np.abs(expected).max()).all()


def lowest(weight):
    """What is subtracted from the weights of each block, [inner / 32, outer]."""
    if weight.mins is None:
        return np.zeros((INNER // 32, OUTER))
    steps = np.repeat(np.asarray(weight.steps, np.float64)[..., 1], 8, axis=-1)
    return (steps * np.asarray(weight.mins, np.float64)).T


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 15])
def test_the_cpu_kernel_rounds_as_float32_sums_do(weights, kind, rows):
    """x is not quantized on the way. The control quantizes it to eight bits, as integer products would."""
    x, weight = draw(rows), weights[kind]
    assert "ruvjax_quant_matmul" in jax.jit(quant_matmul).lower(x, weight).as_text()
    found = np.asarray(run(x, weight), np.float64)
    expected, _ = exact(x, weight)
    # Decoding rounds twice (scale * code, less the offset); the longest sum runs over a quarter of a row, then lanes.
    offset = 8 * np.abs(np.asarray(weight.scales, np.float64)).T if kind == "Q4_0" else lowest(weight)
    terms = np.abs(np.asarray(weight.dequantize(), np.float64)) + 2 * np.repeat(offset, 32, axis=0)
    bound = (INNER / 4 + 16 + 4) * FLOAT32 * np.abs(np.asarray(x, np.float64)) @ terms
    assert (np.abs(found - expected) <= bound).all()
    blocks = np.asarray(x, np.float64).reshape(rows, -1, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    narrow = (np.round(blocks / step) * step).reshape(rows, -1)
    assert (np.abs(exact(narrow, weight)[0] - expected) > bound).any()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_at_any_place_in_any_batch(weights, kind):
    x, weight = draw(15), weights[kind]
    whole = run(x, weight)
    for some in (slice(0, 1), slice(3, 5), slice(7, 14)):
        np.testing.assert_array_equal(run(x[some], weight), whole[some])
    assert not np.array_equal(run(x[:1], weight), whole[1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_cpu_kernel_the_weight_is_taken_in_chunks(weights, kind, without_compiler, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 50 * INNER)  # three chunks, the last of which does 19 columns again
    x, weight = draw(7), weights[kind]
    assert "ruvjax_quant_matmul" not in jax.jit(quant_matmul).lower(x, weight).as_text()
    assert distance(run(x, weight), exact(x, weight)[0]) < 1e-5
    dy = draw(7, OUTER, seed=2)
    pulled = jax.jit(lambda x, dy: jax.vjp(lambda x: quant_matmul(x, weight), x)[1](dy)[0])(x, dy)
    expected = np.asarray(dy, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    assert distance(pulled, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [(None, "float32", 1e-5), (None, "bfloat16", 1e-2), ("reference", "float32", 1e-5), ("interpret", "float32", 1e-5)],
)
def test_the_gradient_of_x_is_the_transposed_product(weights, kind, impl, dtype, tolerance):
    x, weight, dy = draw(5, dtype=dtype), weights[kind], draw(5, OUTER, seed=2)
    pulled = jax.jit(lambda x, dy: jax.vjp(lambda x: quant_matmul(x, weight, impl), x)[1](dy)[0])(x, dy)
    assert pulled.dtype == x.dtype
    expected = np.asarray(dy, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    assert distance(pulled, expected) < tolerance


def test_a_weight_is_constant(weights):
    gradient = jax.grad(lambda w: jnp.sum(quant_matmul(draw(2), w)), allow_int=True)(weights["Q8_0"])
    assert not np.asarray(gradient.scales).any()


@pytest.mark.parametrize("impl", [None, "reference", "interpret"])
def test_vmap_over_rows_weights_and_both(impl):
    random = np.random.default_rng(3)
    stacked = quantize(random.normal(size=(2, 256, 128)).astype(np.float32), "Q4_K")
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in (0, 1)]
    x = jnp.stack([draw(3, 256), draw(3, 256, seed=4)])

    def mapped(axes, *operands):
        return jax.jit(jax.vmap(lambda x, weight: quant_matmul(x, weight, impl), in_axes=axes))(*operands)

    for axes, operands, pairs in (
        ((0, None), (x, each[0]), [(x[0], each[0]), (x[1], each[0])]),
        ((None, 0), (x[0], stacked), [(x[0], each[0]), (x[0], each[1])]),
        ((0, 0), (x, stacked), [(x[0], each[0]), (x[1], each[1])]),
    ):
        for found, pair in zip(mapped(axes, *operands), pairs, strict=True):
            assert distance(found, exact(*pair)[0]) < 1e-5


def test_leading_axes_scan_over_layers_and_float64(weights):
    x, weight = draw(6), weights["Q4_0"]
    np.testing.assert_array_equal(
        quant_matmul(x.reshape(2, 3, INNER), weight), quant_matmul(x, weight).reshape(2, 3, -1)
    )
    square = quantize(np.random.default_rng(5).normal(size=(2, 64, 64)).astype(np.float32) / 8, "Q8_0")
    x = draw(2, 64)
    found, _ = jax.lax.scan(lambda x, layer: (quant_matmul(x, layer), None), x, square)
    wide = np.asarray(square.dequantize(), np.float64)
    assert distance(found, np.asarray(x, np.float64) @ wide[0] @ wide[1]) < 1e-5
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(6).normal(size=(2, INNER)))
        found = quant_matmul(x, weight)
        assert found.dtype == jnp.float64 and distance(found, exact(x, weight)[0]) < 1e-13


def test_what_cannot_be_multiplied_is_refused(weights):
    weight = weights["Q8_0"]
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\)"):
        quant_matmul(draw(2, 32), weight)
    with pytest.raises(ImplError, match="smaller than one tile"):
        quant_matmul(draw(2, 64), quantize(np.ones((64, 64), np.float32), "Q8_0"), "interpret")
    with pytest.raises(ImplError, match="not known"):
        quant_matmul(draw(2), weight, "cuda")


@settings(max_examples=6)  # each shape compiles anew
@given(st.sampled_from(KINDS), st.integers(0, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_any_shape_agrees_with_float64(kind, rows, blocks, outer, seed):
    inner = blocks * formats.FORMATS[kind].weights
    weight = quantize(np.random.default_rng(seed).normal(size=(inner, outer)).astype(np.float32), kind)
    x = draw(rows, inner, seed=seed + 1)
    expected, size = exact(x, weight)
    for found in jax.jit(lambda x: [quant_matmul(x, weight, impl) for impl in (None, "reference")])(x):
        assert found.shape == (rows, outer)
        assert (np.abs(np.asarray(found) - expected) <= 1e-5 * size + 1e-5).all()


@pytest.mark.pallas
@settings(max_examples=3)
@given(st.sampled_from(KINDS), st.integers(1, 32), st.integers(1, 5), st.integers(128, 300))
def test_any_shape_agrees_on_the_tpu_body(kind, rows, sets, outer):
    inner = 256 * sets
    weight = quantize(np.random.default_rng(outer).normal(size=(inner, outer)).astype(np.float32), kind)
    x = draw(rows, inner, seed=rows)
    tiles = tpu.Tiles(outer=128, codes=256)  # small ones, so that tiles reach past both ends of the weight
    found = jax.jit(lambda x: tpu.multiply(x, weight, tiles=tiles, interpret=True))(x)
    assert distance(found, exact(x, weight)[0]) < 1e-5
