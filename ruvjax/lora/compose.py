"""Several updates of one site as one, in the space of what they add to the weight.

Factors are not unique (`a @ g` and `inverse(g) @ b` are the same update), so they are never averaged: everything here
equals its definition on `delta = scale * a @ b`, whatever the ranks. Leading axes, such as stacked layers, are free.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int8

from ruvjax.core.adapted import Lora, delta
from ruvjax.errors import ConfigError


def add(updates: Sequence[Lora], weights: Float[Array, "n"] | None = None) -> Lora:
    """The weighted sum of `updates` (weights 1 by default), exactly: factors side by side, of the ranks' sum.

    Raises ConfigError for none at all, updates of different sites, and DoRA, which is no sum.
    """
    _same_site(updates)
    weights = jnp.ones(len(updates)) if weights is None else weights
    parts = [_scaled(update, weight) for update, weight in zip(updates, weights, strict=True)]
    a = jnp.concatenate([update.a for update in updates], axis=-1)
    return Lora(a, jnp.concatenate(parts, axis=-2), jnp.ones(a.shape[:-2], jnp.float32))


def similarity_softmax(updates: Sequence[Lora], similarity: Float[Array, "n"], temperature: float) -> Lora:
    """`add` with the weights softmax(similarity / temperature): those of retrieval, which sum to 1."""
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r} must be positive")
    return add(updates, jax.nn.softmax(similarity / temperature))


def truncate(update: Lora, rank: int) -> Lora:
    """The best update of `rank` in the Frobenius norm (Eckart and Young 1936), never formed as a dense matrix.

    The singular values of `a @ b` are those of the small product of both triangular factors. Raises ConfigError for a
    rank below 1 or above that of `update`, and for DoRA.
    """
    _same_site([update])
    if not 1 <= rank <= update.a.shape[-1]:
        raise ConfigError(f"an update of rank {update.a.shape[-1]} cannot be truncated to rank {rank}")
    left, upper = jnp.linalg.qr(_wide(update.a))
    right, lower = jnp.linalg.qr(jnp.swapaxes(_scaled(update, 1.0), -1, -2))
    core = jnp.matmul(upper, jnp.swapaxes(lower, -1, -2), precision="highest")
    a, b = _factors(core, min(rank, *core.shape[-2:]))
    a = jnp.matmul(left, a, precision="highest")
    b = jnp.matmul(b, jnp.swapaxes(right, -1, -2), precision="highest")
    return _of(a, b, rank, update)


def factor(dense: Float[Array, "*layers inner outer"], rank: int) -> Lora:
    """The best update of `rank` for a dense delta, such as that of `ties`, by its singular value decomposition."""
    if not 1 <= rank <= min(dense.shape[-2:]):
        raise ConfigError(f"a matrix of shape {dense.shape[-2:]} has no update of rank {rank}")
    a, b = _factors(dense, rank)
    return Lora(a, b, jnp.ones(dense.shape[:-2], jnp.float32))


def ties(
    updates: Sequence[Lora], density: float, weights: Float[Array, "n"] | None = None
) -> Float[Array, "*layers inner outer"]:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): each delta, layer by layer, keeps its share `density` of largest
    entries; every entry elects the sign of the weighted sum; those that agree with it are averaged. A dense delta.

    Raises ConfigError for a density outside (0, 1], and as `add` does.
    """
    _same_site(updates)
    if not 0 < density <= 1:
        raise ConfigError(f"density={density!r} must be in (0, 1]")
    weights = jnp.ones(len(updates)) if weights is None else weights
    kept = [weight * _largest(delta(update), density) for update, weight in zip(updates, weights, strict=True)]
    sign = jnp.sign(functools.reduce(jnp.add, kept))
    agree = [(jnp.sign(part) == sign) & (part != 0) for part in kept]
    total = functools.reduce(jnp.add, [jnp.where(yes, part, 0) for yes, part in zip(agree, kept)])
    return total / jnp.maximum(functools.reduce(jnp.add, [yes.astype(total.dtype) for yes in agree]), 1)


def _largest(dense: jax.Array, density: float) -> jax.Array:
    """`dense` with zeros for all but the largest entries of each matrix in magnitude; at least one stays."""
    flat = jnp.abs(dense).reshape(*dense.shape[:-2], -1)
    count = max(1, int(density * flat.shape[-1]))
    least = lax.top_k(flat, count)[0][..., -1]
    return jnp.where(jnp.abs(dense) >= least[..., None, None], dense, 0)


def dare(
    updates: Sequence[Lora], drop: float, key: jax.Array, weights: Float[Array, "n"] | None = None
) -> Float[Array, "*layers inner outer"]:
    """DARE (Yu et al. 2023, arXiv:2311.03099): every entry of each delta is dropped with probability `drop`, the others
    are divided by 1 - drop, so that the expectation stays; their weighted sum. A dense delta.

    Update i draws with `fold_in(key, i)`. Raises ConfigError for a `drop` outside [0, 1), and as `add` does.
    """
    _same_site(updates)
    if not 0 <= drop < 1:
        raise ConfigError(f"drop={drop!r} must be in [0, 1)")
    weights = jnp.ones(len(updates)) if weights is None else weights

    def thinned(i: int, dense: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - drop, dense.shape)
        return jnp.where(keep, dense / (1 - drop), 0)

    parts = [weights[i] * thinned(i, delta(update)) for i, update in enumerate(updates)]
    return functools.reduce(jnp.add, parts)


@struct.dataclass
class Compressed:
    """A `Lora` in int8: every column of `a` and every row of `b` in steps of its own.

    An entry of either factor is off by at most half its step. So entry (i, j) of the delta is off by at most
    |scale| * sum over r of |a[i, r]| * b_step[r] / 2 + a_step[r] / 2 * |b[r, j]| + a_step[r] * b_step[r] / 4.
    """

    a: Int8[Array, "*layers inner rank"]
    a_step: Float[Array, "*layers rank"]
    b: Int8[Array, "*layers rank outer"]
    b_step: Float[Array, "*layers rank"]
    scale: Any
    magnitude: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: (inner + outer + 8) * rank + 4 a layer, and four a column of a magnitude."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def compress(update: Lora) -> Compressed:
    """`update` in 8 bits, by the largest magnitude of each column of `a` and each row of `b`; scale and magnitude stay
    float32."""
    a, a_step = _rounded(update.a, -2)
    b, b_step = _rounded(update.b, -1)
    return Compressed(a, a_step, b, b_step, update.scale, update.magnitude)


def decompress(compressed: Compressed) -> Lora:
    """The float32 update that `compressed` stands for."""
    a = compressed.a.astype(jnp.float32) * compressed.a_step[..., None, :]
    b = compressed.b.astype(jnp.float32) * compressed.b_step[..., :, None]
    return Lora(a, b, compressed.scale, compressed.magnitude)


def _rounded(matrix: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes in -127..127 and the step of each vector along `axis`; 0 for a vector of zeros."""
    step = jnp.max(jnp.abs(matrix), axis=axis).astype(jnp.float32) / 127
    codes = jnp.round(matrix / jnp.expand_dims(jnp.where(step > 0, step, 1), axis))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), step


def _same_site(updates: Sequence[Lora]) -> None:
    if not updates:
        raise ConfigError("there is no update to compose")
    shapes = {(*update.a.shape[:-1], update.b.shape[-1]) for update in updates}
    if len(shapes) > 1:
        raise ConfigError(f"updates of different sites cannot be composed: {', '.join(map(str, sorted(shapes)))}")
    if any(update.magnitude is not None for update in updates):
        raise ConfigError("a DoRA update is no delta: it scales the weight too", "merge it into the weights")


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scaled(update: Lora, weight: Any) -> jax.Array:
    """`b` with the scale and a weight in it."""
    b = _wide(update.b)
    return b * (jnp.asarray(update.scale, b.dtype) * weight)[..., None, None]


def _factors(dense: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The `rank` largest singular triplets, their values shared out evenly."""
    u, s, v = jnp.linalg.svd(dense, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


def _of(a: jax.Array, b: jax.Array, rank: int, like: Lora) -> Lora:
    """An update of `rank`, with zeros where the matrix has fewer dimensions."""
    more, still = rank - a.shape[-1], [(0, 0)] * (a.ndim - 2)
    a, b = jnp.pad(a, [*still, (0, 0), (0, more)]), jnp.pad(b, [*still, (0, more), (0, 0)])
    return Lora(a.astype(like.a.dtype), b.astype(like.b.dtype), jnp.ones(a.shape[:-2], jnp.float32))
