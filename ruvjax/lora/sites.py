"""Which linear sites of a model are adapted, and of which rank each layer is."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax

from ruvjax.core.params import Model, ParamSpec
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
    """A linear site: its path in the parameters, the declaration of its weight, rank and alpha of each layer (or of the
    one weight, where it is not stacked); rank 0 where the layer is not adapted."""

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
