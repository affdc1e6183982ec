"""Every TPU kernel compiled for v5e and v6e by Google's compiler, which needs no chip: with the extra `tpu` installed.

Compiled is not run: no result is compared here.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas.attention import Mask, attention
from kernels_pallas.kv_attention import append, empty_pages, empty_tiers, kv_attention, migrate
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import KINDS, quant_matmul, quantize
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.unmask import draw_noise, unmask

pytestmark = [
    pytest.mark.slow,
    pytest.mark.pallas,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: install the extra `tpu`"
    ),
]
CHIPS = ("v5e:2x2", "v6e:2x2")


@functools.cache
def chip(name: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]


def compiled(function, operands, name: str) -> str:
    place = SingleDeviceSharding(chip(name))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands)
    return jax.jit(function).lower(*shapes).compile().as_text()


def summed(function):
    """The gradients of a sum over what `function` returns."""

    def total(*operands):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(function(*operands)))

    return lambda *operands: jax.grad(total, argnums=tuple(range(len(operands))))(*operands)


def of_attention(dtype):
    masks = {
        "none": Mask(),
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=100),
        "block": Mask(block=32),
        "segments": Mask(segments=jnp.repeat(jnp.arange(4), 128)[None].repeat(2, axis=0), causal=True),
        "lengths": Mask(lengths=jnp.array([300, 512], jnp.int32)),
    }
    q, k = jnp.zeros((2, 512, 4, 128), dtype), jnp.zeros((2, 512, 2, 128), dtype)
    for mask in masks.values():
        attend = functools.partial(attention, mask=mask, impl="pallas_tpu")
        yield attend, (q, k, k)
        yield summed(attend), (q, k, k)


def of_selective_scan(dtype):
    x, narrow = jnp.zeros((1, 300, 256), dtype), jnp.zeros((1, 300, 16), dtype)
    operands = (x, x, jnp.zeros((256, 16)), narrow, narrow, jnp.zeros(256), jnp.zeros((1, 256, 16)))

    def scan(*o):
        return selective_scan(*o[:6], initial=o[6], impl="pallas_tpu")

    yield scan, operands
    yield summed(scan), operands


def of_unmask(dtype):
    operands = (jnp.zeros((16, 5000), dtype), draw_noise(jax.random.key(0), (16,), 5000))
    for top_k in (0, 50):
        yield functools.partial(unmask, temperature=0.7, top_k=top_k, impl="pallas_tpu"), operands


def of_kv_attention(dtype):
    for bits, more in ((0, {}), (8, {}), (4, {}), (8, {"rotated": True})):
        pages = empty_pages(2, page=64, tail_slots=4, store_slots=4 if bits else 0)
        kinds = {"key_bits": bits, "value_bits": bits, **more} if bits else {}
        tiers = empty_tiers(pages, 2, 128, dtype=jnp.dtype(dtype), **kinds)
        pages, tiers = append(pages, tiers, jnp.ones((2, 150, 2, 128)), jnp.ones((2, 150, 2, 128)))
        pages, tiers = migrate(pages, tiers, keep=32)
        read = functools.partial(kv_attention, impl="pallas_tpu")
        yield read, (jnp.zeros((2, 1, 8, 128), dtype), tiers, pages)


def of_lora_bank(dtype):
    shapes = ((2, 8, 128), (64, 128, 8), (64, 8, 256))
    operands = (*(jnp.zeros(shape, dtype) for shape in shapes), jnp.zeros((2, 8, 3), jnp.int32))
    yield functools.partial(lora_bank, impl="pallas_tpu"), operands


def of_quant_matmul(dtype):
    for kind in KINDS:
        weight = quantize(np.ones((768, 256), np.float32), kind)
        yield functools.partial(quant_matmul, impl="pallas_tpu"), (jnp.zeros((8, 768), dtype), weight)


OPS = (of_attention, of_selective_scan, of_unmask, of_kv_attention, of_lora_bank, of_quant_matmul)


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op, dtype, name):
    for function, operands in op(dtype):
        assert "tpu_custom_call" in compiled(function, operands, name)


def test_a_kernel_that_asks_for_too_much_memory_does_not_compile():
    from jax.experimental import pallas as pl

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    x = jnp.zeros((8192, 8192))  # 256 MiB in one block
    with pytest.raises(Exception, match="(?i)vmem|memory"):
        compiled(pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype)), (x,), CHIPS[0])
