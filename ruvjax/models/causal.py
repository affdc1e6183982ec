"""A language model of any family as decoders call it: from left to right, with its state as argument and result."""

import functools
from typing import Any

import jax

from kernels_pallas.attention import Mask
from ruvjax.core.model import Output
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer

LanguageModel = Transformer | Mamba | Mamba2


@functools.cache
def forward_left_of(model: LanguageModel, attention: str | None = None):
    """`(params, tokens, time, carry) -> (Output, carry)` from left to right; a negative token is padding.

    `carry` is the model's state, or None to start from nothing. With one, the logits are those of the last position:
    a prompt has no use for the others, and they are large. One object per model and settings, because jitted loops hold
    it as a static argument.
    """

    def forward(params: Any, tokens: jax.Array, time: Any, carry: Any) -> tuple[Output, Any]:
        segments, tokens = (tokens >= 0).astype("int32"), tokens.clip(0)
        settings: dict[str, Any] = {"cache": carry, "logits": carry is None}
        if isinstance(model, Transformer):
            mask = Mask(segments=segments, causal=True)
            output = model.apply(params, tokens, mask=mask, impl=attention, **settings)
        else:
            output = model.apply(params, tokens, segments=segments, **settings)
        if carry is None:
            return output, None
        last = output.hidden[:, -1:]
        return Output(model.head(params, last), last), output.aux["cache"]

    return forward
