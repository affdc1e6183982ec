"""Selected low-rank updates for XLA, in two forms.

Gathered: the matrices of each row are gathered and multiplied with it. Its memory grows with the number of selections
(rows x k x (in + out) x rank), its time does not depend on the bank. Dense: all adapters are applied to all positions
as two large products, and a mask of weights between them keeps the selected ones; nothing is gathered, but time grows
with the bank.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import platforms

# A gathered number costs a CPU as much as this many multiply-adds of the dense form: 256 positions, rank 8, 1024 wide,
# two cores. It says at which bank size one form overtakes the other.
COPY_COST = {4: 20, 2: 40}
# On a GPU or TPU the dense form takes half the time of the 2048 x 2048 matrix beside it at 512 columns, by its
# roofline.
DENSE_COLUMNS = 1024


def dense_pays(rows: int, length: int, selections: int, bank: int, rank: int, itemsize: int) -> bool:
    """Whether the dense form is the faster one, for `rows` rows that select `selections` adapters each."""
    if bank > rows * selections:  # the dense form would read more adapters than the other
        return False
    if platforms() != ("cpu",):
        return length == 1 and bank * rank <= DENSE_COLUMNS
    return bank * length <= selections * (COPY_COST.get(itemsize, 20) + length)


def lora_bank(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """x [rows, length, in], ids and weights [rows, k], every id inside the bank. See
    `kernels_pallas.lora_bank.lora_bank`."""
    if x.size == 0 or ids.size == 0:
        return jnp.zeros((*x.shape[:2], b.shape[2]), x.dtype)
    pays = dense_pays(*x.shape[:2], ids.shape[1], a.shape[0], a.shape[2], x.dtype.itemsize)
    return (dense if pays else gathered)(x, a, b, ids, weights)


def dense(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Differentiated by autodiff, which was as fast here as a backward pass by hand."""
    bank, _, rank = a.shape
    rows, length, _ = x.shape
    chosen = ids[:, :, None] == jnp.arange(bank)[None, None, :]
    mask = jnp.sum(jnp.where(chosen, weights[:, :, None], 0), axis=1)
    inner = _dot(x, a.astype(x.dtype), (2,), (1,))  # [rows, length, bank, rank]
    kept = (inner * mask[:, None, :, None]).astype(x.dtype).reshape(rows, length, bank * rank)
    return _dot(kept, b.astype(x.dtype).reshape(bank * rank, -1), (2,), (0,)).astype(x.dtype)


@jax.custom_vjp
def gathered(x: jax.Array, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """With a backward pass that adds the gradient of each selection to the bank in place: 3 to 4 ms instead of the 15
    of autodiff, which writes out a matrix for each selection before it adds them up."""
    first, second = _select(a, ids, x), _select(b, ids, x)
    inner = _dot(x, first, (2,), (2,), batch=1) * weights[:, None, :, None]
    return _up(inner.astype(x.dtype), second).astype(x.dtype)


def _gathered_fwd(x, a, b, ids, weights):
    return gathered(x, a, b, ids, weights), (x, a, b, ids, weights)


def _gathered_bwd(saved, dy):
    x, a, b, ids, weights = saved
    first, second = _select(a, ids, x), _select(b, ids, x)
    inner = _dot(x, first, (2,), (2,), batch=1)  # [rows, length, k, rank]
    outer = _dot(dy, second, (2,), (3,), batch=1)
    dweights = jnp.sum(inner * outer, axis=(1, 3)).astype(weights.dtype)
    scaled = weights[:, None, :, None]
    inner, outer = (inner * scaled).astype(x.dtype), (outer * scaled).astype(x.dtype)
    dx = lax.dot_general(outer, first, (((2, 3), (1, 3)), ((0,), (0,))), preferred_element_type=_wide(x))
    da = _into_bank(a, ids, x, outer, "li,lr->ir")
    db = _into_bank(b, ids, dy, inner, "lo,lr->ro")
    return dx.astype(x.dtype), da, db, None, dweights


gathered.defvjp(_gathered_fwd, _gathered_bwd)


def _select(bank, ids, x):
    return bank[ids].astype(x.dtype)


def _up(inner, second):
    """sum over k and rank of [rows, length, k, rank] and [rows, k, rank, out]."""
    rows, length, k, rank = inner.shape
    return _dot(inner.reshape(rows, length, k * rank), second.reshape(rows, k * rank, -1), (2,), (1,), batch=1)


def _into_bank(bank, ids, vectors, small, product):
    """The sum over selections of `product` of vectors [rows, length, wide] and small [rows, length, k, rank], each
    added to its adapter, in the dtype of the bank."""
    rows, k = ids.shape
    total = jnp.zeros(bank.shape, _wide(vectors))
    one = partial(jnp.einsum, product, preferred_element_type=total.dtype)

    def in_turn(total):
        def add(i, total):
            row, j = i // k, i % k
            return total.at[ids[row, j]].add(one(vectors[row], small[row, :, j]))

        return lax.fori_loop(0, rows * k, add, total)

    def at_once(total):
        each = jax.vmap(lambda vector, part: jax.vmap(partial(one, vector), in_axes=1)(part))(vectors, small)
        return total.at[ids].add(each)

    if platforms() == ("cpu",):
        return in_turn(total).astype(bank.dtype)
    return lax.platform_dependent(total, cpu=in_turn, default=at_once).astype(bank.dtype)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(x, y, x_dims, y_dims, batch=0):
    leading = tuple(range(batch))
    return lax.dot_general(x, y, ((x_dims, y_dims), (leading, leading)), preferred_element_type=_wide(x))
