"""What a forward pass returns, whichever model family ran it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.layout import native_bfloat16


@struct.dataclass
class Output:
    """The result of one forward pass.

    logits: float32 [batch, length, vocabulary], or None where the caller asked for hidden states only.
    hidden: [batch, length, width], after the final norm, in the compute dtype.
    aux:    whatever else a family reports (halting logit, entropy), by name.
    """

    logits: jax.Array | None
    hidden: jax.Array
    aux: dict[str, Any] = struct.field(default_factory=dict)


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that a model computes in. "auto" is bfloat16 where the default backend multiplies it in hardware (every
    GPU and TPU, CPUs with avx512_bf16 or amx_bf16), and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if native_bfloat16() else "float32"
    return jnp.dtype(name)
