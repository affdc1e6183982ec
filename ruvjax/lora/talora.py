"""TALoRA: banks of tiny adapters for different noise levels, retrieved anew at each denoising step.

Each bank serves an interval of timesteps t, 0 to 1000 as the documents count them (1000: all masks): with the defaults
coarse above 700, domain above 300, fine below. Around a boundary both of its banks are searched and mixed, so that
nothing jumps from one step to the next. What is retrieved acts on the residual stream before one layer
(`core.residual`) or, with a layout (`lora.layout`), at any linear sites of any model.

The query is the hidden state of the previous denoising step (`lora.denoise` carries it), so retrieval costs no forward
pass of its own.

The name is also that of a method for quantized image diffusion (Zhao et al., CVPR 2025, arXiv:2505.21591), which
trains a few LoRAs for a 4-bit network and a router that picks one of them by timestep alone. Here the timestep picks a
bank and the text picks among its many thousand adapters; nothing is quantized, and there is no router to train.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ruvjax.core.adapted import Selected
from ruvjax.core.residual import Residual
from ruvjax.errors import ConfigError
from ruvjax.lora import adapter
from ruvjax.lora import bank as banking
from ruvjax.lora.bank import NONE, Bank
from ruvjax.lora.layout import Layout, selected

TIMESTEPS = 1000
EXACT = 100_000  # adapters of a bank up to which its keys are multiplied one by one
Weighting = Literal["similarity", "softmax"]
# (bank, queries [n, key_dim], k) -> (slots [n, k], similarity [n, k]); `bank.retrieve`, or `ann.search` of an index
Search = Callable[[Bank, jax.Array, int], tuple[jax.Array, jax.Array]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TALoRA:
    """Hashable: a static argument of jitted functions. Raises ConfigError.

    hidden:     width of the residual stream.
    banks:      (capacity, rank) of each bank, the one for the noisiest steps first; any number.
    boundaries: timesteps between the banks, descending, one less than banks. A bank serves boundary < t <= the one
                before; `width` is the half-width of the transition around each.
    layer:      the layer before which the adapters act.
    layout:     the linear sites at which they act instead; None: the residual stream.
    k:          adapters retrieved from a bank.
    weighting:  similarity: an adapter's output is scaled by the cosine of its key and the query, 0 where that is
                negative. softmax: by the softmax of the cosines over `temperature`. Times the share of the bank.
    """

    hidden: int
    banks: tuple[tuple[int, int], ...] = ((10_000, 8), (50_000, 4), (100_000, 2))
    boundaries: tuple[float, ...] = (700, 300)
    width: float = 50
    layer: int = 0
    layout: Layout | None = None
    k: int = 5
    weighting: Weighting = "similarity"
    temperature: float = 0.1

    def __post_init__(self):
        for name, value, low in (
            ("hidden", self.hidden, 1),
            ("layer", self.layer, 0),
            ("k", self.k, 1),
            *(("banks", part, 1) for pair in self.banks for part in pair),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"talora.{name}: {value!r} must be a whole number of at least {low}")
        if not self.banks or any(len(pair) != 2 for pair in self.banks):
            raise ConfigError(f"talora.banks={self.banks!r}", "one (capacity, rank) for each bank")
        if any(self.k > capacity for capacity, _ in self.banks):
            raise ConfigError(f"talora.k={self.k} is more than a bank of {self.banks!r} can hold", "a smaller k")
        if len(self.boundaries) != len(self.banks) - 1:
            raise ConfigError(
                f"talora.boundaries={self.boundaries!r} for {len(self.banks)} banks", "one less than banks"
            )
        edges = self.edges
        if not all(math.isfinite(edge) for edge in edges) or any(a <= b for a, b in zip(edges, edges[1:])):
            raise ConfigError(f"talora.boundaries={self.boundaries!r}", "descending, between 1000 and 0")
        inner = zip(self.boundaries, self.boundaries[1:])
        if not 0 <= self.width < math.inf or any(a - b < 2 * self.width for a, b in inner):
            raise ConfigError(
                f"talora.width={self.width!r}: transitions of {self.boundaries!r} overlap", "a smaller width"
            )
        if self.weighting not in get_args(Weighting):
            raise ConfigError(f"talora.weighting={self.weighting!r}", f"one of {', '.join(get_args(Weighting))}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"talora.temperature={self.temperature!r} must be positive")

    @property
    def edges(self) -> tuple[float | int, ...]:
        """Timesteps, descending: bank i serves edges[i + 1] < t <= edges[i]."""
        return (TIMESTEPS, *self.boundaries, 0)

    @property
    def rows(self) -> int:
        """Rows of an adapter's first matrix."""
        return self.hidden if self.layout is None else self.layout.rows

    @property
    def columns(self) -> int:
        """Columns of its second."""
        return self.hidden if self.layout is None else self.layout.columns

    def bank_of(self, t: float | int) -> int:
        """The bank that an adapter trained at timestep `t` is stored in."""
        return sum(t <= boundary for boundary in self.boundaries)


@struct.dataclass
class Hits:
    """What queries [batch, n] found in one bank: slots int32, -1 where nothing, the cosines, 0 there, the best first;
    and the share of the bank at the time of each row."""

    slots: Int[Array, "batch n k"]
    similarity: Float[Array, "batch n k"]
    share: Float[Array, "batch"]


def empty_banks(config: TALoRA, key_dim: int = 0) -> tuple[Bank, ...]:
    """Banks without adapters, in bfloat16."""
    return tuple(
        banking.empty(capacity, rank, config.rows, key_dim or config.hidden, columns=config.columns)
        for capacity, rank in config.banks
    )


def check(config: TALoRA, banks: Sequence[Bank]) -> None:
    """Raises ConfigError for banks of other sizes than the configuration's; says once where all of them are empty."""
    found = tuple((bank.capacity, bank.rank) for bank in banks)
    sizes, wanted = {(bank.rows, bank.columns) for bank in banks}, (config.rows, config.columns)
    if found != config.banks or sizes != {wanted}:
        raise ConfigError(
            f"banks of (capacity, rank) {found} and (rows, columns) {sorted(sizes)} for talora.banks={config.banks} "
            f"and {wanted}"
        )
    if not any(bool(jnp.any(bank.live)) for bank in banks):
        _say_empty()


_said: set[str] = set()


def _say_empty() -> None:
    if "empty" not in _said:
        _said.add("empty")
        _log.warning("all banks are empty: the model runs without adapters until some are stored")


def blend(config: TALoRA, t: Float[Array, "batch"]) -> Float[Array, "banks batch"]:
    """The share of each bank at timesteps `t`: within a transition (b + w - t) / (2 w) for the bank of the lower t and
    the rest for the other. They sum to 1."""

    def lower(boundary: float | int) -> jax.Array:
        if not config.width:
            return (t <= boundary).astype(jnp.float32)
        return jnp.clip((boundary + config.width - t) / (2 * config.width), 0.0, 1.0)

    past = [jnp.ones_like(t, jnp.float32), *map(lower, config.boundaries), jnp.zeros_like(t, jnp.float32)]
    return jnp.stack([before * (1 - after) for before, after in zip(past, past[1:])])


def retrieve(
    config: TALoRA,
    banks: Sequence[Bank],
    queries: Float[Array, "batch n key_dim"],
    t: Float[Array, "batch"],
    k: int,
    *,
    wanted: Bool[Array, "batch n"] | None = None,
    searches: Sequence[Search] = (),
) -> tuple[Hits, ...]:
    """The k most similar adapters of each bank that has a share at `t`; a bank that no row needs is not read.

    All queries of a step go into one call, because reading the keys is what it costs. wanted: queries that are to be
    answered (default: all). searches: how each bank is searched (default: exactly).
    """
    batch, n, dim = queries.shape
    wanted = jnp.ones((batch, n), bool) if wanted is None else wanted
    found: list[Hits] = []
    for number, (bank, share) in enumerate(zip(banks, blend(config, t), strict=True)):
        search = searches[number] if searches else banking.retrieve
        asked = wanted & (share > 0)[:, None]

        def look(bank: Bank, flat: jax.Array, search: Search = search) -> tuple[jax.Array, jax.Array]:
            return search(bank, flat, k)

        def skip(bank: Bank, flat: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.full((batch * n, k), NONE, jnp.int32), jnp.zeros((batch * n, k), jnp.float32)

        flat = queries.reshape(batch * n, dim).astype(jnp.float32)
        slots, similarity = (part.reshape(batch, n, k) for part in lax.cond(jnp.any(asked), look, skip, bank, flat))
        there = (slots != NONE) & asked[:, :, None]
        found.append(Hits(jnp.where(there, slots, NONE), jnp.where(there, similarity, 0), share))
    return tuple(found)


def weigh(config: TALoRA, hits: Hits) -> Float[Array, "batch n k"]:
    """What each hit counts, by `config.weighting` and the share of the bank; 0 where there is none."""
    there = hits.slots != NONE
    if config.weighting == "similarity":
        counts = jnp.maximum(hits.similarity, 0)
    else:
        # The best hit comes first: powers of differences to it overflow nowhere.
        power = jnp.exp((hits.similarity - hits.similarity[:, :, :1]) / config.temperature)
        power = jnp.where(there, power, 0)
        counts = power / jnp.maximum(jnp.sum(power, axis=-1, keepdims=True), 1e-30)
    return jnp.where(there, counts, 0) * hits.share[:, None, None]


def updates(config: TALoRA, banks: Sequence[Bank], hits: Sequence[Hits], k: int) -> tuple[Selected, ...]:
    """The first k hits of each row's first query as updates of its whole sequence."""
    return tuple(
        Selected(bank.a, bank.b, slots, weights)
        for bank, (slots, weights) in zip(banks, _of_rows(config, hits, k), strict=True)
    )


def _of_rows(config: TALoRA, hits: Sequence[Hits], k: int) -> list[tuple[jax.Array, jax.Array]]:
    """The first k slots of each row's first query, and what each counts."""
    found = [replace(hit, slots=hit.slots[:, :1, :k], similarity=hit.similarity[:, :1, :k]) for hit in hits]
    return [(hit.slots[:, 0], weigh(config, hit)[:, 0]) for hit in found]


def attached(config: TALoRA, params: Any, banks: Sequence[Bank], hits: Sequence[Hits]) -> Any:
    """`params` of a model, its layers stacked, with the first k hits of each row's first query at the sites of
    `config.layout`, or as its residual. What selects nothing, a query that is zero or empty banks, changes no bit."""
    slots, weights = zip(*_of_rows(config, hits, config.k))
    return placed(config, params, [(bank.a, bank.b) for bank in banks], slots, weights)


def placed(
    config: TALoRA,
    params: Any,
    factors: Sequence[tuple[jax.Array, jax.Array]],
    slots: Sequence[Int[Array, "batch k"]],
    weights: Sequence[Float[Array, "batch k"]],
) -> Any:
    """`params` with the adapters in `slots` of each bank, given by its factors, where `config` has them act."""
    if config.layout is None:
        update = tuple(Selected(a, b, at, counts) for (a, b), at, counts in zip(factors, slots, weights, strict=True))
        return replace(params, residual=Residual(update, config.layer))
    return adapter.attach(params, selected(config.layout, factors, slots, weights))
