"""Low-rank updates as what they add, the delta `scale * a @ b`: joined, cut to a rank, never formed as a matrix."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Lora:
    """The update `scale * a @ b` of a weight [*, inner, outer]; * is the stacked layers axis, absent when unstacked."""

    a: Float[Array, "*layers inner rank"]
    b: Float[Array, "*layers rank outer"]
    scale: Float[Array, "*layers"]
    magnitude: Float[Array, "*layers outer"] | None = None


def low_rank(x: Float[Array, "*batch inner"], update: Lora) -> Float[Array, "*batch outer"]:
    """`scale * (x @ a) @ b` of an unstacked update, in float32."""
    return update.scale * ((x.astype(jnp.float32) @ update.a) @ update.b)


def fresh(key: jax.Array, inner: int, outer: int, rank: int, scale: float = 1.0) -> Lora:
    """An update that adds nothing: b = 0, and columns of a of norm near 1 (Hu et al. 2021, arXiv:2106.09685)."""
    a = jax.random.normal(key, (inner, rank)) / jnp.sqrt(jnp.float32(inner))
    return Lora(a, jnp.zeros((rank, outer)), jnp.float32(scale))


def join(*updates: Lora) -> Lora:
    """The sum of updates of one site, as one of their summed rank."""
    a = jnp.concatenate([u.a for u in updates], axis=-1)
    b = jnp.concatenate([u.scale[..., None, None] * u.b for u in updates], axis=-2)
    return Lora(a, b, jnp.ones(a.shape[:-2], jnp.float32))


def cut(update: Lora, into: Lora) -> Lora:
    """`update` at the rank and scale of `into`: its best approximation in the Frobenius norm (Eckart and Young 1936).

    Both unstacked. The result depends on the delta of `update` alone, not on its factors: a has orthonormal columns,
    and b carries the singular values. Directions that the delta does not have keep the columns of `into.a` with b = 0,
    so that they can be learned. O((inner + outer) rank^2).
    """
    rank = into.a.shape[-1]
    left, inner = jnp.linalg.qr(update.a)
    right, outer = jnp.linalg.qr(update.b.T)
    u, size, v = jnp.linalg.svd(update.scale * inner @ outer.T, full_matrices=False)
    found = min(rank, size.shape[0])
    a = jnp.pad(left @ u[:, :found], ((0, 0), (0, rank - found)))
    b = jnp.pad(size[:found, None] * (right @ v[:found].T).T, ((0, rank - found), (0, 0)))
    # Below this a singular value is rounding of the product, and its direction means nothing. What is not a number is
    # not below it: it stays to be seen.
    there = jnp.pad(~(size[:found] <= 1e-6 * jnp.maximum(size[0], 1e-30)), (0, rank - found))
    a = jnp.where(there[None, :], a, into.a)
    b = jnp.where(there[:, None], b, 0.0) / into.scale
    return Lora(a, b, into.scale)
