"""Adapters over the parameters of any model: which sites, of which rank; attached, trained alone, merged.

An adapter is a dict from the path of a site, such as "layers.q", to the `Lora` there, stacked over layers as the weight
is. A layer of smaller rank than the largest of its site has columns of zeros in `a` and the same rows of zeros in `b`:
the gradient of either is a product with the other, so optimisation leaves them at zero.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul import QuantizedWeight
from ruvjax.core import params as core_params
from ruvjax.core.adapted import Adapted, Lora, Selected, column_norms, merged
from ruvjax.core.params import Model, declare
from ruvjax.errors import ConfigError
from ruvjax.lora.sites import LoraConfig, Site, plan


@dataclass(frozen=True)
class _Down:
    """Draws `a`: each layer's columns up to its rank, zeros beyond."""

    ranks: tuple[int, ...]
    gaussian: bool

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        ranks = jnp.asarray(self.ranks).reshape(*shape[:-2], 1, 1)
        if self.gaussian:
            drawn = jax.random.normal(key, shape) / jnp.maximum(ranks, 1)
        else:
            bound = 1 / math.sqrt(shape[-2])
            drawn = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        columns = jnp.arange(shape[-1]).reshape((1,) * (len(shape) - 1) + (-1,))
        return jnp.where(columns < ranks, drawn, 0)


@dataclass(frozen=True)
class _Fixed:
    """Numbers that are given, not drawn."""

    values: tuple[float, ...]

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(self.values, jnp.float32).reshape(shape)


@dataclass(frozen=True)
class Adapters:
    """The adapters of `config` over `model`, declared as a model's parameters are: `core.params.init`, `abstract` and
    `shardings` take it, and an optimiser is built for its `spec()`."""

    config: LoraConfig
    model: Model

    def spec(self) -> dict[str, Lora]:
        """Raises ConfigError as `plan` does."""
        return {path: self._site(site) for path, site in plan(self.config, self.model).items()}

    def _site(self, site: Site) -> Lora:
        (*lead, inner, outer), (*axes, inner_axis, outer_axis) = site.spec.shape, site.spec.axes
        rank = max(site.ranks)
        return Lora(
            a=declare(
                (*lead, inner, rank), (*axes, inner_axis, "rank"), _Down(site.ranks, self.config.init == "gaussian")
            ),
            b=declare((*lead, rank, outer), (*axes, "rank", outer_axis), "zeros"),
            scale=declare(tuple(lead), tuple(axes), _Fixed(site.scales(self.config.rslora))),
            magnitude=declare((*lead, outer), (*axes, outer_axis), "ones") if self.config.dora else None,
        )


def init(config: LoraConfig, model: Model, key: jax.Array, base: Any = None) -> dict[str, Lora]:
    """Adapters that change nothing yet: `b` is zero, and DoRA's magnitudes are the column lengths of `base`, the
    parameters of `model`, which only DoRA needs.

    Raises ConfigError as `plan` does, for DoRA without `base`, and where `base` does not fit `model`.
    """
    adapters: dict[str, Lora] = core_params.init(Adapters(config, model), key)
    if not config.dora:
        return adapters
    if base is None:
        raise ConfigError("DoRA starts from the column lengths of the weights", "pass base=the parameters")
    lengths = {path: column_norms(_bare(base, path, update)) for path, update in adapters.items()}
    return {path: dataclasses.replace(update, magnitude=lengths[path]) for path, update in adapters.items()}


def count(config: LoraConfig, model: Model) -> int:
    """Numbers that training the adapters of `config` changes."""
    total = 0
    for site in plan(config, model).values():
        inner, outer = site.spec.shape[-2:]
        total += sum(rank * (inner + outer) + (outer if config.dora else 0) for rank in site.ranks if rank)
    return total


def attach(params: Any, adapters: Mapping[str, Lora | Selected]) -> Any:
    """`params` with an `Adapted` leaf at each site of `adapters`: what `apply` of the model takes.

    `params` must hold its layers stacked (`core.params.unstack` comes after). Raises ConfigError for a site that is not
    there or is adapted already, and for factors of another shape.
    """
    for path, update in adapters.items():
        params = _put(params, path.split("."), Adapted(_bare(params, path, update), update))
    return params


def detach(params: Any) -> Any:
    """`params` without the updates that `attach` put beside the weights."""
    return jax.tree.map(
        lambda leaf: leaf.weight if isinstance(leaf, Adapted) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, (Adapted, QuantizedWeight)),
    )


def merge(params: Any, adapters: Mapping[str, Lora]) -> Any:
    """`params` with every update added into its weight, in the dtype of the weight: no cost at inference.

    Raises ConfigError as `attach` does, and for quantized weights, which could only be rounded anew.
    """
    for path, update in adapters.items():
        params = _put(params, path.split("."), merged(_dense(params, path, update), update))
    return params


def unmerge(params: Any, adapters: Mapping[str, Lora]) -> Any:
    """The inverse of `merge` up to rounding; the parameters that `merge` was given are the exact one.

    Raises ConfigError as `merge` does, and for DoRA, whose merged columns do not tell how long they were.
    """
    for path, update in adapters.items():
        if update.magnitude is not None:
            raise ConfigError(f"{path}: a merged DoRA update cannot be taken out", "keep the parameters from before")
        negative = dataclasses.replace(update, scale=-update.scale)
        params = _put(params, path.split("."), merged(_dense(params, path, update), negative))
    return params


def select(
    adapters: Sequence[Mapping[str, Lora]],
    ids: Int[Array, "batch k"] | Int[Array, "batch length k"],
    weights: Float[Array, "batch k"] | Float[Array, "batch length k"] | None = None,
) -> dict[str, Selected]:
    """Several adapters in one batch: row i (or position) gets the weighted sum of the adapters `ids[i]`, in the order
    of `adapters`; -1 is none. `attach` takes the result.

    Adapters may differ in sites and ranks. Raises ConfigError for none at all and for DoRA, whose columns belong to one
    adapter.
    """
    if not adapters:
        raise ConfigError("there is no adapter to select from")
    weights = jnp.ones(ids.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    found: dict[str, Selected] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        updates = [adapter.get(path) for adapter in adapters]
        present = [update for update in updates if update is not None]
        if any(update.magnitude is not None for update in present):
            raise ConfigError(
                f"{path}: DoRA adapters cannot be mixed in one batch", "merge each into a model of its own"
            )
        lead, rank = present[0].a.shape[:-2], max(update.a.shape[-1] for update in present)
        none = jax.tree.map(jnp.zeros_like, present[0])
        pairs = [_widened(none if update is None else update, rank) for update in updates]
        found[path] = Selected(
            a=jnp.stack([a for a, _ in pairs], axis=-3),
            b=jnp.stack([b for _, b in pairs], axis=-3),
            ids=jnp.broadcast_to(ids.astype(jnp.int32), (*lead, *ids.shape)),
            weights=jnp.broadcast_to(weights, (*lead, *ids.shape)),
        )
    return found


def _widened(update: Lora, rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors of `rank` whose product is the whole update, scale included."""
    more, still = rank - update.a.shape[-1], [(0, 0)] * (update.a.ndim - 2)
    b = update.b * jnp.asarray(update.scale, update.b.dtype)[..., None, None]
    return jnp.pad(update.a, [*still, (0, 0), (0, more)]), jnp.pad(b, [*still, (0, more), (0, 0)])


Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]


def objective_over(objective: Objective, base: Any) -> Objective:
    """An objective over model parameters as one over adapters of `base`, which stays as it is: what
    `training.step.make_step` and `gradient_of` take, with the adapters for parameters.

    No gradient of a weight of `base` is computed once the step is compiled.
    """

    def over(adapters: Any, carry: Any, batch: Any, key: jax.Array):
        return objective(attach(base, adapters), carry, batch, key)

    return over


def _at(params: Any, path: str) -> Any:
    found = params
    for name in path.split("."):
        if path.startswith("layers.") and isinstance(found, tuple):
            raise ConfigError("the layers of these parameters are unstacked", "attach or merge first, then unstack")
        found = getattr(found, name, None)
    if found is None:
        raise ConfigError(f"the parameters hold no weight at {path!r}", "adapters of another model?")
    return found


def _bare(params: Any, path: str, update: Lora | Selected) -> Any:
    """The weight at `path`, known to be of the shape that `update` is for."""
    weight = _at(params, path)
    if isinstance(weight, Adapted):
        raise ConfigError(f"{path} is adapted already", "detach first, or compose the updates into one")
    shape = (*update.a.shape[:-2], update.a.shape[-2], update.b.shape[-1])
    if isinstance(update, Selected):
        shape = (*shape[:-3], *shape[-2:])
    if weight.shape != shape or update.a.shape[-1] != update.b.shape[-2]:
        raise ConfigError(
            f"{path}: factors {update.a.shape} and {update.b.shape} do not fit a weight of shape {weight.shape}",
            "adapters of another model?",
        )
    return weight


def _dense(params: Any, path: str, update: Lora) -> jax.Array:
    weight = _bare(params, path, update)
    if isinstance(weight, QuantizedWeight):
        raise ConfigError(
            f"{path} is quantized ({weight.kind}): nothing can be merged into it", "attach, or read it unquantized"
        )
    return weight


def _put(params: Any, names: Sequence[str], leaf: Any) -> Any:
    name, *rest = names
    return dataclasses.replace(params, **{name: _put(getattr(params, name), rest, leaf) if rest else leaf})
