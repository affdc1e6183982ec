"""The rotation that spreads outlier channels over the head dimension before it is quantized (Ashkboos et al. 2024,
QuaRot, arXiv:2404.00456). It is orthonormal and its own inverse, so q . k is the same in both bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.cache
def matrix(dim: int) -> np.ndarray:
    """Sylvester's Hadamard matrix of the largest power of two that divides `dim`, repeated down the diagonal and scaled
    to be orthonormal: float32 [dim, dim], symmetric. Raises ValueError for an odd `dim`, which it would leave alone."""
    size = dim & -dim
    if size < 2:
        raise ValueError(f"a head dimension of {dim} has no Hadamard rotation: it must be even")
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(dim // size), block / np.sqrt(size)).astype(np.float32)


def rotate(x: jax.Array) -> jax.Array:
    """x [..., dim] in the rotated basis, in at least float32; applied twice it gives x back."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.matmul(wide, jnp.asarray(matrix(x.shape[-1]), wide.dtype), precision=lax.Precision.HIGHEST)
