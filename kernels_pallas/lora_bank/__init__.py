"""Low-rank updates chosen from a bank of adapters, for each sequence or for each position."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import compat
from kernels_pallas.dispatch import Body, dispatch
from kernels_pallas.lora_bank import reference, tpu, xla

__all__ = ["compact", "lora_bank"]

# By the roofline of an H200 (2048 positions, a base matrix of 2048 x 2048, rank x bank columns), not measured. At 4096
# columns the dense form would take 90 us and a kernel 5.
NO_GPU_KERNEL = (
    "XLA's form costs half of the base matrix beside it at 512 columns (bank x rank) and as much at 1024: it is the "
    "one to take, and no kernel is written for larger banks"
)


def lora_bank(
    x: Float[Array, "batch length inner"],
    a: Float[Array, "bank inner rank"],
    b: Float[Array, "bank rank outer"],
    ids: Int[Array, "batch k"] | Int[Array, "batch length k"],
    weights: Float[Array, "batch k"] | Float[Array, "batch length k"] | None = None,
    *,
    scale: float = 1.0,
    impl: str | None = None,
) -> Float[Array, "batch length outer"]:
    """scale * sum_j weights_j * (x @ a[ids_j]) @ b[ids_j]: the sum of k low-rank updates (Hu et al. 2021,
    arXiv:2106.09685), selected for each sequence (ids of two axes) or for each position (three).

    An id outside the bank, such as -1, selects nothing. `weights` are 1 by default. The result has the dtype of x;
    products accumulate in float32. Every adapter of the bank must be finite: where the bank is small, all of them are
    multiplied and the weights of the others are 0. Differentiable in x, weights, a and b. The gradient of a and b has
    the size of the bank; `compact` gives that of the selected adapters alone.

    On a GPU the XLA form is the product path: for each sequence the gathered matrices make ordinary products, and for
    each position all adapters together cost half of a base matrix of 2048 x 2048 at 512 columns (bank x rank) and as
    much at 1024. Larger banks that are selected at each position would gain from a kernel, which is not written.
    Raises ValueError where shapes do not fit, `kernels_pallas.dispatch.ImplError` for an `impl` that is not there.
    """
    batch, length, inner = x.shape
    bank, _, rank = a.shape
    if a.shape[1] != inner or b.shape[:2] != (bank, rank):
        raise ValueError(f"lora_bank: a {a.shape} and b {b.shape} do not fit each other and x {x.shape}")
    if ids.shape[:-1] not in ((batch,), (batch, length)):
        raise ValueError(f"lora_bank: ids {ids.shape} must be [{batch}, k] or [{batch}, {length}, k]")
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"lora_bank: weights {weights.shape} for ids {ids.shape}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    valid = (ids >= 0) & (ids < bank)
    factors = jnp.ones(ids.shape, wide) if weights is None else weights.astype(wide)
    factors = jnp.where(valid, scale * factors, 0)
    ids = jnp.where(valid, ids, 0)
    rows = (batch, length) if ids.ndim == 2 else (batch * length, 1)
    flat = [x.reshape(*rows, inner), *(value.reshape(rows[0], ids.shape[-1]) for value in (ids, factors))]
    if bank == 0 or x.size == 0 or ids.size == 0:
        return jnp.zeros((batch, length, b.shape[2]), x.dtype)
    bodies = {
        "reference": Body(reference.lora_bank),
        "xla": Body(xla.lora_bank),
        "pallas_gpu": Body(xla.lora_bank, NO_GPU_KERNEL),
        "pallas_tpu": Body(
            partial(tpu.lora_bank, interpret=False),
            compat.missing("tpu") or tpu.unsupported(flat[0], flat[1]) or tpu.unfit(a, b),
        ),
        "interpret": Body(
            partial(tpu.lora_bank, interpret=True), compat.missing("tpu") or tpu.unsupported(flat[0], flat[1])
        ),
    }
    if impl is None and (rows[1] != 1 or bank * rank <= xla.DENSE_COLUMNS):
        impl = "xla"  # where no kernel is needed, nothing is passed over
    return dispatch("lora_bank", impl, bodies, flat[0], a, b, flat[1], flat[2]).reshape(batch, length, -1)


def compact(ids: Int[Array, "*shape"], bank: int) -> tuple[Int[Array, "selected"], Int[Array, "*shape"]]:
    """The adapters that `ids` selects from a bank of `bank`, each once, and the ids renumbered to match.

    `lora_bank(x, a[selected], b[selected], local)` is then `lora_bank(x, a, b, ids)`, and its gradient in the gathered
    matrices has their size instead of that of the bank: min(ids.size, bank) adapters. Where fewer are distinct, the
    rest of `selected` is `bank`, outside of it: reading there gives some adapter that no local id names,
    `.at[selected].set(..., mode="drop")` passes over it.
    """
    flat = jnp.where((ids >= 0) & (ids < bank), ids, bank).ravel()
    selected, local = jnp.unique(flat, return_inverse=True, size=min(flat.size, bank), fill_value=bank)
    local = jnp.where(flat < bank, local.ravel(), -1)
    return selected.astype(jnp.int32), local.reshape(ids.shape).astype(jnp.int32)
