"""Every body of the unmask ops against the oracle, on shapes and numbers that go wrong. None ever ran on a TPU here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels_pallas import compat
from kernels_pallas.dispatch import ImplError
from kernels_pallas.unmask import draw_noise, group_size, masked_cross_entropy, tpu, unmask

if compat.missing("tpu"):
    pytest.skip(compat.missing("tpu"), allow_module_level=True)

BODIES = ["xla", "interpret"]
judged = jax.jit(unmask, static_argnames=("temperature", "top_k", "impl"))


def operands(rows, vocabulary, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    logits = (3 * jax.random.normal(keys[0], (rows, vocabulary))).astype(dtype)
    return logits, draw_noise(keys[1], (rows,), vocabulary), jax.random.randint(keys[2], (rows,), -1, vocabulary)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 19),
    vocabulary=st.integers(2, 333),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    top_k=st.sampled_from([0, 1, 7]),
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_all_bodies_agree_on_any_shape(rows, vocabulary, dtype, top_k, temperature):
    logits, noise, targets = operands(rows, vocabulary, dtype)
    expected = judged(logits, noise, temperature=temperature, top_k=top_k, impl="reference")

    def loss(logits, impl):
        return masked_cross_entropy(logits, targets, vocabulary // 2, impl=impl).sum()

    value, gradient = jax.value_and_grad(partial(loss, impl="reference"))(logits)
    for impl in BODIES:
        drawn = judged(logits, noise, temperature=temperature, top_k=top_k, impl=impl)
        np.testing.assert_array_equal(drawn.token, expected.token)
        for one, other in zip(drawn[1:], expected[1:]):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        ours = jax.jit(jax.value_and_grad(partial(loss, impl=impl)))(logits)
        np.testing.assert_allclose(ours[0], value, rtol=1e-5)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (ours[1], gradient)), atol=tolerance)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("impl", ["reference", *BODIES])
def test_rows_of_nothing_and_rows_with_a_nan(impl, top_k):
    """37 tokens in groups of 8: the last group is short, and what lies past its end must never come out."""
    logits, noise, _ = operands(200, 37, jnp.float32)
    logits = logits.at[:100].set(-jnp.inf).at[100:110, 20].set(jnp.nan)
    drawn = judged(logits, noise, top_k=top_k, impl=impl)
    token = np.asarray(drawn.token)
    assert token.min() >= 0 and token.max() < 37
    assert len(set(token[:100])) > 20, "nothing sets the tokens of an empty row apart"
    np.testing.assert_allclose(drawn.entropy[:100], np.log(37), rtol=1e-5)
    np.testing.assert_allclose(drawn.confidence[:100], 1 / 37, rtol=1e-5)
    alone = judged(logits[110:], noise[110:], top_k=top_k, impl=impl)
    for one, other in zip(drawn, alone):
        np.testing.assert_allclose(one[110:], other, rtol=1e-6, atol=1e-6, err_msg="a NaN reaches the rows around it")


def test_no_rows():
    noise = draw_noise(jax.random.key(0), (0,), 37)
    for impl in ("reference", "xla", None):
        for top_k in (0, 3):
            drawn = judged(jnp.zeros((0, 37)), noise, top_k=top_k, impl=impl)
            assert [x.shape for x in drawn] == [(0,)] * 5
    with pytest.raises(ImplError, match="there are no logits"):
        unmask(jnp.zeros((0, 37)), noise, impl="interpret")


@pytest.mark.parametrize("impl", ["reference", *BODIES])
def test_vmap_is_a_longer_batch(impl):
    logits, noise, targets = operands(12, 40, jnp.float32)

    def both(logits, noise, targets):
        loss, pull = jax.vjp(lambda x: masked_cross_entropy(x, targets, impl=impl), logits)
        return unmask(logits, noise, temperature=0.8, top_k=4, impl=impl), loss, pull(jnp.cos(loss))[0]

    split = [x.reshape(3, 4, *x.shape[1:]) for x in (logits, noise, targets)]
    whole = jax.jit(both)(logits, noise, targets)
    mapped = jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), jax.jit(jax.vmap(both))(*split))
    np.testing.assert_array_equal(mapped[0].token, whole[0].token)
    for one, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(whole)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vocabulary", [37, 50257])
def test_every_body_lowers_for_a_tpu(dtype, vocabulary):
    logits = jax.ShapeDtypeStruct((20, vocabulary), dtype)
    targets = jax.ShapeDtypeStruct((20,), jnp.int32)
    noise = jax.eval_shape(lambda: draw_noise(jax.random.key(0), (20,), vocabulary))

    def loss(logits, targets):
        return masked_cross_entropy(logits, targets, 3, impl="pallas_tpu").sum()

    def draw(logits, noise, top_k=0):
        return unmask(logits, noise, temperature=0.7, top_k=top_k, impl="pallas_tpu")

    for function, other in ((loss, targets), (jax.grad(loss), targets), (draw, noise), (partial(draw, top_k=5), noise)):
        program = jax.jit(function).trace(logits, other).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in program


@pytest.mark.slow
def test_no_two_programs_of_a_tpu_touch_the_same_memory(monkeypatch, capfd):
    """The interpreter prints what races it finds; the control is a kernel whose programs all write one block."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

    def racing(x):
        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...] + pl.program_id(0).astype(jnp.float32)

        spec = pl.BlockSpec((8, 128), lambda i: (0, 0))
        semantics = pltpu.CompilerParams(dimension_semantics=("parallel",))
        shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[spec],
            out_specs=spec,
            out_shape=shape,
            compiler_params=semantics,
            interpret=params,
        )(x)

    logits, noise, targets = operands(20, 700, jnp.float32)
    group = group_size(700)
    found = tpu.unmask(logits, noise, None, 0.7, group, 5, interpret=params)
    lse = tpu.cross_entropy(logits, targets, 3, group, interpret=params)[1]
    tiles = tpu.Tiles(rows=8, columns=128)
    tpu.cross_entropy_backward(logits, targets, lse, lse, 3, tiles=tiles, interpret=params)
    np.testing.assert_array_equal(found[0], judged(logits, noise, temperature=0.7, top_k=5, impl="reference").token)
    assert "RACE" not in capfd.readouterr().out
    jax.block_until_ready(racing(jnp.zeros((8, 128))))
    assert "RACE" in capfd.readouterr().out
