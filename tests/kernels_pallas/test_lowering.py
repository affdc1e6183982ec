"""Kernel bodies lowered for devices that are not there, and GPU bodies interpreted.

Lowering shows that a body is a program of its platform, no more: it is no compilation, and no result is compared.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import compat
from kernels_pallas.kv_attention import append, empty_pages, empty_tiers, kv_attention, migrate
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import KINDS, quant_matmul, quantize
from kernels_pallas.selective_scan import selective_scan

KERNEL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
needs_tpu_bodies = pytest.mark.skipif(bool(compat.missing("tpu")), reason=compat.missing("tpu"))
needs_gpu_bodies = pytest.mark.skipif(bool(compat.missing("gpu")), reason=compat.missing("gpu"))
needs_gpu_interpreter = pytest.mark.skipif(
    bool(compat.missing("gpu")) or not compat.HAS_GPU_INTERPRETER,
    reason="jax interprets Mosaic GPU kernels on a CPU from 0.11 on",
)


def h200():
    """Lower as for an H200, which jax asks for its number of cores; older versions take that from the kernel alone."""
    if not compat.HAS_GPU_INTERPRETER:
        return contextlib.nullcontext()
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(function, operands, platform):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    with h200() if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def scan_operands(length, width=64, state=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (1, length, width)).astype(dtype)
    delta = jax.nn.softplus(jax.random.normal(keys[1], x.shape) - 2).astype(dtype)
    a = -jnp.exp(jax.random.normal(keys[2], (width, state)))
    b, c = (jax.random.normal(key, (1, length, state)).astype(dtype) for key in keys[3:5])
    return x, delta, a, b, c, jnp.ones(width), jax.random.normal(keys[5], (1, width, state))


def scan(impl, reset=None):
    return lambda *o: selective_scan(*o[:6], initial=o[6], reset=reset, impl=impl)


def scan_gradients(impl, reset=None):
    def loss(*operands):
        y, final = scan(impl, reset)(*operands)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(jnp.cos(final))

    return jax.grad(loss, argnums=tuple(range(7)))


@needs_gpu_bodies
@pytest.mark.parametrize(
    ("dtype", "resets", "state"), [("float32", False, 8), ("bfloat16", True, 16), ("float32", True, 64)]
)
def test_the_scan_lowers_for_a_gpu(dtype, resets, state):
    operands, reset = scan_operands(70, 128, state, dtype), jnp.zeros((1, 70), bool) if resets else None
    for function in (scan, scan_gradients):
        assert KERNEL["cuda"] in lowered(function("pallas_gpu", reset), operands, "cuda")
        assert KERNEL["cuda"] not in lowered(function("xla", reset), operands, "cuda")


@needs_tpu_bodies
@pytest.mark.parametrize(("dtype", "resets"), [("float32", False), ("bfloat16", True)])
def test_the_scan_lowers_for_a_tpu(dtype, resets):
    operands, reset = scan_operands(70, 200, 16, dtype), jnp.zeros((1, 70), bool) if resets else None
    for function in (scan, scan_gradients):
        assert KERNEL["tpu"] in lowered(function("pallas_tpu", reset), operands, "tpu")
        assert KERNEL["tpu"] not in lowered(function("xla", reset), operands, "tpu")


@needs_gpu_interpreter
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_interpreted_gpu_scan_is_the_oracle_and_so_are_its_gradients(dtype):
    """Two chunks, the second of which is not full, and a reset within each."""
    operands, reset = scan_operands(40, dtype=dtype), jnp.zeros((1, 40), bool).at[0, jnp.array([7, 33])].set(True)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for function in (scan, scan_gradients):
        with compat.mosaic_gpu().force_gpu_interpret_mode():
            found = jax.jit(function("pallas_gpu", reset))(*operands)
        for ours, expected in zip(found, jax.jit(function("reference", reset))(*operands), strict=True):
            ours, expected = (np.asarray(x, np.float32) for x in (ours, expected))
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(ours, expected, atol=tolerance * max(1, np.abs(expected).max()))
    wrong = jax.jit(scan("reference"))(*operands)[0]
    assert np.abs(np.asarray(wrong - jax.jit(scan("reference", reset))(*operands)[0], np.float32)).max() > 0.1


def cache(bits, dim=128, page=64, dtype=jnp.bfloat16, length=150, kv_heads=2, **kinds):
    """Two sequences with `length` tokens each, whole pages of which are in the store where it has `bits`."""
    pages = empty_pages(2, page=page, tail_slots=4, store_slots=4 if bits else 0)
    kinds |= {"key_bits": bits, "value_bits": bits} if bits else {}
    tiers = empty_tiers(pages, kv_heads, dim, dtype=dtype, **kinds)
    k, v = (jax.random.normal(jax.random.key(i), (2, length, kv_heads, dim)) for i in (0, 1))
    pages, tiers = append(pages, tiers, k, v)
    return migrate(pages, tiers, keep=page // 2)


@needs_tpu_bodies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bits", "kinds"),
    [
        (0, {}),
        (8, {}),
        (4, {}),
        (4, {"key_scales": "token", "value_scales": "channel"}),
        (8, {"rotated": True}),
    ],
)
def test_paged_attention_lowers_for_a_tpu(dtype, bits, kinds):
    pages, tiers = cache(bits, dtype=dtype, **kinds)
    operands = (jnp.zeros((2, 1, 8, 128), dtype), tiers, pages)
    assert KERNEL["tpu"] in lowered(lambda *o: kv_attention(*o, impl="pallas_tpu"), operands, "tpu")
    assert KERNEL["tpu"] not in lowered(lambda *o: kv_attention(*o, impl="xla"), operands, "tpu")


@needs_tpu_bodies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bank_lowers_for_a_tpu(dtype):
    operands = (
        jnp.zeros((2, 5, 128), dtype),
        jnp.zeros((200, 128, 8), dtype),
        jnp.zeros((200, 8, 256), dtype),
        jnp.zeros((2, 5, 3), jnp.int32),
    )
    assert KERNEL["tpu"] in lowered(lambda *o: lora_bank(*o, impl="pallas_tpu"), operands, "tpu")
    assert KERNEL["tpu"] not in lowered(lambda *o: lora_bank(*o, impl="xla"), operands, "tpu")


@needs_tpu_bodies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_products_lower_for_a_tpu(dtype, kind):
    operands = (jnp.zeros((5, 768), dtype), quantize(np.ones((768, 300), np.float32), kind))
    assert KERNEL["tpu"] in lowered(lambda *o: quant_matmul(*o, impl="pallas_tpu"), operands, "tpu")
    assert KERNEL["tpu"] not in lowered(lambda *o: quant_matmul(*o, impl="xla"), operands, "tpu")
