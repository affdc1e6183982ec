"""The vectors of largest inner product with a query, among a hundred thousand, exactly."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.retrieve import cpu, reference, xla
from kernels_pallas.retrieve.keys import Keys, keys_of, put

__all__ = ["Keys", "keys_of", "put", "retrieve"]


def retrieve(
    keys: Keys,
    live: Bool[Array, "capacity"],
    queries: Float[Array, "queries dim"],
    k: int,
    *,
    impl: str | None = None,
) -> tuple[Int[Array, "queries k"], Float[Array, "queries k"]]:
    """The slots of the k largest inner products with each query among the `live` keys, and these products, the largest
    first; of equal ones the lower slot. Where fewer than k are live, the rest is -1 and -inf.

    Exact: the answer is that of float32 products of all keys, whichever implementation runs (they may round a product
    differently, and so order those that differ by as much as rounding). It has no gradient. Raises ValueError where
    shapes do not fit and for k outside 1 to the capacity.
    """
    if live.shape != (keys.capacity,) or queries.ndim != 2 or queries.shape[1] != keys.dim:
        raise ValueError(f"retrieve: live {live.shape} and queries {queries.shape} for keys {keys.values.shape}")
    if not 1 <= k <= keys.capacity:
        raise ValueError(f"retrieve: k={k} is not 1 to the {keys.capacity} keys")
    if queries.shape[0] == 0:
        return jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32)
    native = impl in (None, "xla") and cpu.runs()
    bodies = {
        "reference": Body(partial(reference.retrieve, k=k)),
        "xla": Body(partial(cpu.retrieve if native else xla.retrieve, k=k)),
    }
    operands = lax.stop_gradient((keys, live, queries.astype(jnp.float32)))
    return dispatch("retrieve", impl, bodies, *operands)
