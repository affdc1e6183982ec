"""Held-out likelihood of a model beside that of simple models."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import Evaluation
from experiments.wiring import Loaded, encode_left_of, encode_of, forward_of, project_of
from ruvjax.data.baselines import Baselines
from ruvjax.data.pack import Packed
from ruvjax.data.pipeline import Batch, evaluation_batches
from ruvjax.decoding.likelihood import nll
from ruvjax.diffusion.likelihood import block_nelbo_samples, nelbo_samples
from ruvjax.diffusion.schedule import Schedule
from ruvjax.models.causal import LanguageModel
from ruvjax.training.evaluate import Interval, bits_per_byte, of_this_text, perplexity, score
from ruvjax.training.report import Compared


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Likelihood of a held-out split, a bound (NELBO) or exact (autoregressive models), with two 95% intervals.

    bits_per_byte, perplexity: for this very text, over the corruptions drawn; what compares with other models on it.
        Where the likelihood is exact, both ends are the figure itself.
    documents: bits per byte over documents (rows, where there is one), for text of this kind in general.
    """

    bits_per_byte: Interval
    perplexity: Interval
    documents: Interval
    nats_per_token: float
    rows: int
    over: str
    exact: bool = False

    def metrics(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte.high,  # the figure that is compared is the upper end of the interval
            "bits_per_byte_mean": self.bits_per_byte.mean,
            "bits_per_byte_low": self.bits_per_byte.low,
            "bits_per_byte_high": self.bits_per_byte.high,
            "documents_bits_per_byte_low": self.documents.low,
            "documents_bits_per_byte_high": self.documents.high,
            "perplexity": self.perplexity.mean,
            "perplexity_low": self.perplexity.low,
            "perplexity_high": self.perplexity.high,
            "nll_nats_per_token" if self.exact else "nelbo_nats_per_token": self.nats_per_token,
            "evaluated_rows": self.rows,
            "documents_are": self.over,
        }


@functools.cache
def _estimator(
    model: LanguageModel,
    attention: str | None,
    block_size: int,
    schedule: Schedule,
    mask_id: int,
    samples: int,
    method: Literal["exact_k", "continuous"],
):
    """Jitted `(params, batch, key) -> nats [batch, samples]`; one per setting: repeated evaluations compile once."""
    forward = forward_of(model, attention, block_size)
    encode, project = encode_of(model, attention), project_of(model)

    def estimate(params, batch: Batch, key):
        fixed = batch.fixed | (batch.segments == 0)
        common: dict[str, Any] = {"mask_id": mask_id, "samples": samples, "fixed": fixed, "index": batch.index}
        segments = jnp.minimum(batch.segments, 1)
        if block_size:
            draws = block_nelbo_samples(
                encode, project, params, batch.tokens, key, block_size=block_size, segments=segments, **common
            )
        else:
            draws = nelbo_samples(
                forward, params, batch.tokens, key, carry=segments, schedule=schedule, method=method, **common
            )
        return draws.T

    return jax.jit(estimate)


def likelihood_of(loaded: Loaded):
    """Jitted `(params, batch, key) -> nats [batch, 1]` of an autoregressive model, whose rows begin as its texts do."""
    start_id = loaded.start_id if loaded.start_id >= 0 else loaded.tokenizer.eos_id
    return _exact(loaded.model, loaded.attention, start_id, loaded.tokenizer.mask_id)


@functools.cache
def _exact(model: LanguageModel, attention: str | None, start_id: int, mask_id: int):
    """Jitted `(params, batch, key) -> nats [batch, 1]` of an autoregressive model."""
    encode, project = encode_left_of(model, attention), project_of(model)

    def estimate(params, batch: Batch, key):
        return nll(encode, project, params, batch, start_id=start_id, mask_id=mask_id)[:, None]

    return jax.jit(estimate)


def held_out(
    loaded: Loaded,
    packed: Packed,
    evaluation: Evaluation,
    seed: int = 0,
    rows: int = 0,
    samples: int = 0,
    method: Literal["exact_k", "continuous"] = "exact_k",
) -> HeldOut:
    """Score `packed` (documents packed one by one). `rows` limits how many, spread evenly; 0 takes `evaluation`'s."""
    packed = spread(packed, rows or evaluation.rows)
    block, mask_id = loaded.block_size, loaded.tokenizer.mask_id
    samples = samples or evaluation.samples
    if loaded.autoregressive:
        estimator = likelihood_of(loaded)
    else:
        estimator = _estimator(loaded.model, loaded.attention, block, loaded.schedule, mask_id, samples, method)
    batch = min(evaluation.batch, packed.rows)
    key = jax.random.key(seed)
    draws = score(functools.partial(estimator, loaded.params), evaluation_batches(packed, batch), key)[: packed.rows]
    nats = draws.mean(axis=1)
    tokens = np.sum((packed.segments != 0) & ~packed.fixed, axis=1)
    documents = packed.document if len(np.unique(packed.document)) > 1 else None
    general = bits_per_byte(nats, packed.bytes, documents)
    if loaded.autoregressive:
        bits, per_token = float(nats.sum()) / math.log(2) / packed.bytes.sum(), float(nats.sum()) / tokens.sum()
        exact = Interval(bits, bits, bits, packed.rows)
        surprise = Interval(math.exp(per_token), math.exp(per_token), math.exp(per_token), packed.rows)
    elif samples > 1:
        exact = of_this_text(draws / math.log(2), packed.bytes)
        per_token = of_this_text(draws, tokens)
        surprise = Interval(math.exp(per_token.mean), math.exp(per_token.low), math.exp(per_token.high), per_token.n)
    else:  # one draw a row says nothing of its own error
        exact, surprise = general, perplexity(nats, tokens, documents)
    return HeldOut(
        exact,
        surprise,
        general,
        float(nats.sum() / max(tokens.sum(), 1)),
        packed.rows,
        "rows" if documents is None else "documents",
        loaded.autoregressive,
    )


def spread(packed: Packed, rows: int) -> Packed:
    """At most `rows` rows of `packed`, evenly spaced; all of them for 0."""
    if not rows or rows >= packed.rows:
        return packed
    chosen = np.linspace(0, packed.rows - 1, rows).round().astype(int)
    fields = {field.name: getattr(packed, field.name)[chosen] for field in dataclasses.fields(packed)}
    return Packed(**fields)


def baseline_metrics(baselines: Baselines, ours: float) -> dict[str, float]:
    """The simple models' bits per byte, and the share of the order-1 byte model's that `ours` is."""
    return {
        "order0_bits_per_byte": baselines.order0_bytes,
        "order1_bits_per_byte": baselines.order1_bytes,
        "order0_token_bits_per_byte": baselines.order0_tokens,
        "order1_token_bits_per_byte": baselines.order1_tokens,
        "xz_bits_per_byte": baselines.xz,
        "share_of_order1": ours / baselines.order1_bytes,
    }


def compared(found: HeldOut, baselines: Baselines) -> tuple[Compared, ...]:
    """The rows of the report's comparison."""
    ours = found.bits_per_byte
    return (
        Compared("this model" if found.exact else "this model (bound)", ours.mean, ours.low, ours.high, ours=True),
        Compared("order-0 bytes", baselines.order0_bytes),
        Compared("order-1 bytes", baselines.order1_bytes),
        Compared("order-0 tokens", baselines.order0_tokens),
        Compared("order-1 tokens", baselines.order1_tokens),
        Compared("xz -9e", baselines.xz, remark="each file alone"),
    )
