"""Adapters over the parameters of any model: which sites, of which rank; attached, trained alone, merged.

An adapter is a dict from the path of a site, such as "layers.q", to the `Lora` there, stacked over layers as the weight
is. A layer of smaller rank than the largest of its site has columns of zeros in `a` and the same rows of zeros in `b`:
the gradient of either is a product with the other, so optimisation leaves them at zero.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.quant_matmul import QuantizedWeight
from ruvjax.core import params as core_params
from ruvjax.core.adapted import Adapted, Lora, Selected, column_norms, merged
from ruvjax.core.params import Model, ParamSpec, declare
from ruvjax.errors import ConfigError

EVERY = "all-linear"
TABLES = {"vocab", "puzzles", "marks"}  # axes of what is looked up or read out, not multiplied by `linear`
FILTERS = {"window", "state"}  # axes of convolutions and decays
# What transformers calls sites that have another name here.
ALIASES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "in_proj": "inward",
    "out_proj": "outward",
    "x_proj": "select",
    "dt_proj": "dt",
}


@dataclass(frozen=True)
class LoraConfig:
    """Where a model is adapted and how (Hu et al. 2021, arXiv:2106.09685); the names and rules are PEFT's.

    targets: sites by the end of their path: "q", "scan.select", "time.first", or "layers.3.q" for one layer; the names
        of transformers ("q_proj", "in_proj") mean the same sites; "all-linear" means every site of the layers.
    rank_pattern, alpha_pattern: other ranks and alphas by such names; where several fit, the longest one counts.
    rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) instead of alpha / rank.
    dora: train the length of every column of the weight apart (Liu et al. 2024, arXiv:2402.09353).
    init: of the factor `a`: "kaiming" (uniform within 1 / sqrt(inner)) or "gaussian" (deviation 1 / rank); `b` is 0.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    rank_pattern: dict[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = field(default_factory=dict, hash=False)
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"

    def __post_init__(self):
        for name, rank in {"rank": self.rank, **_named("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"adapter.{name}={rank!r} must be a positive integer")
        for name, alpha in {"alpha": self.alpha, **_named("alpha_pattern", self.alpha_pattern)}.items():
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ConfigError(f"adapter.{name}={alpha!r} must be a positive number")
        targets = cast(Any, self.targets)
        if not isinstance(targets, tuple) or not targets or not all(isinstance(name, str) for name in targets):
            raise ConfigError(f"adapter.targets={targets!r} must be a list of names", "such as [q, v]")
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"adapter.{name}={getattr(self, name)!r} must be true or false")
        if self.init not in ("kaiming", "gaussian"):
            raise ConfigError(f"adapter.init={self.init!r} is not known", "one of kaiming, gaussian")


def _named(pattern: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"adapter.{pattern}={values!r} must map names to numbers")
    return {f"{pattern}.{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class Site:
    """A linear site: its path in the parameters, the declaration of its weight, and the rank and alpha of each layer (of
    the one weight, where it is not stacked); rank 0 where the layer is not adapted."""

    path: str
    spec: ParamSpec
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def stacked(self) -> bool:
        return self.spec.axes[0] == "layers"

    @property
    def names(self) -> tuple[str, ...]:
        """The path of each layer's weight: "layers.0.q" and so on."""
        return _layer_names(self.path, self.spec)

    def scales(self, rslora: bool) -> tuple[float, ...]:
        """What each layer's product of factors is multiplied by; 0 where the layer is not adapted."""
        roots = [math.sqrt(rank) if rslora else rank for rank in self.ranks]
        return tuple(alpha / root if root else 0.0 for alpha, root in zip(self.alphas, roots))


def linear_sites(model: Model) -> dict[str, ParamSpec]:
    """Every weight of `model` that multiplies activations from the right, by its path: what can be adapted."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    found = {jax.tree_util.keystr(path)[1:]: spec for path, spec in flat}
    return {path: spec for path, spec in found.items() if _multiplies(spec)}


def _multiplies(spec: ParamSpec) -> bool:
    inner = [axis for axis in spec.axes if axis != "layers"]
    return len(inner) == 2 and not (TABLES | FILTERS) & set(inner)


def plan(config: LoraConfig, model: Model) -> dict[str, Site]:
    """The sites of `model` that `config` adapts, by path.

    Raises ConfigError, with the nearest right name, for a target that `model` has not, and for a pattern that fits no
    target.
    """
    specs = linear_sites(model)
    idle = {
        "targets": set(config.targets),
        "rank_pattern": {*config.rank_pattern},
        "alpha_pattern": {*config.alpha_pattern},
    }

    def numbers(path: str, name: str) -> tuple[int, float]:
        fitting = {target for target in config.targets if _fits(target, path, name)}
        if not fitting:
            return 0, 0.0
        rank, alpha = (_longest(pattern, path, name) for pattern in (config.rank_pattern, config.alpha_pattern))
        for kind, names in (("targets", fitting), ("rank_pattern", {rank}), ("alpha_pattern", {alpha})):
            idle[kind] -= names
        return config.rank_pattern.get(rank, config.rank), float(config.alpha_pattern.get(alpha, config.alpha))

    sites: dict[str, Site] = {}
    for path, spec in specs.items():
        ranks, alphas = zip(*(numbers(path, name) for name in _layer_names(path, spec)))
        if any(ranks):
            sites[path] = Site(path, spec, ranks, alphas)
    for kind, names in idle.items():
        known = specs if kind == "targets" else {path: specs[path] for path in sites}
        for name in sorted(names):
            what = "the model has no linear site" if kind == "targets" else "no target is called"
            raise ConfigError(f"adapter.{kind}: {what} {name!r}", _nearest(name, known))
    return sites


def _layer_names(path: str, spec: ParamSpec) -> tuple[str, ...]:
    if spec.axes[0] != "layers":
        return (path,)
    return tuple(path.replace("layers.", f"layers.{i}.", 1) for i in range(spec.shape[0]))


def _fits(pattern: str, path: str, name: str) -> bool:
    """Whether `pattern` is the end of the path of a site, or of its name in one layer."""
    if pattern == EVERY:
        return path.startswith("layers.")
    *front, last = pattern.split(".")
    ours = ".".join([*front, ALIASES.get(last, last)])
    return any(full == end or full.endswith(f".{end}") for full in (path, name) for end in (pattern, ours))


def _longest(patterns: Mapping[str, Any], path: str, name: str) -> str:
    """The longest pattern that fits, "" where none does."""
    return max((pattern for pattern in patterns if _fits(pattern, path, name)), key=len, default="")


def _nearest(name: str, specs: Mapping[str, ParamSpec]) -> str:
    """A hint: the name closest to `name`, or all short ones."""
    short = sorted({path.rsplit(".", 1)[-1] for path in specs})
    ends = {".".join(parts[i:]) for path in specs for parts in [path.split(".")] for i in range(len(parts))}
    layered = {full for path, spec in specs.items() for full in _layer_names(path, spec)}
    aliases = {alias for alias, ours in ALIASES.items() if ours in short}
    close = difflib.get_close_matches(name, [EVERY, *sorted(ends | layered | aliases)], n=1, cutoff=0.55)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(short)}"


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
    """The inverse of `merge`, up to rounding in the dtype of the weight; the parameters that `merge` was given are exact.

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
