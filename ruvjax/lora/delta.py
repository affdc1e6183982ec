"""Updates that learn online: as they begin, and cut back to their rank without being formed as a matrix."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ruvjax.core.adapted import Lora

exact = functools.partial(jnp.matmul, precision="highest")  # accelerators round float32 factors by default

BLOCK = 512  # rows of one factorisation


def tall_qr(matrix: Float[Array, "rows rank"]) -> tuple[Float[Array, "rows _"], Float[Array, "_ rank"]]:
    """The reduced QR factorisation, by blocks of rows where there are many for each column (Demmel et al. 2012,
    arXiv:0808.2664).

    LAPACK sets several threads to a single tall factorisation, which wait for each other where other threads have the
    cores: 25 ms for 4096 x 6 on two busy ones, by blocks 2.
    """
    rows, rank = matrix.shape
    if rows <= 2 * BLOCK or 4 * rank > BLOCK:
        return jnp.linalg.qr(matrix)
    blocks = -(-rows // BLOCK)
    padded = jnp.pad(matrix, ((0, blocks * BLOCK - rows), (0, 0))).reshape(blocks, BLOCK, rank)
    q, r = jnp.linalg.qr(padded)
    over, r = tall_qr(r.reshape(blocks * rank, rank))
    return exact(q, over.reshape(blocks, rank, rank)).reshape(blocks * BLOCK, rank)[:rows], r


def fresh(key: jax.Array, inner: int, outer: int, rank: int, scale: float = 1.0) -> Lora:
    """An update that adds nothing: b = 0, and columns of a of norm near 1 (Hu et al. 2021, arXiv:2106.09685)."""
    a = jax.random.normal(key, (inner, rank)) / jnp.sqrt(jnp.float32(inner))
    return Lora(a, jnp.zeros((rank, outer)), jnp.float32(scale))


def cut(update: Lora, into: Lora) -> Lora:
    """`update` at the rank and scale of `into`: its best approximation in the Frobenius norm (Eckart and Young 1936).

    Both unstacked. The result depends on the delta of `update` alone, not on its factors: a has orthonormal columns,
    and b carries the singular values. Directions that the delta does not have keep the columns of `into.a` with b = 0,
    so that they can be learned. O((inner + outer) rank^2). Where the update is not finite, b is NaN: LAPACK, which can
    loop for ever over such numbers, does not see them.
    """
    rank = into.a.shape[-1]
    finite = jnp.all(jnp.isfinite(update.a)) & jnp.all(jnp.isfinite(update.b))
    left, inner = tall_qr(jnp.where(finite, update.a, 0.0))
    right, outer = tall_qr(jnp.where(finite, update.b, 0.0).T)
    core = update.scale * exact(inner, outer.T)
    finite = finite & jnp.all(jnp.isfinite(core))
    u, size, v = jnp.linalg.svd(jnp.where(finite, core, 0.0), full_matrices=False)
    found = min(rank, size.shape[0])
    a = jnp.pad(exact(left, u[:, :found]), ((0, 0), (0, rank - found)))
    b = jnp.pad(size[:found, None] * exact(right, v[:found].T).T, ((0, rank - found), (0, 0)))
    # Below this a singular value is rounding of the product, and its direction means nothing.
    there = jnp.pad(size[:found] > 1e-6 * jnp.maximum(size[0], 1e-30), (0, rank - found))
    a = jnp.where(there[None, :], a, into.a)
    b = jnp.where(finite, jnp.where(there[:, None], b, 0.0) / into.scale, jnp.nan)
    return Lora(a, b, into.scale)
