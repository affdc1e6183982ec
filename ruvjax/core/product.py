"""`x @ w` with backward rules in the form that XLA:CPU's fast kernels take; see `ruvjax.core.linear`."""

import jax
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.layout import contract, contract_leading


@jax.custom_vjp
def product(x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"]) -> Float[Array, "*batch outer"]:
    """`x @ w` in the dtype of `x`, accumulated in float32. The gradient of `w` keeps the dtype of `w`."""
    return _forward(x, w)


def _forward(x, w):
    flat = x.reshape(-1, x.shape[-1])
    return contract(flat, w.astype(x.dtype), 1, 0).astype(x.dtype).reshape(*x.shape[:-1], w.shape[1])


def _product_fwd(x, w):
    return _forward(x, w), (x, w)


def _product_bwd(saved, dy):
    x, w = saved
    flat = x.reshape(-1, x.shape[-1])
    dy = lax.optimization_barrier(dy.reshape(-1, dy.shape[-1]))
    dx = contract(dy, w.astype(dy.dtype), 1, 1).astype(x.dtype)
    dw = contract_leading(flat, dy).astype(w.dtype)
    return dx.reshape(x.shape), dw


product.defvjp(_product_fwd, _product_bwd)
