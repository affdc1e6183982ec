"""What a forward pass returns, whichever model family ran it."""

from typing import Any

import jax
from flax import struct


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
