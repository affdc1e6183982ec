"""A language model at its last hidden states: what predicts a text, and generation with an update of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ruvjax.core.adapted import low_rank
from ruvjax.core.model import Output
from ruvjax.lora.sona import Sample
from ruvjax.models.causal import LanguageModel, forward_left_of

# XLA compiles for a shape: a few lengths serve all texts.
LEAST_LENGTH = 64
LEAST_ROWS = 8


def predicting(forward: Any, params: Any, before: list[int], said: list[int]) -> Sample:
    """The hidden states from which a model, `forward_left_of`, predicts the tokens `said` after those `before`: one row
    a token, padded to a power of two. Neither list may be empty."""
    length = len(before) + len(said)
    tokens = np.full((1, max(LEAST_LENGTH, 1 << (length - 1).bit_length())), -1, np.int32)
    tokens[0, :length] = before + said
    row = np.arange(max(LEAST_ROWS, 1 << (len(said) - 1).bit_length()))
    counted = row < len(said)
    place = np.minimum(len(before) - 1 + row, length - 2)
    targets = np.where(counted, tokens[0, place + 1], 0).astype(np.int32)
    return Sample(_hidden(forward, params, tokens, place), jnp.asarray(targets), jnp.asarray(counted))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(forward: Any, params: Any, tokens: jax.Array, place: jax.Array) -> jax.Array:
    """Hidden states of one row at these places; nothing asks for the logits, so the compiler leaves them out."""
    return forward(params, tokens, None, None)[0].hidden[0][place]


@functools.cache
def forward_with_update(network: LanguageModel) -> Any:
    """`forward_left_of`, of (params, update): the update adds to the last hidden states."""
    forward = forward_left_of(network)

    def run(params: Any, tokens: jax.Array, time: Any, carry: Any) -> tuple[Output, Any]:
        output, carry = forward(params[0], tokens, time, carry)
        y = output.hidden.astype(jnp.float32)
        hidden = (y + low_rank(y, params[1])).astype(output.hidden.dtype)
        return Output(network.head(params[0], hidden), hidden), carry

    return run
