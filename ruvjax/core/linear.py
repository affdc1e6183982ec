"""The one doorway for matrix multiplies, and the readout to the vocabulary.

A weight is an array, a `QuantizedWeight`, which is a constant, or, for `linear`, either of them with a low-rank update
beside it (`core.adapted`). For arrays both carry a custom VJP. XLA:CPU hands a
dot to its fast kernels only where both operands are row-major and the contraction stands last on the left, first or
last on the right; the weight gradient of autodiff contracts the leading dimension and, without a barrier, has its
elementwise producers recomputed inside the dot. The backward rules here write each dot in a form that the fast kernels
take (figures: experiments/bench). Products accumulate in float32 whatever the operands' dtype.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import contract, contract_leading
from kernels_pallas.quant_matmul import QuantizedWeight, quant_matmul, take
from ruvjax.core.adapted import Adapted, Selected, column_factors, low_rank
from ruvjax.core.product import product


def linear(
    x: Float[Array, "*batch inner"], w: Float[Array, "inner outer"] | QuantizedWeight | Adapted
) -> Float[Array, "*batch outer"]:
    """`x @ w` in the dtype of `x`, accumulated in float32. The gradient of `w` keeps the dtype of `w`.

    Raises ConfigError where adapters are chosen for other rows than those of `x`.
    """
    if isinstance(w, Adapted):
        return _adapted(x, w)
    if isinstance(w, QuantizedWeight):
        return quant_matmul(x, w).astype(x.dtype)
    return product(x, w)


def _adapted(x, w: Adapted):
    update, weight = w.update, w.weight
    if isinstance(update, Selected) or update.magnitude is None:
        return linear(x, weight) + low_rank(x, update)
    y = linear(x, weight) + low_rank(x, replace(update, magnitude=None))
    factors = jnp.expand_dims(column_factors(weight, update), tuple(range(y.ndim - 1)))
    return (y * factors).astype(x.dtype)


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
