"""The GPU bodies of the unmask ops: lowered for an H200 that is not there, and interpreted where jax can (0.11)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import compat
from kernels_pallas.unmask import draw_noise, gpu, group_size, masked_cross_entropy, reference, unmask

if compat.missing("gpu"):
    pytest.skip(compat.missing("gpu"), allow_module_level=True)

H200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))


def lowered(function, *operands):
    with jax.sharding.use_abstract_mesh(H200):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(40, 1000), (100, 32768)])
def test_every_body_lowers_for_an_h200(dtype, rows, vocabulary):
    logits = jax.ShapeDtypeStruct((rows, vocabulary), dtype)
    targets = jax.ShapeDtypeStruct((rows,), jnp.int32)
    noise = jax.eval_shape(lambda: draw_noise(jax.random.key(0), (rows,), vocabulary))

    def loss(logits, targets):
        return masked_cross_entropy(logits, targets, vocabulary - 1, impl="pallas_gpu").sum()

    def draw(logits, noise, top_k=0):
        floor = logits.max(-1) - 3.0
        return unmask(logits, noise, floor=floor, temperature=0.7, top_k=top_k, impl="pallas_gpu")

    for function, other in ((loss, targets), (jax.grad(loss), targets), (draw, noise), (partial(draw, top_k=5), noise)):
        assert "mosaic_gpu" in lowered(function, logits, other)
    assert "mosaic_gpu" not in lowered(lambda x: unmask(x, temperature=0.0, impl="xla"), logits)


def test_what_the_copies_cannot_take_is_refused():
    assert "no multiple of 16 bytes" in gpu.unsupported(jnp.zeros((2, 50257)), 256)
    assert "fewer than 16 bytes" in gpu.unsupported(jnp.zeros((2, 4)), 2)
    assert "float16" in gpu.unsupported(jnp.zeros((2, 64), jnp.float16), 8)
    assert gpu.unsupported(jnp.zeros((2, 64)), 8) == ""


@pytest.fixture
def interpret():
    if not compat.HAS_GPU_INTERPRETER:
        pytest.skip("jax before 0.11 has no interpreter of Mosaic GPU kernels")
    return compat.mosaic_gpu().InterpretGPUParams(detect_races=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype", "options"),
    [
        (5, jnp.float32, {"temperature": 0.7, "top_k": 9}),
        (70, jnp.bfloat16, {"temperature": 1.0, "top_k": 0}),
        (5, jnp.float32, {"temperature": 1.3, "top_k": 0, "floor": -1.0}),
    ],
)
def test_the_interpreted_draw_is_the_oracles(interpret, rows, dtype, options):
    """72 tokens in groups of 8: nine, so that the last run is short; then 88 in groups of 16, the last one short."""
    options = dict(options)
    level = options.pop("floor", None)
    for vocabulary, group, tiles in ((72, 8, gpu.Tiles(8, 2)), (88, 16, gpu.Tiles(8, 3))):
        logits = (3 * jax.random.normal(jax.random.key(1), (rows, vocabulary))).astype(dtype)
        logits = logits.at[0].set(-jnp.inf)
        floor = None if level is None else jnp.full(rows, level)
        noise = jax.random.gumbel(jax.random.key(2), (rows, -(-vocabulary // group) + group))
        ours = jax.jit(partial(gpu.unmask, **options, group=group, tiles=tiles, interpret=interpret))
        theirs = jax.jit(partial(reference.unmask, **options, group=group))
        for one, other in zip(ours(logits, noise, floor), theirs(logits, noise, floor), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_interpreted_loss_and_its_gradient_are_the_oracles(interpret):
    for rows, vocabulary, exclude in ((5, 88, 87), (70, 72, 3)):
        logits = 3 * jax.random.normal(jax.random.key(1), (rows, vocabulary))
        targets = jax.random.randint(jax.random.key(2), (rows,), -1, vocabulary)
        cotangent = jnp.cos(jnp.arange(rows, dtype=jnp.float32))
        options = {"exclude": exclude, "group": group_size(vocabulary), "interpret": interpret}
        nll, lse = jax.jit(partial(gpu.cross_entropy, **options))(logits, targets)
        gradient = jax.jit(partial(gpu.cross_entropy_backward, **options))(logits, targets, lse, cotangent)
        expected, pull = jax.vjp(lambda x, t=targets, e=exclude: reference.masked_cross_entropy(x, t, e), logits)
        np.testing.assert_allclose(nll, expected, atol=1e-5)
        np.testing.assert_allclose(gradient, pull(cotangent)[0], atol=1e-5)
        assert np.abs(gradient).max() > 0.01
