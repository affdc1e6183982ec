"""Tensor names and config.json of Mamba and Mamba-2, as transformers publishes them."""

from collections.abc import Mapping
from typing import Any

from ruvjax.errors import InputError
from ruvjax.io.place import Place, dtype_of, number
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2

FAMILIES = ("mamba", "mamba2")
_LAYER = "backbone.layers.{}."
_MIXER = _LAYER + "mixer."


def _scan(field: str, mixer: str) -> dict[str, Place]:
    """What the scans of both versions have; `mixer` ends in a dot."""
    at = f".layers.{field}."
    return {
        at + "conv": Place(mixer + "conv1d.weight", taps=True),
        at + "conv_bias": Place(mixer + "conv1d.bias"),
        at + "a_log": Place(mixer + "A_log"),
        at + "skip": Place(mixer + "D"),
    }


def _first_scan(field: str, mixer: str) -> dict[str, Place]:
    at = f".layers.{field}."
    return _scan(field, mixer) | {
        at + "select": Place(mixer + "x_proj.weight", True),
        at + "dt": Place(mixer + "dt_proj.weight", True),
        at + "dt_bias": Place(mixer + "dt_proj.bias"),
    }


def _second_scan(field: str, mixer: str) -> dict[str, Place]:
    return _scan(field, mixer) | {f".layers.{field}.dt_bias": Place(mixer + "dt_bias")}


_COMMON = {
    ".embedding": Place("backbone.embeddings.weight", alias="backbone.embedding.weight"),
    ".head": Place("lm_head.weight"),
    ".final_norm": Place("backbone.norm_f.weight"),
    ".layers.norm": Place(_LAYER + "norm.weight"),
    ".layers.inward": Place(_MIXER + "in_proj.weight", True),
    ".layers.inward_bias": Place(_MIXER + "in_proj.bias"),
    ".layers.outward": Place(_MIXER + "out_proj.weight", True),
    ".layers.outward_bias": Place(_MIXER + "out_proj.bias"),
}
# The scan from right to left is beyond the published layouts.
MAMBA_PLACES = _COMMON | _first_scan("scan", _MIXER) | _first_scan("reverse", _MIXER + "reverse.")
MAMBA2_PLACES = (
    _COMMON
    | _second_scan("scan", _MIXER)
    | _second_scan("reverse", _MIXER + "reverse.")
    | {".layers.gated_norm": Place(_MIXER + "norm.weight")}
)
MARK = {Mamba: _MIXER.format(0) + "x_proj.weight", Mamba2: _MIXER.format(0) + "norm.weight"}
TITLE = {Mamba: "Mamba", Mamba2: "Mamba-2"}


def refuse_other_version(model: Mamba | Mamba2, names: Mapping[str, Any], source: str) -> None:
    """Raises InputError where config.json describes one version and the weights are the other's."""
    other = Mamba2 if isinstance(model, Mamba) else Mamba
    if MARK[type(model)] not in names and MARK[other] in names:
        found = f"the weights are {TITLE[other]}'s, config.json describes {TITLE[type(model)]}"
        raise InputError(f"{source}: {found}", "take config.json and the weights from the same model")


def published_config(model: Mamba | Mamba2) -> dict[str, Any]:
    """What transformers reads of a model that scans from left to right."""
    config = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "state_size": model.state,
        "conv_kernel": model.conv,
        "expand": model.expand,
        "layer_norm_epsilon": model.norm_eps,
        "use_bias": model.bias,
        "use_conv_bias": model.conv_bias,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": model.tied_head,
        "time_step_min": model.dt_min,
        "time_step_max": model.dt_max,
        "time_step_floor": model.dt_floor,
    }
    if isinstance(model, Mamba):
        own = {"time_step_rank": model.rank, "intermediate_size": model.inner}
        return {"architectures": ["MambaForCausalLM"], "model_type": "mamba", **config, **own}
    own = {"num_heads": model.heads, "head_dim": model.head_dim, "n_groups": model.groups, "chunk_size": 64}
    return {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", **config, **own}


def read_published(config: Mapping[str, Any], source: str) -> Mamba | Mamba2:
    """The hyper-parameters of a published config.json of model_type mamba or mamba2.

    Raises InputError for what our models cannot express, ConfigError for values that cannot be.
    """
    second = config["model_type"] == "mamba2"
    _refuse_what_differs(config, source)
    width, expand = number(config, "hidden_size", source), number(config, "expand", source, 2)
    layers = number(config, "num_hidden_layers", source)
    inner = number(config, "intermediate_size", source, expand * width)
    if inner != expand * width:
        raise InputError(f"{source}: intermediate_size={inner} is not expand * hidden_size = {expand * width}")
    shared = {
        "vocab_size": number(config, "vocab_size", source),
        "layers": layers,
        "width": width,
        "state": number(config, "state_size", source, 128 if second else 16),
        "conv": number(config, "conv_kernel", source, 4),
        "expand": expand,
        "dt_min": number(config, "time_step_min", source, 0.001),
        "dt_max": number(config, "time_step_max", source, 0.1),
        "dt_floor": number(config, "time_step_floor", source, 1e-4),
        "bias": bool(config.get("use_bias", False)),
        "conv_bias": bool(config.get("use_conv_bias", True)),
        "norm_eps": number(config, "layer_norm_epsilon", source, 1e-5),
        "tied_head": bool(config.get("tie_word_embeddings", not second)),
        "dtype": dtype_of(config, source),
        "unroll": isinstance(layers, int) and layers <= 8,
    }
    if not second:
        rank = config.get("time_step_rank", "auto")
        return Mamba(**shared, dt_rank=0 if rank == "auto" else number(config, "time_step_rank", source))
    head_dim, heads = number(config, "head_dim", source, 64), number(config, "num_heads", source, 128)
    if heads * head_dim != inner:
        raise InputError(f"{source}: num_heads * head_dim = {heads * head_dim} is not expand * hidden_size = {inner}")
    return Mamba2(**shared, head_dim=head_dim, groups=number(config, "n_groups", source, 8))


def _refuse_what_differs(config: Mapping[str, Any], source: str) -> None:
    limit = config.get("time_step_limit") or (0.0, float("inf"))
    unlimited = (float("inf"), {"__float__": "Infinity"})  # transformers writes the latter, for strict readers of JSON
    reasons = {
        "a hidden_act other than silu": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "a norm other than rms_norm": config.get("rms_norm") is False,
        f"time_step_limit={limit!r}": not (len(limit) == 2 and limit[0] == 0 and limit[1] in unlimited),
    }
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{source}: {reason} cannot be expressed by this model")
