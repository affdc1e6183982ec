"""The autoregressive training loss and the exact likelihood of rows of text, for any model that looks only to the left.

Every document is told from what precedes it by the end-of-text sign: it is the input that stands before the first token
of a row and before the first token of each document in it, so every token has a prediction and all of them are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.unmask import masked_cross_entropy
from ruvjax.errors import ConfigError

# (params, inputs [batch, length], segments [batch, length] or None) -> hidden [batch, length, width], causal
Encode = Callable[[Any, jax.Array, jax.Array | None], jax.Array]
# (params, hidden [rows, width]) -> logits [rows, vocab]
Project = Callable[[Any, jax.Array], jax.Array]
Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]


class Batch(Protocol):
    """What is read of a batch. Segment 0 is padding; `fixed` marks what is given (a prompt)."""

    tokens: jax.Array  # int32 [batch, length]
    segments: jax.Array  # int32 [batch, length]
    fixed: jax.Array  # bool [batch, length]


# Above this many logits (128 MB in float32) the head is run in parts, and again for the gradient: rows may be long.
LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class NextToken:
    """The autoregressive objective: the mean negative log-likelihood of each token given those before it, in nats.

    conditional: tokens in `batch.fixed` (a prompt) are read and not counted.
    attend:      "documents": what is read of a row is its own document only; "row": all that precedes in the row.
    """

    conditional: bool = False
    attend: Literal["documents", "row"] = "documents"

    def __post_init__(self):
        if not isinstance(self.conditional, bool):
            raise ConfigError(f"loss.conditional={self.conditional!r} must be true or false")
        if self.attend not in ("documents", "row"):
            raise ConfigError(f"loss.attend={self.attend!r} is not known", "one of documents, row")


def shift_right(
    tokens: Int[Array, "batch length"], segments: Int[Array, "batch length"], start_id: int
) -> Int[Array, "batch length"]:
    """What the model reads to predict `tokens`: the token before each, `start_id` where a document or a row begins."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(same, before, start_id)


def objective(loss: NextToken, encode: Encode, project: Project, *, start_id: int, mask_id: int = -1) -> Objective:
    """The objective `(params, carry, batch, key) -> (loss, (carry, metrics))`; it draws nothing from its key.

    `mask_id` is a token of the vocabulary that never occurs in text and gets probability 0 (-1: there is none).
    Metrics: `loss`, `loss_sum`, `tokens`.
    """

    def run(params: Any, carry: Any, batch: Batch, key: jax.Array):
        counted = (batch.segments != 0) & ~(batch.fixed & loss.conditional)
        segments = batch.segments if loss.attend == "documents" else jnp.minimum(batch.segments, 1)
        nll = _nll(encode, project, params, batch.tokens, segments, counted, start_id, mask_id)
        total, tokens = jnp.sum(nll), jnp.sum(counted)
        value = total / jnp.maximum(tokens, 1)
        return value, (carry, {"loss": value, "loss_sum": total, "tokens": tokens})

    return run


def nll(
    encode: Encode, project: Project, params: Any, batch: Batch, *, start_id: int, mask_id: int = -1
) -> Float[Array, " batch"]:
    """-log p of each row in nats: exact, over tokens that are neither padding nor given."""
    counted = (batch.segments != 0) & ~batch.fixed
    each = _nll(encode, project, params, batch.tokens, batch.segments, counted, start_id, mask_id)
    return jnp.sum(each, axis=1)


def _nll(
    encode: Encode,
    project: Project,
    params: Any,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    counted: Bool[Array, "batch length"],
    start_id: int,
    mask_id: int,
) -> Float[Array, "batch length"]:
    hidden = encode(params, shift_right(tokens, segments, start_id), segments)
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets = jnp.where(counted, tokens, -1).reshape(-1)  # a negative target costs 0

    def cost(rows, targets):
        return masked_cross_entropy(project(params, rows), targets, mask_id)

    size = max(1, LOGITS_AT_ONCE // jax.eval_shape(project, params, flat).shape[-1])
    if len(targets) <= size:
        return cost(flat, targets).reshape(tokens.shape)
    extra = -len(targets) % size
    flat, targets = jnp.pad(flat, ((0, extra), (0, 0))), jnp.pad(targets, (0, extra), constant_values=-1)
    parts = flat.reshape(-1, size, flat.shape[-1]), targets.reshape(-1, size)
    each = lax.map(
        jax.checkpoint(lambda part: cost(*part)), parts
    )  # or the scan would keep all logits for the gradient
    return each.reshape(-1)[: tokens.size].reshape(tokens.shape)
