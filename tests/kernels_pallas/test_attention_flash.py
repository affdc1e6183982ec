"""The flash bodies: interpreted against the oracle, and lowered for the chips they are for. Never run on one here."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import compat
from kernels_pallas.attention import Mask, attention, blocks, tpu

if compat.missing("tpu"):
    pytest.skip(compat.missing("tpu"), allow_module_level=True)

LENGTH = 300  # three blocks of 128, of which the last is not full
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "heuristic", lambda length: tpu.Tiles(128, 128))
        yield


def draw(batch=2, length=LENGTH, heads=4, kv_heads=2, dim=16, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (batch, length, h, dim)).astype(dtype) for k, h in zip(keys, (heads, 2, 2, heads))]


def segments(batch=2):
    """Runs, one of them in two places, and padding in the first row."""
    runs = np.repeat([[1, 2, 1, 0], [3, 3, 2, 1]], LENGTH // 4, axis=1)
    return jnp.asarray(runs[:batch], jnp.int32)


def masks():
    dense = jax.random.bernoulli(jax.random.key(5), 0.3, (2, LENGTH, LENGTH))
    return {
        "none": None,
        "causal": Mask(causal=True, lengths=jnp.array([0, 205])),
        "block": Mask(block=7, window=40),
        "segments": Mask(segments=segments(), causal=True),
        "diffusion": Mask(diffusion=5, lengths=jnp.array([140, 33])),
        "dense": Mask(dense=dense, window=200),
    }


def both(args, mask, impl):
    """Output and the gradients of q, k and v for a drawn cotangent."""

    def run(q, k, v, weight):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, impl=impl), q, k, v)
        return out, *pull(weight)

    return jax.jit(run)(*args)


def check(ours, expected, tolerance):
    for name, a, b in zip(("out", "q", "k", "v"), ours, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in masks()), ("diffusion", "bfloat16")])
def test_forward_and_gradients_are_the_oracles(name, dtype):
    args, mask = draw(dtype=dtype), masks()[name]
    check(both(args, mask, "interpret"), both(args, mask, "reference"), TOLERANCE[dtype])


def test_a_wrong_mask_is_seen():
    args = draw()
    with pytest.raises(AssertionError):
        check(both(args, Mask(block=7), "interpret"), both(args, Mask(block=8), "reference"), TOLERANCE["float32"])


@pytest.mark.parametrize("impl", ["reference", "xla", "interpret"])
def test_padding_gives_zeros_and_its_nans_do_not_leak(impl, monkeypatch):
    monkeypatch.setenv("RUVJAX_NATIVE", "0")
    q, k, v, weight = draw()
    mask = Mask(segments=segments())
    clean = both((q, k, v, weight), mask, impl)
    padding = np.asarray(segments() == 0)
    assert padding.any()
    for x in clean:
        assert not np.asarray(x)[padding].any()
    spoiled = [jnp.where(jnp.asarray(padding)[:, :, None, None], jnp.nan, x) for x in (q, k, v, weight)]
    for a, b in zip(both(spoiled, mask, impl), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_under_vmap_and_without_a_batch():
    args, mask = draw(length=20), Mask(lengths=jnp.array([20, 3]))

    def gradients(impl):
        return jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, mask, impl=impl) ** 2), argnums=(0, 1, 2))

    stacked = jnp.stack([args[0], 2 * args[0]]), args[1], jnp.stack([args[2], args[2] - 1], axis=1)
    ours, expected = (
        jax.jit(jax.vmap(gradients(impl), in_axes=(0, None, 1)))(*stacked) for impl in ("interpret", "reference")
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    q, k, v, _ = (x[:0] for x in args)
    assert attention(q, k, v, impl="interpret").shape == q.shape


@pytest.mark.parametrize("name", masks())
def test_blocks_that_are_left_out_hold_nothing_and_those_of_positions_are_tight(name):
    mask = masks()[name] or Mask()
    size = 20
    tables = jax.jit(lambda: (blocks.needed(blocks.seen(mask, LENGTH, LENGTH), size, size), mask.allowed(LENGTH)))
    needed, allowed = tables()
    order, visited = jax.jit(blocks.visits)(needed)
    needed = np.asarray(needed)
    allowed = np.ones((1, LENGTH, LENGTH), bool) if allowed is None else np.asarray(allowed)
    count = LENGTH // size
    some = allowed.reshape(-1, count, size, count, size).any(axis=(2, 4))
    assert not (some & ~needed).any()
    if mask.segments is None and mask.dense is None:
        np.testing.assert_array_equal(np.broadcast_to(needed, some.shape), some)
    lists = np.asarray(order).reshape(-1, count)
    for row, one, number in zip(needed.reshape(-1, count), lists, np.asarray(visited).ravel(), strict=True):
        np.testing.assert_array_equal(one[:number], np.flatnonzero(row))


def test_it_lowers_for_a_tpu_and_takes_the_place_of_xla_there(monkeypatch):
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(length=LENGTH, dtype="bfloat16")]

    def text(impl, mask):
        def loss(q, k, v, mask):
            return jnp.sum(attention(q, k, v, mask, impl=impl).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args[:3], mask)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    for mask in masks().values():
        assert text("pallas_tpu", mask).count("tpu_custom_call") == 3
    monkeypatch.setattr("kernels_pallas.attention.platforms", lambda: ("tpu", "cpu"))
    monkeypatch.setattr("kernels_pallas.dispatch.platforms", lambda: ("tpu", "cpu"))
    assert text(None, None).count("tpu_custom_call") == 3
    given = draw(length=20)  # the same program on the CPU beside
    check(both(given, Mask(block=3), None), both(given, Mask(block=3), "reference"), TOLERANCE["float32"])


@settings(max_examples=4)  # each compiles anew
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([8, 24]),
    st.booleans(),
    st.sampled_from(["", "block", "window", "diffusion"]),
    st.sampled_from(["", "lengths", "segments", "dense"]),
    st.integers(1, 9),
)
def test_any_shape_and_mask(batch, length, heads, dim, causal, positions, rows, size):
    length = 2 * length if positions == "diffusion" else length
    random = np.random.default_rng(length)
    drawn = {
        "lengths": random.integers(0, length + 1, batch),
        "segments": random.integers(0, 3, (batch, length)),
        "dense": random.random((batch, length, length)) < 0.5,
    }
    mask = Mask(causal=causal)
    if positions:
        mask = replace(mask, **{positions: size})
    if rows:
        mask = replace(mask, **{rows: jnp.asarray(drawn[rows])})
    keys = jax.random.split(jax.random.key(length), 3)
    q, k, v = (jax.random.normal(key, (batch, length, n, dim)) for key, n in zip(keys, (heads[0], heads[1], heads[1])))

    @jax.jit
    def gradients(q, k, v, mask):
        bodies = [partial(attention, mask=mask, impl=impl) for impl in ("interpret", "xla", "reference")]
        return [jax.vjp(body, q, k, v)[1](q) for body in bodies]

    interpreted, xla, expected = gradients(q, k, v, mask)
    for ours in (interpreted, xla):
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def races_of(function, *operands):
    """Whether the race detector of the TPU interpreter found any, with two cores that share the parallel programs."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    options = compat.mosaic_tpu().InterpretParams(detect_races=True, num_cores_or_threads=2)
    jax.block_until_ready(jax.jit(partial(function, interpret=options))(*operands))
    assert interpreter.races is not None
    return interpreter.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "segments", "diffusion"])
def test_the_kernels_do_not_race_and_one_that_does_is_found(name):
    from jax.experimental import pallas as pl

    (q, k, v, weight), mask = draw(batch=1), masks()[name] or Mask()
    mask = jax.tree.map(lambda x: x[:1], mask)

    def both(q, k, v, weight, interpret):
        out, lse = tpu.forward(q, k, v, mask, 0.25, interpret=interpret)
        return tpu.backward(q, k, v, mask, out, lse, weight, 0.25, interpret=interpret)

    def racing(x, interpret):
        """Every program writes the same block."""

        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...]

        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=compat.mosaic_tpu().CompilerParams(dimension_semantics=("parallel",)),
            interpret=interpret,
        )(x)

    assert races_of(racing, jnp.ones((16, 128)))
    assert not races_of(both, q, k, v, weight)


def test_what_a_tpu_cannot_take_is_refused_by_name():
    q, k, v, _ = draw(length=4)
    with pytest.raises(ValueError, match="not all float32"):
        attention(q.astype(jnp.float16), k, v, impl="interpret")
    wide = jnp.zeros((1, 4, 1, 512))
    with pytest.raises(ValueError, match="512 is above 256"):
        attention(wide, wide, wide, impl="pallas_tpu")
