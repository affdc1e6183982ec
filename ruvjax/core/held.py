"""Keys and values that a forward pass over a part of the positions finds for all the others."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Held:
    """The keys (rotated) and values of every position, as the last pass over it made them.

    k, v: one array a layer, so that a compiled loop copies none out of a stack.
    start: the position of the first token of the pass. write: which of its tokens put their keys and values in the
    place of those that are held; the pass attends to what is held then. None: all of them.
    """

    k: tuple[Float[Array, "batch length kv_heads dim"], ...]
    v: tuple[Float[Array, "batch length kv_heads dim"], ...]
    start: Int[Array, "batch"]
    write: Bool[Array, "batch queries"] | None = None

    def put(
        self, held: Float[Array, "batch length kv_heads dim"], new: Float[Array, "batch queries kv_heads dim"]
    ) -> Float[Array, "batch length kv_heads dim"]:
        """One layer's keys or values with those of this pass in their place."""
        if self.write is not None:
            old = held if held.shape == new.shape else spans(held, self.start, new.shape[1])
            new = jnp.where(self.write[:, :, None, None], new, old)
        if held.shape == new.shape:
            return new.astype(held.dtype)
        if held.shape[0] == 1:  # in place: the scatter over several rows is, on XLA:CPU, a pass over all of `held`
            return lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), self.start[0], axis=1)
        update = jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=0))
        return update(held, new.astype(held.dtype), self.start)


def spans(array: Array, start: Int[Array, "batch"], width: int) -> Array:
    """`width` neighbours of every row [batch, length, ...] from its `start` on."""
    cut = partial(lax.dynamic_slice_in_dim, slice_size=width, axis=0)
    return jax.vmap(cut)(array, start)
