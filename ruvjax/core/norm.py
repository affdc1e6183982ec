"""Normalisation, computed in float32 and returned in the input's dtype."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch width"], scale: Float[Array, "width"], eps: float) -> Float[Array, "*batch width"]:
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019, arXiv:1910.07467).

    The backward rule sums the gradient of `scale` in float32; autodiff's sum in bfloat16 takes twice as long on a CPU.
    """
    return _rms_norm(x, scale, eps)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x, scale, eps: float):
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x, scale, eps: float):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * _along_last(scale, x), (x, scale, inverse)


def _rms_norm_bwd(eps: float, saved, dy):
    x, scale, inverse = saved
    normal, dwide = x.astype(inverse.dtype) * inverse, dy.astype(inverse.dtype)
    dnormal = dwide * _along_last(scale, inverse)
    dx = inverse * (dnormal - normal * jnp.mean(dnormal * normal, axis=-1, keepdims=True))
    dscale = jnp.sum((dwide * normal).reshape(-1, x.shape[-1]), axis=0)
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def layer_norm(
    x: Float[Array, "*batch width"], scale: Float[Array, "width"], eps: float
) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(var + eps) * scale, without a bias (the norm of MDLM's transformer)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * inverse).astype(x.dtype) * _along_last(scale, x)


def _along_last(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rms(x: jax.Array, axis: int, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) along `axis`, without a weight, computed in float32.

    Its backward rule reads the result, which the layer that follows keeps anyway, and not `x`.
    """
    return _rms_fwd(x, axis, eps)[0]


def _rms_fwd(x, axis: int, eps: float):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=axis, keepdims=True) + eps)
    y = (wide * inverse).astype(x.dtype)
    return y, (y, inverse)


def _rms_bwd(axis: int, eps: float, saved, dy):
    y, inverse = saved
    wide, dwide = y.astype(inverse.dtype), dy.astype(inverse.dtype)
    inner = jnp.mean(wide * dwide, axis=axis, keepdims=True)
    return (((dwide - wide * inner) * inverse).astype(y.dtype),)


rms.defvjp(_rms_fwd, _rms_bwd)
