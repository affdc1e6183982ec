"""The search in C++ for the CPU (csrc/retrieve.cc): the faster route of the XLA body where a compiler is at hand."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import native
from kernels_pallas.dispatch import SPLIT, log_fallback, platforms
from kernels_pallas.retrieve import xla
from kernels_pallas.retrieve.keys import LANES, Keys
from kernels_pallas.whole import where_whole

SOURCE = "retrieve/csrc/retrieve.cc"
TARGETS = ("ruvjax_retrieve",)
GROUPS = 32  # of a task; kGroups of the source
BATCH = 64  # queries whose bounds are held at once


def runs() -> bool:
    """Whether `retrieve` takes the place of `xla.retrieve`. Compiles the kernel at its first use on a machine."""
    if platforms() != ("cpu",) or native.switched_off():
        return False
    reason = native.unavailable(SOURCE, TARGETS)
    if reason:
        log_fallback("retrieve", "the native CPU kernel", reason)
    return not reason


def _native(keys: Keys, live: jax.Array, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    count, groups = queries.shape[0], keys.codes.shape[0]
    held, tasks = min(count, BATCH), -(-groups // GROUPS)
    results = [
        jax.ShapeDtypeStruct((count, k), jnp.int32),
        jax.ShapeDtypeStruct((count, k), jnp.float32),
        jax.ShapeDtypeStruct((held, groups, LANES), jnp.float32),
        jax.ShapeDtypeStruct((held, tasks, LANES), jnp.float32),
    ]
    # Under vmap one call after the other: each already keeps all threads busy.
    call = jax.ffi.ffi_call(TARGETS[0], results, vmap_method="sequential")
    slots, scores, *_ = call(keys.codes, keys.scale, keys.norm, keys.error, live, keys.values, queries)
    return slots, scores


def retrieve(keys: Keys, live: jax.Array, queries: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The contract of `xla.retrieve`, which runs where XLA's partitioner splits the arrays."""
    passed_over = partial(log_fallback, "retrieve", "the native CPU kernel", SPLIT)
    forms = (partial(_native, k=k), partial(xla.retrieve, k=k))
    return where_whole(*forms, passed_over)(keys, live, queries)
