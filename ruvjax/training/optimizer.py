"""Optimisers and learning-rate schedules.

The optimiser is built for a learning rate of 1 and the step scales its updates by `learning_rate(config, step, total)`.
So `total` is data, not code: a run that plans its length from measured step time recompiles nothing.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ruvjax.core.params import ParamSpec
from ruvjax.errors import ConfigError
from ruvjax.training.adam_atan2 import scale_by_adam_atan2, sign_of_touched_rows

# Weights of a state space (models.mamba) that are one vector, or one short filter, a channel however they are shaped:
# decay would change their time scales, and to orthogonalise them means nothing.
PER_CHANNEL = ("a_log", "d", "dt_bias", "conv_bias")
FILTERS = ("conv", "conv_weight")
MATRIX = contrib.MuonDimensionNumbers(-2, -1)
MUON_RMS = 0.2  # update size of AdamW, so that AdamW's learning rates carry over (Liu et al. 2025, "Muon is scalable")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and parameter averaging.

    kind: "adamw"; "adam_atan2" (Everett et al. 2024; `eps` has no part in it); "lion" (Chen et al. 2023; wants about a
        tenth of AdamW's rate); "muon" (Jordan 2024) for matrices between hidden activations, AdamW for embeddings,
        heads and vectors. `b1` is Muon's momentum too. Whatever the kind, tables of puzzle vectors (axis "puzzles") go
        by the sign of their gradient.
    weight_decay: decoupled; on weights with two or more axes besides the stacked "layers" axis, never on norms,
        biases, scale vectors or a state space's per-channel weights.
    clip: the gradient's global norm is cut to it; 0 for no clipping.
    schedule: linear warm-up over `warmup_steps`, then "cosine" to `final_share * lr`; "wsd" (warm-up, stable, decay)
        constant until the last `decay_share` of all steps, then linear to `final_share * lr`; or "constant".
    ema: decay of the parameter average that is evaluated and exported (0 for none); starts as (1 + step) / (10 + step).
    puzzle_rate: the learning rate of puzzle vectors as a multiple of `lr`.
    """

    kind: str = "adamw"
    lr: float = 4e-3
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 60
    decay_share: float = 0.2
    final_share: float = 0.05
    ema: float = 0.0
    puzzle_rate: float = 1.0

    def __post_init__(self):
        choices = {"kind": ("adamw", "adam_atan2", "lion", "muon"), "schedule": ("cosine", "wsd", "constant")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)!r} is not known", f"one of {', '.join(allowed)}"
                )
        _check_integer("optimizer.warmup_steps", self.warmup_steps, 0)
        limits = {
            "lr": (0.0, float("inf"), "a positive number"),
            "eps": (0.0, 1.0, "a number in (0, 1)"),
            "b1": (None, 1.0, "a number in [0, 1)"),
            "b2": (None, 1.0, "a number in [0, 1)"),
            "ema": (None, 1.0, "a number in [0, 1)"),
            "weight_decay": (None, float("inf"), "a number of at least 0"),
            "clip": (None, float("inf"), "a number of at least 0"),
            "puzzle_rate": (None, float("inf"), "a number of at least 0"),
            "decay_share": (None, 1.000001, "a number in [0, 1]"),
            "final_share": (None, 1.000001, "a number in [0, 1]"),
        }
        for name, (above, below, allowed) in limits.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not value < below or not (value >= 0 if above is None else value > above):
                raise ConfigError(f"optimizer.{name}={value!r} must be {allowed}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")


def learning_rate(config: OptimizerConfig, step: jax.Array | int, total: jax.Array | int) -> jax.Array:
    """The learning rate of the update that follows `step` finished ones, in a run of `total` steps; both may be traced.

    During warm-up it does not depend on `total` (as long as `total >= warmup_steps`), which is what lets a run measure
    its speed before it fixes its length.
    """
    step, total = jnp.asarray(step, jnp.float32), jnp.asarray(total, jnp.float32)
    warmup = jnp.clip(jnp.minimum(config.warmup_steps, total), 1.0)
    warm = jnp.minimum(1.0, (step + 1.0) / warmup)
    if config.schedule == "constant":
        shape = jnp.ones_like(step)
    elif config.schedule == "cosine":
        progress = jnp.clip((step + 1.0 - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
        shape = config.final_share + (1.0 - config.final_share) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    else:
        length = jnp.maximum(config.decay_share * total, 1.0)
        progress = jnp.clip((step + 1.0 - (total - length)) / length, 0.0, 1.0)
        shape = 1.0 - (1.0 - config.final_share) * progress
    return config.lr * warm * shape


def build_optimizer(config: OptimizerConfig, spec: Any) -> optax.GradientTransformation:
    """Gradient clipping and the optimiser, for a learning rate of 1 (see the module's docstring).

    `spec` is the model's pytree of `ParamSpec` (`model.spec()`): the axes decide what decays and what Muon takes.
    """

    def by_spec(decide):
        return jax.tree_util.tree_map_with_path(decide, spec, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))

    decayed = by_spec(_decays)
    adamw = optax.adamw(1.0, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)
    if config.kind == "adamw":
        core = adamw
    elif config.kind == "adam_atan2":
        core = optax.chain(
            scale_by_adam_atan2(config.b1, config.b2),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale(-1.0),
        )
    elif config.kind == "lion":
        core = optax.lion(1.0, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed)
    else:
        muon = contrib.muon(
            1.0,
            beta=config.b1,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MATRIX, params),
            consistent_rms=MUON_RMS,
        )
        core = optax.partition({"muon": muon, "adamw": adamw}, by_spec(_muon_or_adamw))
    if any(_is_table(leaf) for leaf in jax.tree.leaves(spec, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))):
        signs = sign_of_touched_rows(config.weight_decay, config.puzzle_rate)
        labels = by_spec(lambda path, leaf: "signs" if _is_table(leaf) else "core")
        core = optax.partition({"signs": signs, "core": core}, labels)
    return optax.chain(optax.clip_by_global_norm(config.clip), core) if config.clip else core


def _inner_axes(leaf: ParamSpec) -> list[str | None]:
    """The axes of one weight, less the one that only stacks weights."""
    return [axis for axis in leaf.axes if axis != "layers"]


def _name(path: tuple[Any, ...]) -> str:
    """The attribute (or key) under which a leaf stands in its tree."""
    last = path[-1] if path else ""
    return str(getattr(last, "name", getattr(last, "key", last)))


def _is_table(leaf: ParamSpec) -> bool:
    return "puzzles" in leaf.axes


def _decays(path: tuple[Any, ...], leaf: ParamSpec) -> bool:
    return len(_inner_axes(leaf)) >= 2 and _name(path) not in PER_CHANNEL


def _muon_or_adamw(path: tuple[Any, ...], leaf: ParamSpec) -> str:
    """Muon takes [..., in, out] matrices between hidden activations; a vocabulary is not a hidden dimension."""
    inner = _inner_axes(leaf)
    matrix = len(inner) == 2 and "layers" not in leaf.axes[-2:] and not {"vocab", "puzzles"} & set(inner)
    return "muon" if matrix and _name(path) not in (*PER_CHANNEL, *FILTERS) else "adamw"
