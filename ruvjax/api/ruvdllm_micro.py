"""MicroLoRA, the documented adapter of a few ranks that banks hold, over `lora.compose`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ruvjax.api.ruvdllm_errors import TALoRAError
from ruvjax.core.adapted import Lora
from ruvjax.lora import compose
from ruvjax.lora.compose import Compressed


class MicroLoRA:
    """An update (x @ a) @ b of a vector of width `hidden_dim`: a [hidden, rank], b [rank, hidden], float32."""

    def __init__(self, a: Float[Array, "hidden rank"], b: Float[Array, "rank hidden"]):
        self.a, self.b = a, b

    @classmethod
    def new(cls, rank: int, hidden_dim: int) -> "MicroLoRA":
        """An adapter that changes nothing yet: b is zero, a of variance 1 / hidden_dim (from a fixed key). Raises
        TALoRAError for sizes below 1."""
        for name, value in (("rank", rank), ("hidden_dim", hidden_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TALoRAError(f"{name}={value!r} must be a whole number of at least 1")
        a = jax.random.normal(jax.random.key(0), (hidden_dim, rank)) / hidden_dim**0.5
        return cls(a, jnp.zeros((rank, hidden_dim)))

    @classmethod
    def from_matrices(cls, a: Any, b: Any) -> "MicroLoRA":
        """From a [hidden, rank] and b [rank, hidden]. Raises TALoRAError where they do not fit or are not finite."""
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if a.ndim != 2 or b.shape != a.shape[::-1] or not a.size:
            raise TALoRAError(f"a {a.shape} and b {b.shape} are not [hidden, rank] and [rank, hidden]")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise TALoRAError("an adapter with entries that are not finite")
        return cls(jnp.asarray(a), jnp.asarray(b))

    def apply(self, input: Float[Array, "*batch hidden"] | Any) -> Float[Array, "*batch hidden"]:
        """What the adapter adds for `input`."""
        input = jnp.asarray(input)
        return ((input.astype(jnp.float32) @ self.a) @ self.b).astype(input.dtype)

    def rank(self) -> int:
        """The number of columns of a."""
        return self.a.shape[1]

    def hidden_dim(self) -> int:
        """The width of what it applies to."""
        return self.a.shape[0]

    def size_bytes(self) -> int:
        """Bytes of the factors in float32."""
        return self.a.nbytes + self.b.nbytes

    def merge(self, other: "MicroLoRA", weight: float) -> None:
        """Become the sum of this update and `weight` times the other, whatever its rank, as near as this rank allows:
        of the products a @ b, never of the factors, which are not unique. Raises TALoRAError for another width."""
        if other.hidden_dim() != self.hidden_dim():
            raise TALoRAError(f"adapters of widths {self.hidden_dim()} and {other.hidden_dim()} cannot be merged")
        both = compose.add([_lora(self), _lora(other)], jnp.asarray([1.0, weight], jnp.float32))
        made = compose.truncate(both, self.rank())
        self.a, self.b = made.a, made.b * made.scale

    def compress(self) -> "CompressedMicroLoRA":
        """The adapter in 8 bits: a quarter of the bytes of float32, and 8 a rank for the steps."""
        return CompressedMicroLoRA(compose.compress(_lora(self)))


@dataclass(frozen=True, eq=False)
class CompressedMicroLoRA:
    """A MicroLoRA in int8, with a step for each column of a and row of b."""

    codes: Compressed

    def decompress(self) -> MicroLoRA:
        """The adapter that the codes stand for."""
        made = compose.decompress(self.codes)
        return MicroLoRA(made.a, made.b)

    def rank(self) -> int:
        """The rank of the adapter."""
        return self.codes.a.shape[-1]

    def size_bytes(self) -> int:
        """Bytes of the codes and their steps."""
        return self.codes.nbytes - jnp.asarray(self.codes.scale).nbytes  # 1 for every MicroLoRA


def _lora(micro: MicroLoRA) -> Lora:
    return Lora(micro.a, micro.b, jnp.float32(1))
