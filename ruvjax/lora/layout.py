"""Banks whose adapters act at linear sites: where in the two factors of a bank each site has its part.

An adapter of a bank is one pair of matrices. Over several sites these are the factors of all of them, `a` one below the
other and `b` one beside the other, layer after layer, so that a bank stores, finds, evicts and saves it like an adapter
of the residual stream.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ruvjax.core.adapted import Lora, Selected
from ruvjax.core.params import Model
from ruvjax.errors import ConfigError
from ruvjax.lora.bank import NONE
from ruvjax.lora.sites import EVERY, LoraConfig, plan


@dataclass(frozen=True)
class Part:
    """One site: its path in the parameters, the axes before the matrix (that of layers, or none), which of the matrices
    along them are adapted, and the shape of one."""

    path: str
    lead: tuple[int, ...]
    adapted: tuple[int, ...]
    inner: int
    outer: int


@dataclass(frozen=True)
class Layout:
    """The sites of a bank in the order of its factors. Hashable."""

    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Rows of `a`."""
        return sum(len(part.adapted) * part.inner for part in self.parts)

    @property
    def columns(self) -> int:
        """Columns of `b`."""
        return sum(len(part.adapted) * part.outer for part in self.parts)


def layout(model: Model, targets: Sequence[str]) -> Layout:
    """The sites of `model` that `targets` name, as `LoraConfig.targets` does: "q", "layers.3.up", "all-linear".

    Raises ConfigError for a name that `model` has not, and for sites that see the time in place of positions: adapters
    are chosen by position. "all-linear" leaves those out.
    """
    sites = plan(LoraConfig(targets=tuple(targets)), model)
    of_time = [path for path in sites if path.startswith("time.") or path.endswith(".modulation")]
    if of_time and EVERY not in targets:
        raise ConfigError(
            f"{', '.join(of_time)}: adapters out of banks act where every position is seen", "other sites"
        )
    parts = [
        Part(
            path=path,
            lead=site.spec.shape[:-2],
            adapted=tuple(i for i, rank in enumerate(site.ranks) if rank),
            inner=site.spec.shape[-2],
            outer=site.spec.shape[-1],
        )
        for path, site in sites.items()
        if path not in of_time
    ]
    return Layout(tuple(parts))


def joined(
    layout: Layout, adapter: Mapping[str, Lora]
) -> tuple[Float[Array, "rows rank"], Float[Array, "rank columns"]]:
    """An adapter over these sites, of one rank and without magnitudes, as the two factors a bank stores; its scale goes
    into `b`.

    Raises ConfigError for other sites, shapes or several ranks, for DoRA, and for layers that the layout leaves out but
    the adapter does not.
    """
    if set(adapter) != {part.path for part in layout.parts}:
        raise ConfigError(
            f"an adapter of {', '.join(sorted(adapter))} for a bank of {', '.join(p.path for p in layout.parts)}"
        )
    rows: list[jax.Array] = []
    columns: list[jax.Array] = []
    rank = next(iter(adapter.values())).a.shape[-1]
    for part in layout.parts:
        update, count = adapter[part.path], math.prod(part.lead)
        if update.magnitude is not None:
            raise ConfigError(f"{part.path}: a DoRA update belongs to one adapter", "merge it into a model of its own")
        shapes = update.a.shape, update.b.shape
        wanted = (*part.lead, part.inner, rank), (*part.lead, rank, part.outer)
        if shapes != wanted:
            raise ConfigError(f"{part.path}: factors of {shapes} where a bank of rank {rank} holds {wanted}")
        a, b = (x.reshape(count, *x.shape[-2:]) for x in (update.a, update.b))
        scale = jnp.broadcast_to(jnp.asarray(update.scale), part.lead).reshape(count)
        if len(part.adapted) < count and bool(jnp.any(jnp.delete(scale, jnp.array(part.adapted)) != 0)):
            raise ConfigError(f"{part.path}: the adapter acts in layers that the bank has no room for")
        kept = jnp.array(part.adapted)
        rows.append(a[kept].reshape(-1, rank))
        columns.append(jnp.moveaxis(b[kept] * scale[kept, None, None], 0, 1).reshape(rank, -1))
    return jnp.concatenate(rows), jnp.concatenate(columns, axis=1)


def split(
    layout: Layout, a: Float[Array, "bank rows rank"], b: Float[Array, "bank rank columns"]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The factors of each site, [*, bank, inner, rank] and [*, bank, rank, outer], zero in layers left out."""
    found: dict[str, tuple[jax.Array, jax.Array]] = {}
    bank, row, column, rank = a.shape[0], 0, 0, a.shape[2]
    for part in layout.parts:
        count, kept = math.prod(part.lead), len(part.adapted)
        below, beside = row + kept * part.inner, column + kept * part.outer
        left = jnp.moveaxis(a[:, row:below].reshape(bank, kept, part.inner, rank), 1, 0)
        right = jnp.moveaxis(b[:, :, column:beside].reshape(bank, rank, kept, part.outer), 2, 0)
        if kept < count:
            at = jnp.array(part.adapted)
            left, right = (jnp.zeros((count, *x.shape[1:]), x.dtype).at[at].set(x) for x in (left, right))
        found[part.path] = (left.reshape(*part.lead, *left.shape[1:]), right.reshape(*part.lead, *right.shape[1:]))
        row, column = below, beside
    return found


def selected(
    layout: Layout,
    factors: Sequence[tuple[jax.Array, jax.Array]],
    slots: Sequence[Int[Array, "batch k"]],
    weights: Sequence[Float[Array, "batch k"]],
) -> dict[str, Selected]:
    """The adapters in `slots` of each bank (-1: none), for each row of a batch, as `lora.adapter.attach` takes them.

    factors: of each bank, [capacity, rows, rank] and [capacity, rank, columns]. What was selected is read out of the
    banks once, and is a small bank of its own for every site; where banks differ in rank the smaller one is filled up
    with zeros.
    """
    rank = max(a.shape[2] for a, _ in factors)

    def read(bank: tuple[jax.Array, jax.Array], at: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat, more = jnp.maximum(at, 0).reshape(-1), rank - bank[0].shape[2]
        pads = (((0, 0), (0, 0), (0, more)), ((0, 0), (0, more), (0, 0)))
        a, b = (jnp.pad(x[flat], pad) for x, pad in zip(bank, pads))
        return a.reshape(*at.shape, *a.shape[1:]), b.reshape(*at.shape, *b.shape[1:])

    a, b = (jnp.concatenate(parts, axis=1) for parts in zip(*(read(*pair) for pair in zip(factors, slots))))
    batch, k = a.shape[:2]
    there = jnp.concatenate(slots, axis=1) != NONE
    ids = jnp.where(there, jnp.arange(batch * k, dtype=jnp.int32).reshape(batch, k), NONE)
    counts = jnp.concatenate(weights, axis=1)
    sites = split(layout, a.reshape(batch * k, *a.shape[2:]), b.reshape(batch * k, *b.shape[2:]))
    return {
        part.path: Selected(
            *sites[part.path],
            ids=jnp.broadcast_to(ids, (*part.lead, batch, k)),
            weights=jnp.broadcast_to(counts, (*part.lead, batch, k)),
        )
        for part in layout.parts
    }
