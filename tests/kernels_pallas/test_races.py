"""Kernel bodies under jax's race detectors, which watch every read, write and copy of an interpreted kernel.

Memory that nobody wrote is NaN there. The detectors print what they find.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import compat
from kernels_pallas.kv_attention import append, empty_pages, empty_tiers, gpu, kv_attention, migrate
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import KINDS, quant_matmul, quantize
from kernels_pallas.selective_scan import selective_scan

pytestmark = pytest.mark.slow
needs_tpu_bodies = pytest.mark.skipif(bool(compat.missing("tpu")), reason=compat.missing("tpu"))
needs_gpu_interpreter = pytest.mark.skipif(
    bool(compat.missing("gpu")) or not compat.HAS_GPU_INTERPRETER,
    reason="jax interprets Mosaic GPU kernels on a CPU from 0.11 on",
)


@pytest.fixture
def watched(capfd):
    """Run a function under a platform's race detector: its result, and whether a race was found."""

    def run(platform, function, *operands):
        if platform == "tpu":
            pltpu = compat.mosaic_tpu()
            mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
        else:
            plgpu = compat.mosaic_gpu()
            mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
        capfd.readouterr()
        with mode:
            found = jax.block_until_ready(jax.jit(lambda *operands: function(*operands))(*operands))
        return found, "RACE DETECTED" in capfd.readouterr().out

    return run


def check(watched, platform, function, *operands, tolerance=1e-5):
    """`function(impl, *operands)` has no race and gives what the reference gives."""
    found, raced = watched(platform, partial(function, f"pallas_{platform}"), *operands)
    assert not raced
    for ours, expected in zip(jax.tree.leaves(found), jax.tree.leaves(function("reference", *operands)), strict=True):
        scale = max(1, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(ours, expected, atol=tolerance * scale)


@needs_tpu_bodies
@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_is_not_waited_for_is_a_race(watched, waits):
    """The control: without it, no race found says nothing."""
    from jax.experimental import pallas as pl

    pltpu = compat.mosaic_tpu()

    def kernel(x_ref, out_ref, buffer, arrived):
        copy = pltpu.make_async_copy(x_ref, buffer, arrived)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = buffer[...]
        if not waits:
            copy.wait()

    def copied(x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        )(x)

    assert watched("tpu", copied, jnp.ones((8, 128)))[1] is not waits


def scan_operands(length, width, state=8):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (1, length, width))
    delta = jax.nn.softplus(jax.random.normal(keys[1], x.shape) - 2)
    a = -jnp.exp(jax.random.normal(keys[2], (width, state)))
    b, c = (jax.random.normal(key, (1, length, state)) for key in keys[3:5])
    return x, delta, a, b, c, jnp.ones(width), jax.random.normal(keys[5], (1, width, state))


def scan(impl, *operands):
    return selective_scan(*operands[:6], initial=operands[6], impl=impl)


def scan_gradients(impl, *operands):
    def loss(*operands):
        y, final = scan(impl, *operands)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final))

    return jax.grad(loss, argnums=tuple(range(7)))(*operands)


@needs_tpu_bodies
@pytest.mark.parametrize("function", [scan, scan_gradients])
def test_the_tpu_scan(watched, function):
    check(watched, "tpu", function, *scan_operands(40, 128), tolerance=2e-5)


@needs_gpu_interpreter
@pytest.mark.parametrize("function", [scan, scan_gradients])
def test_the_gpu_scan(watched, function):
    check(watched, "gpu", function, *scan_operands(40, 64), tolerance=2e-5)


def cached(impl, q, pages, tiers):
    return kv_attention(q, tiers, pages, impl=impl)


def cache(bits, dim):
    pages = empty_pages(1, page=128, tail_slots=3, store_slots=2)
    tiers = empty_tiers(pages, 1, dim, dtype=jnp.float32, key_bits=bits, value_bits=bits)
    k, v = (jax.random.normal(jax.random.key(i), (1, 300, 1, dim)) for i in (0, 1))
    return jax.random.normal(jax.random.key(2), (1, 1, 2, dim)), *migrate(*append(pages, tiers, k, v), keep=100)


@needs_tpu_bodies
@pytest.mark.parametrize("bits", [8, 4])
def test_the_tpu_paged_attention(watched, bits):
    check(watched, "tpu", cached, *cache(bits, 128))


@needs_gpu_interpreter
@pytest.mark.parametrize("bits", [8, 4])
def test_the_gpu_paged_attention(watched, bits, monkeypatch):
    monkeypatch.setattr(gpu, "PROGRAMS", 1)  # all pages of a tier in one run, through two buffers
    check(watched, "gpu", cached, *cache(bits, 64))


@needs_tpu_bodies
def test_the_tpu_bank(watched):
    random = np.random.default_rng(0)
    x, a, b = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((1, 9, 128), (5, 128, 8), (5, 8, 128)))
    ids = jnp.asarray(random.integers(-1, 5, (1, 9, 3)), jnp.int32)
    check(watched, "tpu", lambda impl, x, a, b: lora_bank(x, a, b, ids, impl=impl), x, a, b)


@needs_tpu_bodies
@pytest.mark.parametrize("kind", KINDS)
def test_the_tpu_quantized_product(watched, kind):
    random = np.random.default_rng(0)
    weight = quantize(random.normal(size=(512, 300)).astype(np.float32), kind)
    x = jnp.asarray(random.normal(size=(3, 512)), jnp.float32)
    check(watched, "tpu", lambda impl, x: quant_matmul(x, weight, impl), x)
