"""adapter_config.json of PEFT in our terms and ours in its: modules, ranks and alphas.

Which modules a configuration means is decided as PEFT 0.21 decides it. What it asks for and we cannot do is refused by
name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruvjax.errors import InputError
from ruvjax.io.layout import Network, places
from ruvjax.io.place import integer, number
from ruvjax.lora.sites import LoraConfig, linear_sites

# Read here.
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "layers_to_transform", "layers_pattern", "init_lora_weights", "fan_in_fan_out",
}  # fmt: skip
# What changes nothing about a trained adapter: where it comes from, and settings of its training and of its first
# values. Settings whose switch is off (loftq_config, qalora_group_size) are among them.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "lora_dropout",
    "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# First values that leave the base weights as they were; the others (PiSSA, OLoRA, ...) move a part of them.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Module:
    """One module of transformers that multiplies: the site that it is here, which layer of it, and its shape here."""

    path: str
    layer: int
    inner: int
    outer: int
    name: str  # ours, "layers.3.q"


@dataclass(frozen=True)
class Described:
    """What adapter_config.json says about one module."""

    rank: int
    alpha: float


def read_modules(model: Network, model_type: str) -> dict[str, Module]:
    """Every module of the published model that multiplies and is a linear site here, by its name there."""
    found: dict[str, Module] = {}
    table = places(model, model_type)
    for path, spec in linear_sites(model).items():
        place, (inner, outer) = table[f".{path}"], spec.shape[-2:]
        stacked = spec.axes[0] == "layers"
        for layer in range(spec.shape[0] if stacked else 1):
            own = path.replace("layers.", f"layers.{layer}.", 1) if stacked else path
            name = place.name.format(layer).removesuffix(".weight")
            found[name] = Module(path, layer, inner, outer, own)
    return found


def refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Raise InputError for the first setting that is not read here and says something."""
    if config.get("peft_type") != "LORA":
        raise InputError(f"{source}: peft_type={config.get('peft_type')!r} cannot be read", "LORA can")
    for key, value in config.items():
        silent = value is None or value is False or value in ("none", [], {})
        if key not in _READ | _IDLE and not silent:
            raise InputError(f"{source}: {key}={value!r} cannot be expressed by these adapters")
    first = config.get("init_lora_weights")
    if first not in _KEEPS_BASE:
        hint = "let PEFT convert it (path_initial_model_for_weight_conversion)"
        raise InputError(f"{source}: init_lora_weights={first!r} changes the weights that are adapted", hint)
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(f"{source}: {key}={config[key]!r} must be true or false")
    # fan_in_fan_out says how the base's own weights lie: the factors of an adapter lie the same way in either case.


def read_described(config: Mapping[str, Any], modules: Mapping[str, Module], source: str) -> dict[str, Described]:
    """Rank and alpha of every module that the configuration targets, by PEFT's rules."""
    base = integer(config, "r", source, 8), number(config, "lora_alpha", source, 8)
    found: dict[str, Described] = {}
    for name in modules:
        if not _targeted(config, name, source) or _excluded(config, name, source):
            continue
        rank, alpha = (
            _by_pattern(config, key, name, default, source)
            for key, default in zip(("rank_pattern", "alpha_pattern"), base)
        )
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"{source}: the rank {rank!r} of {name} must be a positive integer")
        if not 0 < alpha < math.inf:
            raise InputError(f"{source}: the alpha {alpha!r} of {name} must be a positive number")
        found[name] = Described(rank, float(alpha))
    if not found:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
        targets = config.get("target_modules")
        raise InputError(f"{source}: target_modules={targets!r} fits no module of the model", f"it has {known}")
    return found


def _names(config: Mapping[str, Any], key: str, source: str) -> str | list[str]:
    value = config.get(key)
    if isinstance(value, str):
        return value
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source}: {key}={value!r} must be a list of names or a regular expression")
    return value


def _fits(patterns: str | list[str], name: str, key: str, source: str) -> bool:
    """A regular expression must fit the whole name; an entry of a list is the name, or its end after a dot."""
    if isinstance(patterns, str):
        return _matched(re.fullmatch, patterns, name, key, source) is not None
    return any(name == end or name.endswith(f".{end}") for end in patterns)


def _matched(match: Any, pattern: str, name: str, key: str, source: str) -> re.Match[str] | None:
    try:
        return match(pattern, name)
    except re.error as error:
        raise InputError(f"{source}: {key}={pattern!r} is no regular expression ({error})") from error


def _targeted(config: Mapping[str, Any], name: str, source: str) -> bool:
    targets = _names(config, "target_modules", source)
    if isinstance(targets, str):
        return targets == "all-linear" or _fits(targets, name, "target_modules", source)
    if name in targets:
        return True
    if not _fits(targets, name, "target_modules", source):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    patterns = _names(config, "layers_pattern", source)
    patterns = ([patterns] if isinstance(patterns, str) else patterns) or [r"[^.]*"]
    for pattern in patterns:
        found = _matched(re.match, rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name, "layers_pattern", source)
        if found is not None:
            return int(found["layer"]) in wanted
    return False


def _excluded(config: Mapping[str, Any], name: str, source: str) -> bool:
    patterns = _names(config, "exclude_modules", source)
    return bool(patterns) and _fits(patterns, name, "exclude_modules", source)


def _by_pattern(config: Mapping[str, Any], key: str, name: str, default: Any, source: str) -> Any:
    """The value of the first pattern that fits the end of `name`."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{source}: {key}={patterns!r} must map names to numbers")
    for pattern in patterns:
        if _matched(re.match, rf"(.*\.)?({pattern})$", name, key, source):
            return number(patterns, pattern, f"{source}: {key}")
    return default


def own_config(
    config: Mapping[str, Any], modules: Mapping[str, Module], described: Mapping[str, Described], source: str
) -> LoraConfig:
    """The configuration in our names: a site is named once where all its layers agree, else layer by layer."""
    named = {modules[name].name: what for name, what in described.items()}
    layers: dict[str, list[str]] = {}
    for module in modules.values():
        layers.setdefault(module.path, []).append(module.name)
    rank, alpha = integer(config, "r", source, 8), float(number(config, "lora_alpha", source, 8))

    def short(values: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, names in layers.items():
            here = {name: values[name] for name in names if name in values}
            agree = len(here) == len(names) and len(set(here.values())) == 1
            found |= {path: here[names[0]]} if agree else here
        return found

    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(short(dict.fromkeys(named, True))),
        rank_pattern=short({name: what.rank for name, what in named.items() if what.rank != rank}),
        alpha_pattern=short({name: what.alpha for name, what in named.items() if what.alpha != alpha}),
        rslora=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
    )


def peft_config(
    config: LoraConfig, model: Network, model_type: str, described: Mapping[str, Described], base_model: str
) -> dict[str, Any]:
    """What PEFT reads of `config`, with every module that has a rank or an alpha of its own named in full."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "target_modules": _targets(model, model_type, described),
        "rank_pattern": {name: what.rank for name, what in described.items() if what.rank != config.rank},
        "alpha_pattern": {name: what.alpha for name, what in described.items() if what.alpha != config.alpha},
        "modules_to_save": None,
    }


def _targets(model: Network, model_type: str, described: Mapping[str, Described]) -> list[str]:
    """Names that fit the described modules and no others: the last part of theirs where no other module ends so (the
    head of LLaDA is called ff_out, as a matrix of its layers is)."""
    modules = read_modules(model, model_type)
    every = {place.name.removesuffix(".weight") for place in places(model, model_type).values()}
    others = {name.rsplit(".", 1)[-1] for name in every if "{}" not in name and name not in modules}
    ends: dict[str, set[str]] = {}
    for name in modules:
        ends.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    found: list[str] = []
    for end, names in ends.items():
        here = names & set(described)
        found += [end] if here == names and end not in others else sorted(here)
    return found
