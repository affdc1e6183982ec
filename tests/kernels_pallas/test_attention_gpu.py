"""The CUDA bodies: lowered for a GPU, and interpreted where jax can (from 0.11 on). Never run on one here."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import compat
from kernels_pallas.attention import Mask, attention, gpu

if compat.missing("gpu"):
    pytest.skip(compat.missing("gpu"), allow_module_level=True)

LENGTH = 100  # two blocks, of which the second is not full
interpreted = pytest.mark.skipif(not compat.HAS_GPU_INTERPRETER, reason="this jax cannot interpret Mosaic GPU kernels")


def draw(batch=1, length=LENGTH, heads=2, kv_heads=1, dim=16, dtype="bfloat16"):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [jax.random.normal(k, (batch, length, h, dim)).astype(dtype) for k, h in zip(keys, sizes)]


def masks():
    runs = np.repeat([[1, 2, 1, 0]], LENGTH // 4, axis=1)
    return {
        "segments": Mask(segments=jnp.asarray(runs, jnp.int32), causal=True),
        "diffusion": Mask(diffusion=5, lengths=jnp.array([33])),
        "none": Mask(),
        "block": Mask(block=7, window=40, lengths=jnp.array([90])),
    }


def on_cuda():
    """From 0.11 on, jax lowers these kernels only for a device that it knows."""
    if not compat.HAS_GPU_INTERPRETER:
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu")))


def text(mask, impl, dim):
    def gradient(q, k, v, weight, mask):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, impl=impl), q, k, v)
        return out, pull(weight)

    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(dim=dim)]
    with on_cuda():
        return jax.jit(gradient).trace(*args, mask).lower(lowering_platforms=("cuda",)).as_text()


@interpreted
@pytest.mark.parametrize(
    "name",
    [name if name in ("segments", "diffusion") else pytest.param(name, marks=pytest.mark.slow) for name in masks()],
)
@pytest.mark.parametrize("races", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_and_gradients_are_the_oracles(name, races):
    options = compat.mosaic_gpu().InterpretGPUParams(detect_races=races)
    (q, k, v, weight), mask = draw(), masks()[name]

    @jax.jit
    def both(q, k, v, weight, mask):
        out, lse = gpu.forward(q, k, v, mask, 0.25, interpret=options)
        ours = out, *gpu.backward(q, k, v, mask, out, lse, weight, 0.25, interpret=options)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, scale=0.25, impl="reference"), q, k, v)
        return ours, (out, *pull(weight))

    found = jax.block_until_ready(both(q, k, v, weight, mask))
    if races:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        assert not gpu_callbacks.get_races().races_found
    for title, a, b in zip(("out", "q", "k", "v"), *found, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=1e-2 * max(1, np.abs(b).max()), err_msg=title)


@pytest.mark.parametrize(("name", "dim"), [("segments", 128), ("none", 40)])
def test_the_kernels_lower_for_cuda(name, dim):
    assert text(masks()[name], "pallas_gpu", dim).count("custom_call @mosaic_gpu") == 3


def test_cudnn_takes_what_it_can_and_the_kernels_the_rest(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    for module in ("kernels_pallas.attention", "kernels_pallas.dispatch"):
        monkeypatch.setattr(f"{module}.platforms", lambda: ("cuda", "cpu"))
    for mask in (Mask(causal=True, window=20), Mask(lengths=jnp.array([33]))):
        program = text(mask, None, 64)
        assert "fmha" in program and "mosaic_gpu" not in program
        q, k, v, _ = draw(length=9)
        ours, expected = (attention(q, k, v, mask, impl=impl) for impl in (None, "reference"))  # on the CPU beside
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=1e-2)
    for mask in (masks()["diffusion"], Mask(window=4)):
        program = text(mask, None, 64)
        assert "fmha" not in program and program.count("custom_call @mosaic_gpu") == 3
    dense = text(Mask(dense=jnp.ones((1, LENGTH, LENGTH), bool)), None, 64)
    assert "fmha" not in dense and "mosaic_gpu" not in dense


def test_what_the_kernels_cannot_take_is_refused_by_name():
    q, k, v, _ = draw(length=4)
    with pytest.raises(ValueError, match="not all float16"):
        attention(q.astype(jnp.float32), k, v, impl="pallas_gpu")
    with pytest.raises(ValueError, match="dense"):
        attention(q, k, v, Mask(dense=jnp.ones((1, 4, 4), bool)), impl="pallas_gpu")
    wide = jnp.zeros((1, 4, 1, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match="256 is above 128"):
        attention(wide, wide, wide, impl="pallas_gpu")


@pytest.fixture
def device(monkeypatch):
    """`device(capability, runtime)`: pretend that the process holds such a GPU and CUDA runtime."""

    def hold(capability, runtime=13000):
        monkeypatch.setattr(compat, "compute_capability", lambda: capability)
        monkeypatch.setattr(compat, "cuda_runtime", lambda: runtime)

    return hold


@pytest.mark.parametrize(("capability", "refused"), [("7.5", True), ("8.0", False), ("10.0", False)])
def test_cudnn_is_refused_before_ampere(device, capability, refused):
    device(capability)
    reason = gpu.cudnn_unsupported(*draw()[:3], Mask(causal=True))
    assert (f"this device has {capability}" in reason) == refused == bool(reason)


@pytest.mark.parametrize(
    ("runtime", "mask", "length", "refused"),
    [
        (12080, Mask(causal=True), 64, True),
        (12090, Mask(block=4), 64, True),
        (12090, Mask(), 100, True),  # what fills the last block up is masked
        (12090, Mask(), 64, False),
        (12060, Mask(causal=True), 64, False),
        (12091, Mask(causal=True), 64, False),
        (13000, Mask(causal=True), 64, False),
    ],
)
def test_masked_kernels_are_refused_where_cuda_compiles_them_wrongly(device, runtime, mask, length, refused):
    device("9.0", runtime)
    reason = gpu.unsupported(*draw(length=length)[:3], mask)
    assert ("CUDA 12.8.0 to 12.9.0" in reason) == refused == bool(reason)


def test_fewer_queries_than_keys_are_refused():
    q, k = jnp.zeros((1, 64, 2, 64), jnp.bfloat16), jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    assert "64 queries and 256 keys" in gpu.unsupported(q, k, k, Mask())
