"""Tensor names and config.json of Llama, Mistral, Qwen2 (2.5), Qwen3, Dream and LLaDA, as their authors publish them.

Published matrices are [outer, inner], one tensor a layer; ours are [inner, outer] and stacked over layers.
"""

from collections.abc import Mapping
from typing import Any

from ruvjax.core.rope import RopeScaling
from ruvjax.errors import InputError, NotYetError
from ruvjax.io.place import Place, dtype_of, integer, number
from ruvjax.models.transformer import Transformer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "Dream": "DreamModel",
    "llada": "LLaDAModelLM",
}
FAMILIES = tuple(ARCHITECTURES)
CAUSAL = ("llama", "mistral", "qwen2", "qwen3")  # the others are diffusion models: bidirectional attention

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
_BLOCK = "model.transformer.blocks.{}."
LLADA_PLACES = {
    ".embedding": Place("model.transformer.wte.weight"),
    ".head": Place("model.transformer.ff_out.weight"),
    ".final_norm": Place("model.transformer.ln_f.weight"),
    ".layers.attention_norm": Place(_BLOCK + "attn_norm.weight"),
    ".layers.mlp_norm": Place(_BLOCK + "ff_norm.weight"),
    ".layers.q": Place(_BLOCK + "q_proj.weight", True),
    ".layers.k": Place(_BLOCK + "k_proj.weight", True),
    ".layers.v": Place(_BLOCK + "v_proj.weight", True),
    ".layers.o": Place(_BLOCK + "attn_out.weight", True),
    ".layers.q_bias": Place(_BLOCK + "q_proj.bias"),
    ".layers.k_bias": Place(_BLOCK + "k_proj.bias"),
    ".layers.v_bias": Place(_BLOCK + "v_proj.bias"),
    ".layers.gate": Place(_BLOCK + "ff_proj.weight", True),
    ".layers.up": Place(_BLOCK + "up_proj.weight", True),
    ".layers.down": Place(_BLOCK + "ff_out.weight", True),
}


def read_published(config: Mapping[str, Any], source: str) -> Transformer:
    """The hyper-parameters of a published config.json whose model_type is one of `FAMILIES`.

    Raises InputError for what the transformer cannot express, ConfigError for values that cannot be.
    """
    if config.get("quantization_config") is not None:
        raise NotYetError(f"{source}: quantized checkpoints cannot be read yet", "use the unquantized weights")
    family = config["model_type"]
    if family == "llada":
        return _read_llada(config, source)
    _refuse_what_differs(config, family, source)
    heads, layers = integer(config, "num_attention_heads", source), integer(config, "num_hidden_layers", source)
    theta, scaling = _rope(config, source)
    # The class's own default stands where the key is absent, the number of heads where it is null.
    kv_heads = heads if family != "mistral" or "num_key_value_heads" in config else 8
    return Transformer(
        vocab_size=integer(config, "vocab_size", source),
        layers=layers,
        width=integer(config, "hidden_size", source),
        heads=heads,
        kv_heads=integer(config, "num_key_value_heads", source, kv_heads),
        head_dim=integer(config, "head_dim", source, 128 if family == "qwen3" else 0),
        mlp_width=integer(config, "intermediate_size", source),
        max_length=integer(config, "max_position_embeddings", source, 2048 if family == "llama" else 32768),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=number(config, "rms_norm_eps", source, 1e-6),
        qkv_bias=family in ("qwen2", "Dream"),
        qk_norm=family == "qwen3",
        window=_window(config, family, layers, source),
        shift=family == "Dream",
        tied_head=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype_of(config, source),
        unroll=layers <= 8,
    )


def family_of(model: Transformer) -> str:
    """The causal family, or Dream for shifted logits, whose hyper-parameters those of `model` are."""
    if model.shift:
        return "Dream"
    return "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "mistral" if model.window else "llama"


def published_config(model: Transformer, family: str, source: str) -> dict[str, Any]:
    """config.json of `model` as `family` publishes it. Raises InputError, naming `source`, where the family differs."""
    _refuse_to_write(model, family, source)
    shared = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "dtype": "float32" if model.dtype == "auto" else model.dtype,
        "use_cache": family in CAUSAL,
    }
    if family == "llada":
        return shared | _llada_config(model)
    config = shared | {
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "head_dim": model.dim_per_head,
        "max_position_embeddings": model.max_length,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tied_head,
        "rope_parameters": {"rope_theta": model.rope_theta, **_scaling_config(model.rope_scaling)},
        "attention_dropout": 0.0,
    }
    if model.rope_scaling.kind != "none":  # the spelling of transformers 4, which would pass over the other one
        config["rope_scaling"] = _scaling_config(model.rope_scaling)
    if family == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    config["sliding_window"] = model.window or None
    if family == "mistral":
        return config
    config |= {"use_sliding_window": bool(model.window), "max_window_layers": 0 if model.window else model.layers}
    return config | ({"attention_bias": False} if family == "qwen3" else {})


def _refuse_to_write(model: Transformer, family: str, source: str) -> None:
    biased, kinds = family in ("qwen2", "Dream"), ("none", "linear", "llama3", "yarn")
    reasons = {
        f"time={model.time!r}": model.time != "none",
        f"norm={model.norm!r}": model.norm != "rms",
        f"mlp={model.mlp!r}": model.mlp != "swiglu",
        f"qkv_bias={model.qkv_bias}": family != "llada" and model.qkv_bias != biased,
        f"qk_norm={model.qk_norm}": model.qk_norm != (family == "qwen3"),
        f"shift={model.shift}": model.shift != (family == "Dream"),
        f"window={model.window}": bool(model.window) and family not in ("mistral", "qwen2", "qwen3"),
        f"rope_scaling.kind={model.rope_scaling.kind!r}": model.rope_scaling.kind
        not in (("none",) if family == "llada" else kinds),
        f"head_dim={model.dim_per_head}": family in ("llada", "Dream")
        and model.dim_per_head * model.heads != model.width,
    }
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{source}: model.{reason} is not what {family} can be", "save_model writes any model")


def _refuse_what_differs(config: Mapping[str, Any], family: str, source: str) -> None:
    biased = family not in ("qwen2", "Dream") and (config.get("attention_bias") or config.get("mlp_bias"))
    settings = config.get("rope_parameters")
    settings = settings if isinstance(settings, dict) else {}
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    reasons = {
        "a hidden_act other than silu": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "biases outside q, k and v (attention_bias, mlp_bias)": bool(biased),
        "partial rotary embeddings": partial not in (None, 1, 1.0),
    }
    _refuse(reasons, source)


def _refuse(reasons: Mapping[str, bool], source: str) -> None:
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{source}: {reason} cannot be expressed by this transformer")


def _window(config: Mapping[str, Any], family: str, layers: int, source: str) -> int:
    """The width of the window that every layer attends to, 0 where none has one."""
    width = integer(config, "sliding_window", source, 0)
    if family == "mistral" and "sliding_window" not in config:
        width = 4096
    kinds = config.get("layer_types")
    if kinds is not None:
        windowed = isinstance(kinds, list) and kinds.count("sliding_attention")
        if not isinstance(kinds, list) or kinds.count("full_attention") + windowed < len(kinds):
            raise InputError(f"{source}: layer_types={kinds!r} is not known", "full_attention or sliding_attention")
        mixed = 0 < windowed < len(kinds)
    else:
        switched = family == "mistral" or bool(config.get("use_sliding_window"))
        first = integer(config, "max_window_layers", source, 28) if family in ("qwen2", "qwen3", "Dream") else 0
        windowed = switched and width and first < layers
        mixed = windowed and first > 0
    if not windowed:
        return 0
    if mixed:
        raise InputError(f"{source}: sliding-window attention in some layers cannot be expressed by this transformer")
    if family in ("llama", "Dream"):
        raise InputError(f"{source}: sliding-window attention is not what {family} can be")
    return width


def _rope(config: Mapping[str, Any], source: str) -> tuple[float, RopeScaling]:
    """Base and scaling, from either spelling: `rope_theta` and `rope_scaling`, or both inside `rope_parameters`."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{source}: rope settings must be an object, got {settings!r}")
    theta = float(number({**config, **settings}, "rope_theta", source, 10000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    length = integer(config, "max_position_embeddings", source, 0)
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
    original = integer(settings, "original_max_position_embeddings", source, length)
    if kind == "llama3":
        low = float(number(settings, "low_freq_factor", source))
        high = float(number(settings, "high_freq_factor", source))
        return theta, RopeScaling("llama3", factor, original, low_freq=low, high_freq=high)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if settings.get(key) is not None:
            raise InputError(f"{source}: yarn with its own {key} cannot be expressed by this transformer")
    if settings.get("truncate") is False:
        raise InputError(f"{source}: yarn without truncation cannot be expressed by this transformer")
    fast, slow = float(number(settings, "beta_fast", source, 32)), float(number(settings, "beta_slow", source, 1))
    return theta, RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow)


def _scaling_config(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    config: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        config["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        config |= {"low_freq_factor": scaling.low_freq, "high_freq_factor": scaling.high_freq}
    if scaling.kind == "yarn":
        config |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return config


def _read_llada(config: Mapping[str, Any], source: str) -> Transformer:
    norm_bias = config.get("bias_for_layer_norm")
    _refuse(
        {
            "a block_type other than llama": config.get("block_type", "sequential") != "llama",
            "an activation_type other than silu": config.get("activation_type", "swiglu") != "silu",
            "a layer_norm_type other than rms": config.get("layer_norm_type", "default") != "rms",
            "norms without weights": config.get("layer_norm_with_affine", True) is False,
            "attention_layer_norm": bool(config.get("attention_layer_norm", False)),
            "positions other than rope": not config.get("rope", False) or bool(config.get("alibi", False)),
            "biases outside q, k and v": bool(config.get("include_bias", False)) or bool(norm_bias),
            "input_emb_norm": bool(config.get("input_emb_norm", False)),
            "scale_logits": bool(config.get("scale_logits", False)),
            "layers in groups (block_group_size)": config.get("block_group_size", 1) != 1,
        },
        source,
    )
    heads, layers, width = (integer(config, key, source) for key in ("n_heads", "n_layers", "d_model"))
    ratio = integer(config, "mlp_ratio", source, 4)
    vocabulary = integer(config, "vocab_size", source, 50257)
    return Transformer(
        # The table may be longer than the vocabulary, and the logits are as many as it has rows.
        vocab_size=integer(config, "embedding_size", source, vocabulary if "embedding_size" in config else 50304),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=integer(config, "n_kv_heads", source, 1 if config.get("multi_query_attention") else heads),
        mlp_width=integer(config, "mlp_hidden_size", source, ratio * width),
        max_length=integer(config, "max_sequence_length", source, 1024),
        rope_theta=float(number(config, "rope_theta", source, 10000.0)),
        norm_eps=number(config, "rms_norm_eps", source, 1e-5),
        qkv_bias=bool(config.get("include_qkv_bias", False)),
        tied_head=bool(config.get("weight_tying", True)),
        dtype=dtype_of(config, source),
        unroll=layers <= 8,
    )


def _llada_config(model: Transformer) -> dict[str, Any]:
    return {
        "embedding_size": model.vocab_size,
        "d_model": model.width,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": model.key_heads,
        "mlp_hidden_size": model.mlp_width,
        "max_sequence_length": model.max_length,
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": model.qkv_bias,
        "input_emb_norm": False,
        "rope": True,
        "alibi": False,
        "scale_logits": False,
        "weight_tying": model.tied_head,
        "block_group_size": 1,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    }
