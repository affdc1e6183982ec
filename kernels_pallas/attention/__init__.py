"""Multi-head, grouped-query and multi-query attention under a `Mask`."""

import math
from functools import partial

import jax
from jax import lax

from kernels_pallas.attention import cpu, gpu, reference, tpu, xla
from kernels_pallas.attention.fold import over_batch
from kernels_pallas.attention.mask import Mask
from kernels_pallas.attention.rotation import rotate
from kernels_pallas.dispatch import PLATFORM_BODIES, Body, dispatch, log_fallback, platforms
from kernels_pallas.native import switched_off

__all__ = ["Mask", "attention", "rotate"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None = None,
    *,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v.

    q is [batch, length, heads, dim]; k and v are [batch, length, kv_heads, dim] with heads a multiple of kv_heads. The
    result has the shape and dtype of q; a query that may attend to nothing yields zeros. `rotation`, constant tables of
    cos and sin, rotates q and k first as `rotate` does. `scale` is 1/sqrt(dim) by default. `impl` names an
    implementation ("pallas_gpu" and "pallas_tpu" are the flash kernels, "interpret" the TPU's on any device); None
    takes the best of the platform: cuDNN or a flash kernel, on a CPU C++, else the XLA form.
    Raises ValueError where the heads do not share evenly, `kernels_pallas.dispatch.ImplError` for an `impl` that is
    not there or cannot take the operands.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if q.size == 0:
        return q
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = Mask() if mask is None else mask
    if impl in (None, "xla") and _runs_native(q, k, v, scale):
        return cpu.attention(q, k, v, mask.allowed(q.shape[1]), rotation, scale)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    if impl is None and "cuda" in platforms() and not gpu.cudnn_unsupported(q, k, v, mask):
        # The XLA form is checkpointed, so that no program for a GPU saves what only a CPU would need.
        default = jax.checkpoint(partial(xla.attention, scale=scale))
        return lax.platform_dependent(q, k, v, mask, cuda=partial(gpu.cudnn, scale=scale), default=default)
    flash = _flash_bodies("forward", q, k, v, mask, scale)
    chosen = [PLATFORM_BODIES.get(platform) for platform in platforms()] if impl is None else [impl]
    if any(name in flash and name != "xla" and not flash[name].unsupported for name in chosen):
        return _flash(impl, scale, q, k, v, mask)
    # Without a kernel to be chosen at lowering, the form that keeps probabilities is faster.
    bodies = {
        "reference": Body(partial(reference.attention, scale=scale)),
        "xla": Body(partial(xla.attention, scale=scale)),
    }
    return dispatch("attention", impl, flash | bodies, q, k, v, mask)


def _flash_bodies(name, q, k, v, mask, scale):
    """The bodies of "forward" or "backward" that share what the forward pass saves."""
    on_tpu = tpu.unsupported(q, k, v)
    pallas_tpu = getattr(tpu, name)
    return {
        "xla": Body(partial(getattr(xla, name), scale=scale)),
        "pallas_gpu": Body(over_batch(partial(getattr(gpu, name), scale=scale)), gpu.unsupported(q, k, v, mask)),
        "pallas_tpu": Body(over_batch(partial(pallas_tpu, scale=scale)), on_tpu),
        "interpret": Body(over_batch(partial(pallas_tpu, scale=scale, interpret=True)), on_tpu),
    }


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(impl, scale, q, k, v, mask):
    return _flash_fwd(impl, scale, q, k, v, mask)[0]


def _flash_fwd(impl, scale, q, k, v, mask):
    out, lse = dispatch("attention", impl, _flash_bodies("forward", q, k, v, mask, scale), q, k, v, mask)
    return out, (q, k, v, mask, out, lse)


def _flash_bwd(impl, scale, saved, dout):
    q, k, v, mask, *_ = saved
    bodies = _flash_bodies("backward", q, k, v, mask, scale)
    return *dispatch("attention", impl, bodies, *saved, dout), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _runs_native(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> bool:
    """Whether the native equal of the XLA body takes its place: on a CPU that has a compiler."""
    if platforms() != ("cpu",) or switched_off():
        return False
    reason = cpu.unsupported(q, k, v, scale)
    if reason:
        log_fallback("attention", "the native CPU kernel", reason)
    return not reason
