"""What checkpoints call things: config.json of our own exports, and which published family another one belongs to.

The families' tensor names and settings are in `ruvjax.io.transformer_layout` and `ruvjax.io.mamba_layout`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruvjax.core.rope import RopeScaling
from ruvjax.errors import ConfigError, InputError
from ruvjax.io import mamba_layout, transformer_layout
from ruvjax.io.mamba_layout import MAMBA2_PLACES, MAMBA_PLACES
from ruvjax.io.place import Place
from ruvjax.io.transformer_layout import LLADA_PLACES, PLACES
from ruvjax.models.mamba import Mamba
from ruvjax.models.mamba2 import Mamba2
from ruvjax.models.transformer import Transformer

Network = Transformer | Mamba | Mamba2

FORMAT_VERSION = 1
ARCHITECTURE = "RuvjaxMaskedDiffusion"
MODEL_TYPE = "ruvjax_masked_diffusion"


@dataclass(frozen=True)
class ModelFiles:
    """What a model folder or a GGUF file holds beside the weights. Token ids are None where config.json names none.

    causal: whether the model was trained to predict from left to right. diffusion: the settings the export was trained
    with (schedule, timesteps), {} for published checkpoints. weights: the dtype of the stored matrices, as safetensors
    calls it. eos_token_id: the first of those that config.json names; eos_token_ids: all of those of
    generation_config.json and config.json, any of which ends a text.
    """

    folder: Path
    model_type: str
    weights: str
    causal: bool = False
    tokenizer: Path | None = None
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    diffusion: Mapping[str, Any] = field(default_factory=dict)


def places(model: Network, model_type: str) -> Mapping[str, Place]:
    """Where every weight that such a model may have lies, by its path in the parameter tree."""
    if model_type == "llada":
        return LLADA_PLACES
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


def is_causal(model: Network, config: Mapping[str, Any]) -> bool:
    """Whether the model was trained to predict from left to right. Exports of ours say so in their diffusion settings;
    without any, a Mamba that scans from left to right can do nothing else."""
    if config.get("model_type") in transformer_layout.FAMILIES:
        return config["model_type"] in transformer_layout.CAUSAL
    settings = config.get("diffusion")
    if isinstance(settings, dict) and settings:
        return settings.get("autoregressive") is True
    return not isinstance(model, Transformer) and model.direction == "forward"


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
    try:
        return cls(**values)
    except TypeError as error:  # a string where a number is compared
        raise InputError(f"{where}: {error}") from error


def _published_transformer(config: Mapping[str, Any], source: str) -> Transformer:
    family = config.get("model_type")
    if family not in transformer_layout.FAMILIES:
        known = ", ".join((*transformer_layout.FAMILIES, *mamba_layout.FAMILIES, MODEL_TYPE))
        raise InputError(f"{source}: model_type={family!r} is not known", f"one of {known}")
    return transformer_layout.read_published(config, source)
