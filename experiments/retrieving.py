"""How well texts are predicted with adapters that are known, and with adapters that are retrieved.

A likelihood has no denoising trajectory to remember, so the previous step is made: of the tokens that are visible, as
many are hidden as a step reveals, the frozen model runs on that, and what the carry would have kept of it is the query.
Nothing of what is to be predicted is in it. Queries and keys are taken relative to the mean hidden state of other text
at the same noise level: hidden states have a large common part, which would make all cosines nearly 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from experiments.adaptation import Adapters, Attached, with_own
from experiments.wiring import Loaded
from kernels_pallas.attention import Mask
from ruvjax.core.model import Output
from ruvjax.data.pack import Packed
from ruvjax.data.pipeline import Batch, evaluation_batches
from ruvjax.diffusion.likelihood import nelbo_samples
from ruvjax.lora import bank as banking
from ruvjax.lora import denoise, talora
from ruvjax.lora.bank import Bank
from ruvjax.lora.guided import DGR
from ruvjax.lora.talora import TIMESTEPS, TALoRA
from ruvjax.models.transformer import Transformer

When = Literal["step", "once"]
SEEN_ONCE = 0.1  # the share of a text that the query of a retrieval made once for all steps is taken from
BATCH = 32


@struct.dataclass
class Found:
    """What a forward pass with retrieved adapters runs on; centres float32 [banks, width], the common hidden state."""

    params: denoise.Params
    centres: jax.Array


@struct.dataclass
class Told:
    """The carry of an evaluation: segments [batch, length], the domain of each row [batch], and a uniform number for
    each position [batch, length], by which tokens are hidden for the query."""

    segments: jax.Array
    domain: jax.Array
    place: jax.Array


def plain(loaded: Loaded) -> Callable[..., tuple[Output, Any]]:
    """`(params, tokens, time, segments) -> (Output, segments)` of the model alone."""

    model = loaded.model
    assert isinstance(model, Transformer)

    def run(params, tokens, time, segments):
        mask = Mask(segments=segments)
        return model.apply(params, tokens, mask=mask, time=time, impl=loaded.attention), segments

    return run


def base_forward(loaded: Loaded) -> Callable[..., tuple[Output, Any]]:
    """The forward of the frozen model alone."""
    return lambda params, tokens, time, told: (plain(loaded)(params, tokens, time, told.segments)[0], told)


def attached_forward(config: TALoRA, loaded: Loaded) -> Callable[..., tuple[Output, Any]]:
    """The forward with the adapters of each row's own domain; parameters are `Attached`, without a domain."""

    def run(params: Attached, tokens, time, told: Told):
        domain = told.domain if params.domain is None else jnp.zeros_like(told.domain)
        own = with_own(config, params.base, params.adapters, domain, time)
        return plain(loaded)(own, tokens, time, told.segments)[0], told

    return run


def hidden_before(
    tokens: Int[Array, "batch length"],
    place: Float[Array, "batch length"],
    real: Bool[Array, "batch length"],
    mask_id: int,
    when: When,
    steps: int,
) -> tuple[Int[Array, "batch length"], Float[Array, "batch"]]:
    """`tokens` as an earlier step saw them, and the share of masks there: one step of `steps` earlier, or, "once", when
    no more than a tenth was visible."""
    visible = real & (tokens != mask_id)
    length = jnp.sum(real, axis=1)
    shown = jnp.sum(visible, axis=1)
    if when == "once":
        kept = jnp.minimum(shown, jnp.ceil(SEEN_ONCE * length).astype(shown.dtype))
    else:
        kept = jnp.maximum(shown - jnp.ceil(length / steps).astype(shown.dtype), 0)
    rank = jnp.argsort(jnp.argsort(jnp.where(visible, place, 2.0), axis=1), axis=1)
    keep = rank < kept[:, None]
    earlier = jnp.where(visible & ~keep, mask_id, tokens)
    return earlier, 1 - kept / jnp.maximum(length, 1)


def retrieved_forward(
    config: TALoRA, loaded: Loaded, *, when: When, steps: int, guide: DGR | None = None
) -> Callable[..., tuple[Output, Any]]:
    """The forward with adapters out of the banks; parameters are `Found`."""
    mask_id = loaded.tokenizer.mask_id
    run = denoise.forward(config, plain(loaded), mask_id=mask_id, timeless=False, guide=guide)

    def forward(found: Found, tokens, time, told: Told):
        real = told.segments != 0
        earlier, before = hidden_before(tokens, told.place, real, mask_id, when, steps)
        batch, length = tokens.shape
        first = denoise.begin(config, batch, length, told.segments, guide=guide, segments=told.segments)
        _, memory = run(found.params, earlier, before, first)
        centre = talora.blend(config, TIMESTEPS * before).T @ found.centres
        memory = memory.replace(query=memory.query - centre)
        if memory.hidden is not None:
            memory = memory.replace(hidden=memory.hidden - centre[:, None, :])
        return run(found.params, tokens, time, memory)[0], told

    return forward


def estimator(loaded: Loaded, forward: Callable[..., tuple[Output, Any]], samples: int) -> Callable[..., jax.Array]:
    """Jitted `(params, batch, domain, key) -> nats [batch]`, the mean of `samples` estimates of the NELBO of a row."""

    @jax.jit
    def estimate(params: Any, batch: Batch, domain: jax.Array, key: jax.Array) -> jax.Array:
        place_key, noise_key = jax.random.split(key)
        place = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(place_key, i), batch.tokens.shape[1:]))
        told = Told(jnp.minimum(batch.segments, 1), domain, place(batch.index))
        fixed = batch.fixed | (batch.segments == 0)
        draws = nelbo_samples(
            forward,
            params,
            batch.tokens,
            noise_key,
            mask_id=loaded.tokenizer.mask_id,
            samples=samples,
            fixed=fixed,
            index=batch.index,
            carry=told,
            schedule=loaded.schedule,
        )
        return jnp.mean(draws, axis=0)

    return estimate


@dataclass(frozen=True, eq=False)
class Scored:
    """The rows of all domains below each other: nats, bytes, tokens and domain of each."""

    nats: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / np.log(2) / self.bytes.sum())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats.sum() / self.tokens.sum()))

    def of_domain(self, number: int) -> float:
        """Bits per byte of one domain."""
        mine = self.domain == number
        return float(self.nats[mine].sum() / np.log(2) / self.bytes[mine].sum())


def score(estimate: Callable[..., jax.Array], params: Any, texts: Sequence[Packed], key: jax.Array) -> Scored:
    """The held-out rows of every domain under `params`."""
    packed = stacked(texts)
    domain = np.repeat(np.arange(len(texts), dtype=np.int32), [part.rows for part in texts])
    nats: list[np.ndarray] = []
    for batch in evaluation_batches(packed, BATCH):
        owners = domain[np.minimum(batch.index, packed.rows - 1)]
        nats.append(np.asarray(estimate(params, batch, jnp.asarray(owners), key)))
    tokens = np.sum(packed.segments != 0, axis=1)
    return Scored(np.concatenate(nats)[: packed.rows].astype(np.float64), packed.bytes, tokens, domain)


def stacked(texts: Sequence[Packed]) -> Packed:
    """All rows of several packed texts."""
    names = ("tokens", "segments", "fixed", "bytes", "document")
    return Packed(*(np.concatenate([getattr(part, name) for part in texts]) for name in names))


def queries(
    config: TALoRA, loaded: Loaded, rows: Int[np.ndarray, "count length"], bank: int, key: jax.Array
) -> Float[np.ndarray, "count width"]:
    """The mean hidden state of the frozen model for each row, masked at a time drawn from those of a bank."""
    low, high = config.edges[bank + 1] / TIMESTEPS, config.edges[bank] / TIMESTEPS
    mask_id = loaded.tokenizer.mask_id

    @jax.jit
    def run(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        time_key, mask_key = jax.random.split(key)
        time = jax.random.uniform(time_key, tokens.shape[:1], minval=low, maxval=high)
        masked = jax.random.uniform(mask_key, tokens.shape) < time[:, None]
        output, _ = plain(loaded)(params, jnp.where(masked, mask_id, tokens), time, jnp.ones_like(tokens))
        return jnp.mean(output.hidden.astype(jnp.float32), axis=1)

    found: list[np.ndarray] = []
    for first in range(0, len(rows), BATCH):
        part = rows[np.minimum(np.arange(first, first + BATCH), len(rows) - 1)]
        found.append(np.asarray(run(loaded.params, part, jax.random.fold_in(key, first))))
    return np.concatenate(found)[: len(rows)]


@dataclass(frozen=True, eq=False)
class Keys:
    """For each bank, the keys of every domain [domains * keys, width] with the domain of each, the hidden states of
    other text [rows, width], and the mean of those, which all are taken relative to."""

    of_domains: tuple[np.ndarray, ...]
    domain: np.ndarray
    of_others: tuple[np.ndarray, ...]
    centres: np.ndarray


def make_keys(config: TALoRA, loaded: Loaded, texts: Sequence[Packed], others: Packed, count: int, seed: int) -> Keys:
    """`count` keys of each domain in each bank, from its training rows, and as many of other text as there are rows."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    rows = np.concatenate([text.tokens[rng.integers(0, text.rows, count)] for text in texts])
    of_domains: list[np.ndarray] = []
    of_others: list[np.ndarray] = []
    for number in range(len(config.banks)):
        mine, other = (jax.random.fold_in(key, 2 * number + part) for part in (0, 1))
        of_domains.append(queries(config, loaded, rows, number, mine))
        of_others.append(queries(config, loaded, others.tokens, number, other))
    centres = np.stack([part.mean(axis=0) for part in of_others])
    return Keys(
        tuple(part - centre[None] for part, centre in zip(of_domains, centres)),
        np.repeat(np.arange(len(texts)), count),
        tuple(part - centre[None] for part, centre in zip(of_others, centres)),
        centres,
    )


def make_banks(
    config: TALoRA, adapters: Adapters, keys: Keys, *, distractors: int = 0, dealt: bool = False, seed: int = 0
) -> tuple[Bank, ...]:
    """The banks of `adapters`: every key of a domain finds that domain's adapter.

    distractors: so many adapters beside them, all banks together. Their keys lie between two hidden states of other
    text, so they are where queries are; an adapter of theirs is the first matrix of one domain's with the second of
    another's. dealt: adapters are dealt to the keys anew, so that what is retrieved is random.
    """
    rng = np.random.default_rng(seed)
    domains = int(keys.domain.max()) + 1
    made: list[Bank] = []
    for number, (mine, others) in enumerate(zip(keys.of_domains, keys.of_others)):
        owner = rng.permutation(keys.domain) if dealt else keys.domain
        a, b = (np.asarray(x)[number * domains : (number + 1) * domains] for x in (adapters.a, adapters.b))
        count = distractors // len(config.banks) + (number < distractors % len(config.banks))
        pair, share = rng.integers(0, len(others), (2, count)), rng.random((count, 1))
        between = share * others[pair[0]] + (1 - share) * others[pair[1]]
        noise = rng.normal(size=between.shape) * others.std(axis=0)[None] * 0.3
        first = rng.integers(0, domains, count)
        second = (first + rng.integers(1, domains, count)) % domains
        made.append(
            banking.filled(
                jnp.asarray(np.concatenate([mine, between + noise]), jnp.float32),
                jnp.asarray(a[np.concatenate([owner, first])]),
                jnp.asarray(b[np.concatenate([owner, second])]),
            )
        )
    return tuple(made)
