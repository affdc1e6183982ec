"""The one doorway for matrix multiplies, and the readout to the vocabulary.

A weight is an array or a `QuantizedWeight`, which is a constant. For arrays both carry a custom VJP. XLA:CPU hands a
dot to its fast kernels only where both operands are row-major and the contraction stands last on the left, first or
last on the right; the weight gradient of autodiff contracts the leading dimension and, without a barrier, has its
elementwise producers recomputed inside the dot. The backward rules here write each dot in a form that the fast kernels
take (figures: experiments/bench). Products accumulate in float32 whatever the operands' dtype.
"""

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import contract, contract_leading
from kernels_pallas.quant_matmul import QuantizedWeight, quant_matmul, take


def linear(
    x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"] | QuantizedWeight
) -> Float[Array, "*batch outer"]:
    """`x @ w` in the dtype of `x`, accumulated in float32. The gradient of `w` keeps the dtype of `w`."""
    if isinstance(w, QuantizedWeight):
        return quant_matmul(x, w).astype(x.dtype)
    return _linear(x, w)


@jax.custom_vjp
def _linear(x, w):
    return _forward(x, w)


def _forward(x, w):
    flat = x.reshape(-1, x.shape[-1])
    return contract(flat, w.astype(x.dtype), 1, 0).astype(x.dtype).reshape(*x.shape[:-1], w.shape[1])


def _linear_fwd(x, w):
    return _forward(x, w), (x, w)


def _linear_bwd(saved, dy):
    x, w = saved
    flat = x.reshape(-1, x.shape[-1])
    dy = lax.optimization_barrier(dy.reshape(-1, dy.shape[-1]))
    dx = contract(dy, w.astype(dy.dtype), 1, 1).astype(x.dtype)
    dw = contract_leading(flat, dy).astype(w.dtype)
    return dx.reshape(x.shape), dw


_linear.defvjp(_linear_fwd, _linear_bwd)


def readout(
    hidden: Float[Array, "*batch width"], table: Float[Array, "vocab width"] | QuantizedWeight
) -> Float[Array, "*batch vocab"]:
    """Logits `hidden @ table.T` in float32: the head, tied or not, as a contraction that never transposes the table.

    A quantized table has the shape [width, vocab]: its blocks run along the width.
    """
    if isinstance(table, QuantizedWeight):
        return quant_matmul(hidden, table)
    return _logits(hidden, table)


@jax.custom_vjp
def _logits(hidden, table):
    return _readout(hidden, table)


def _readout(hidden, table):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return contract(flat, table.astype(hidden.dtype), 1, 1).reshape(*hidden.shape[:-1], table.shape[0])


def _readout_fwd(hidden, table):
    return _readout(hidden, table), (hidden, table)


def _readout_bwd(saved, dlogits):
    hidden, table = saved
    flat = hidden.reshape(-1, hidden.shape[-1])
    dlogits = lax.optimization_barrier(dlogits.reshape(-1, dlogits.shape[-1]).astype(hidden.dtype))
    dhidden = contract(dlogits, table.astype(hidden.dtype), 1, 0).astype(hidden.dtype)
    dtable = contract_leading(dlogits, flat).astype(table.dtype)
    return dhidden.reshape(hidden.shape), dtable


_logits.defvjp(_readout_fwd, _readout_bwd)


def embed(
    tokens: Int[Array, "*batch"], table: Float[Array, "vocab width"] | QuantizedWeight
) -> Float[Array, "*batch width"]:
    """Rows of `table` at `tokens`; of a quantized one, of shape [width, vocab] as for `readout`, in float32."""
    return take(table, tokens) if isinstance(table, QuantizedWeight) else table[tokens]
