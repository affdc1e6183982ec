"""Multi-head, grouped-query and multi-query attention under a `Mask`."""

import math
from functools import partial

import jax

from kernels_pallas.attention import cpu, reference, xla
from kernels_pallas.attention.mask import Mask
from kernels_pallas.attention.rotation import rotate
from kernels_pallas.dispatch import Body, dispatch, log_fallback
from kernels_pallas.native import switched_off

__all__ = ["IMPLEMENTATIONS", "Mask", "attention", "rotate"]

IMPLEMENTATIONS = ("reference", "xla")


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
    implementation (None: the XLA form). Raises ValueError where the heads do not share evenly,
    `kernels_pallas.dispatch.ImplError` for an `impl` that is not there.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if q.size == 0:
        return q
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    bodies = {
        "reference": Body(partial(reference.attention, scale=scale)),
        "xla": Body(partial(xla.attention, scale=scale)),
    }
    mask = Mask() if mask is None else mask
    if impl in (None, "xla") and _runs_native(q, k, v, scale):
        return cpu.attention(q, k, v, mask.allowed(q.shape[1]), rotation, scale)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return dispatch("attention", impl, bodies, q, k, v, mask)


def _runs_native(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> bool:
    """Whether the native equal of the XLA body takes its place: on a CPU that has a compiler."""
    if jax.default_backend() != "cpu" or switched_off():
        return False
    reason = cpu.unsupported(q, k, v, scale)
    if reason:
        log_fallback("attention", "the native CPU kernel", reason)
    return not reason
