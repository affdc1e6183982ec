"""The oracle: dequantize, then multiply in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.quant_matmul.weight import QuantizedWeight


def multiply(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """x [rows, inner] @ weight -> float32 [rows, outer] (float64 for float64 x)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(dtype), weight.dequantize().astype(dtype), precision=lax.Precision.HIGHEST)


def pull(dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
    """The gradient of x: dy [rows, outer] @ weight^T -> [rows, inner] in the dtype of dy."""
    dequantized = weight.dequantize().astype(dy.dtype)
    return jnp.matmul(dy, dequantized.T, precision=lax.Precision.HIGHEST)
