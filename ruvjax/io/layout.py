"""What published checkpoints call things: tensor names and config.json of Llama, Qwen2, Qwen3, and of our own exports.

Mamba's are in `ruvjax.io.mamba_layout`. Published matrices are [outer, inner], one tensor a layer; ours are
[inner, outer] and stacked over layers. The tables here are the only place that knows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ruvjax.core.rope import RopeScaling
from ruvjax.errors import ConfigError, InputError, NotYetError
from ruvjax.io import mamba_layout
from ruvjax.io.mamba_layout import MAMBA2_PLACES, MAMBA_PLACES
from ruvjax.io.place import Place, dtype_of, number
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer

Network = Transformer | Mamba | Mamba2

FORMAT_VERSION = 1
ARCHITECTURE = "RuvjaxMaskedDiffusion"
MODEL_TYPE = "ruvjax_masked_diffusion"
FAMILIES = ("llama", "qwen2", "qwen3")


_LAYER = "model.layers.{}."
PLACES = {
    ".embedding": Place("model.embed_tokens.weight"),
    ".head": Place("lm_head.weight"),
    ".final_norm": Place("model.norm.weight"),
    ".layers.attention_norm": Place(_LAYER + "input_layernorm.weight"),
    ".layers.mlp_norm": Place(_LAYER + "post_attention_layernorm.weight"),
    ".layers.q": Place(_LAYER + "self_attn.q_proj.weight", True),
    ".layers.k": Place(_LAYER + "self_attn.k_proj.weight", True),
    ".layers.v": Place(_LAYER + "self_attn.v_proj.weight", True),
    ".layers.o": Place(_LAYER + "self_attn.o_proj.weight", True),
    ".layers.q_bias": Place(_LAYER + "self_attn.q_proj.bias"),
    ".layers.k_bias": Place(_LAYER + "self_attn.k_proj.bias"),
    ".layers.v_bias": Place(_LAYER + "self_attn.v_proj.bias"),
    ".layers.q_norm": Place(_LAYER + "self_attn.q_norm.weight"),
    ".layers.k_norm": Place(_LAYER + "self_attn.k_norm.weight"),
    ".layers.gate": Place(_LAYER + "mlp.gate_proj.weight", True),
    ".layers.up": Place(_LAYER + "mlp.up_proj.weight", True),
    ".layers.down": Place(_LAYER + "mlp.down_proj.weight", True),
    # Beyond the published layouts: time conditioning.
    ".layers.modulation": Place(_LAYER + "modulation.weight", True),
    ".layers.modulation_bias": Place(_LAYER + "modulation.bias"),
    ".time.first": Place("model.time.first.weight", True),
    ".time.second": Place("model.time.second.weight", True),
    ".time.final": Place("model.time.final.weight", True),
    ".time.final_bias": Place("model.time.final.bias"),
}


def places(model: Network) -> Mapping[str, Place]:
    """Where every weight that such a model may have lies, by its path in the parameter tree."""
    return {Transformer: PLACES, Mamba: MAMBA_PLACES, Mamba2: MAMBA2_PLACES}[type(model)]


OWN_KEYS = {"transformer": Transformer, "mamba": Mamba, "mamba2": Mamba2}


def own_config(model: Network, tokens: Mapping[str, int | None], diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an export: the hyper-parameters field by field, special token ids, and the diffusion settings.

    That of a Mamba that scans from left to right is one that transformers reads too.
    """
    own: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    if not isinstance(model, Transformer) and model.direction == "forward":
        own = mamba_layout.published_config(model)
    key = next(key for key, kind in OWN_KEYS.items() if isinstance(model, kind))
    return {
        **own,
        "format_version": FORMAT_VERSION,
        "vocab_size": model.vocab_size,
        **tokens,
        key: dataclasses.asdict(model),
        "diffusion": dict(diffusion),
    }


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether an export of ours holds this config.json."""
    family = config.get("model_type")
    published = family in mamba_layout.FAMILIES and family in config and "format_version" in config
    return family == MODEL_TYPE or published


def read_network(config: Mapping[str, Any], source: str) -> Network:
    """The hyper-parameters that the config.json at `source` describes, of whichever family.

    Raises InputError, naming `source`, for an unknown family and for whatever our models cannot express: a network that
    would load and compute something else is never returned.
    """
    try:
        if is_own(config):
            return _own_network(config, source)
        if config.get("model_type") in mamba_layout.FAMILIES:
            return mamba_layout.read_published(config, source)
    except ConfigError as error:
        raise InputError(f"{source}: {error}", error.hint) from error
    return read_transformer(config, source)


def read_transformer(config: Mapping[str, Any], source: str) -> Transformer:
    """`read_network` where only a transformer will do."""
    try:
        network = _own_network(config, source) if is_own(config) else _published_transformer(config, source)
    except ConfigError as error:
        raise InputError(f"{source}: {error}", error.hint) from error
    if not isinstance(network, Transformer):
        raise InputError(f"{source}: describes a {type(network).__name__}, not a transformer")
    return network


def _own_network(config: Mapping[str, Any], source: str) -> Network:
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{source}: format_version={version!r}, this ruvjax reads up to {FORMAT_VERSION}", "update ruvjax"
        )
    key = next((key for key in OWN_KEYS if key in config), "transformer")
    return _construct(OWN_KEYS[key], config.get(key), f"{source}: {key}")


def _construct(cls, values: Any, where: str):
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object")
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise InputError(f"{where}: {cls.__name__} has no {', '.join(unknown)}")
    if isinstance(values.get("rope_scaling"), dict):
        scaling = _construct(RopeScaling, values["rope_scaling"], f"{where}.rope_scaling")
        values = {**values, "rope_scaling": scaling}
    return cls(**values)


def _published_transformer(config: Mapping[str, Any], source: str) -> Transformer:
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join((*FAMILIES, *mamba_layout.FAMILIES, MODEL_TYPE))
        raise InputError(f"{source}: model_type={family!r} is not known", f"one of {known}")
    if config.get("quantization_config") is not None:
        raise NotYetError(f"{source}: quantized checkpoints cannot be read yet", "use the unquantized weights")
    _refuse_what_differs(config, family, source)
    heads = number(config, "num_attention_heads", source)
    theta, scaling = _rope(config, source)
    return Transformer(
        vocab_size=number(config, "vocab_size", source),
        layers=number(config, "num_hidden_layers", source),
        width=number(config, "hidden_size", source),
        heads=heads,
        kv_heads=number(config, "num_key_value_heads", source, heads),
        head_dim=number(config, "head_dim", source, 128 if family == "qwen3" else 0),
        mlp_width=number(config, "intermediate_size", source),
        max_length=number(config, "max_position_embeddings", source, 2048 if family == "llama" else 32768),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number(config, "rms_norm_eps", source, 1e-6),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_head=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype_of(config, source),
        unroll=config["num_hidden_layers"] <= 8,
    )


def _refuse_what_differs(config: Mapping[str, Any], family: str, source: str) -> None:
    layer_types = config.get("layer_types") or []
    window = config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types)
    biased = family != "qwen2" and (config.get("attention_bias") or config.get("mlp_bias"))
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    reasons = {
        "a hidden_act other than silu": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding-window attention": bool(window),
        "biases outside q, k and v (attention_bias, mlp_bias)": bool(biased),
        "partial rotary embeddings": partial not in (None, 1, 1.0),
    }
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{source}: {reason} cannot be expressed by this transformer")


def _rope(config: Mapping[str, Any], source: str) -> tuple[float, RopeScaling]:
    """Base and scaling, from either spelling: `rope_theta` and `rope_scaling`, or both inside `rope_parameters`."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{source}: rope settings must be an object, got {settings!r}")
    theta = float(number({**config, **settings}, "rope_theta", source, 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    length = number(config, "max_position_embeddings", source, 0)
    if kind in ("default", "dynamic"):
        # "dynamic" leaves the frequencies alone up to max_position_embeddings, which is where our context ends.
        return theta, RopeScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(
            f"{source}: rope scaling {kind!r} is not known", "one of default, dynamic, linear, llama3, yarn"
        )
    factor = float(number(settings, "factor", source))
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    original = int(number(settings, "original_max_position_embeddings", source, length))
    if kind == "llama3":
        low = float(number(settings, "low_freq_factor", source))
        high = float(number(settings, "high_freq_factor", source))
        return theta, RopeScaling("llama3", factor, original, low_freq=low, high_freq=high)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if settings.get(key) is not None:
            raise InputError(f"{source}: yarn with its own {key} cannot be expressed by this transformer")
    if settings.get("truncate") is False:
        raise InputError(f"{source}: yarn without truncation cannot be expressed by this transformer")
    fast, slow = float(settings.get("beta_fast") or 32), float(settings.get("beta_slow") or 1)
    return theta, RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow)
