"""Folders of tiny recursive models: model.safetensors with the official code's tensor names, and config.json.

The official implementation (SamsungSAILMontreal/TinyRecursiveModels) saves a torch state dict; stored as safetensors,
with any prefix before "inner.", `load_trm` reads it beside a config.json of ours. Nothing is unpickled.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ruvjax.core.files import write_folder
from ruvjax.core.params import ParamSpec
from ruvjax.errors import ConfigError, InputError
from ruvjax.models.trm import TinyRecursive, TinyRecursiveParams

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "tiny_recursive"
FORMAT_VERSION = 1

_LAYER = "inner.L_level.layers.{}."
# Our leaf: the official name, and whether it is stored [out, in].
_PLACES = {
    ".embedding": ("inner.embed_tokens.embedding_weight", False),
    ".head": ("inner.lm_head.weight", False),
    ".answer_start": ("inner.H_init", False),
    ".latent_start": ("inner.L_init", False),
    ".marks": ("inner.mark_emb.weight", False),
    ".copy.gate": ("inner.copy_gate.weight", False),
    ".copy.here": ("inner.copy_gate.bias", False),
    ".puzzles": ("inner.puzzle_emb.weights", False),
    ".layers.up": (_LAYER + "mlp.gate_up_proj.weight", True),
    ".layers.down": (_LAYER + "mlp.down_proj.weight", True),
    ".layers.mix_up": (_LAYER + "mlp_t.gate_up_proj.weight", True),
    ".layers.mix_down": (_LAYER + "mlp_t.down_proj.weight", True),
    ".layers.qkv": (_LAYER + "self_attn.qkv_proj.weight", True),
    ".layers.o": (_LAYER + "self_attn.o_proj.weight", True),
    ".layers.column_qkv": (_LAYER + "column_attn.qkv_proj.weight", True),
    ".layers.column_o": (_LAYER + "column_attn.o_proj.weight", True),
}
# Two logits there, of which the second (to continue) is never used: ours is row 0.
_HALT, _HALT_BIAS = "inner.q_head.weight", "inner.q_head.bias"


def to_official(model: TinyRecursive, params: TinyRecursiveParams) -> dict[str, np.ndarray]:
    """The tensors of `params` by their official names, as the official layout stores them."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        key, array = jax.tree_util.keystr(path), np.asarray(leaf)
        if key == ".halt":
            tensors[_HALT] = np.stack([array, np.zeros_like(array)])
        elif key == ".halt_bias":
            tensors[_HALT_BIAS] = np.repeat(array, 2)
        else:
            name, turned = _PLACES[key]
            if key.startswith(".layers."):
                for layer in range(model.layers):
                    tensors[name.format(layer)] = np.ascontiguousarray(array[layer].T if turned else array[layer])
            else:
                tensors[name] = np.ascontiguousarray(array)
    return tensors


def from_official(model: TinyRecursive, tensors: Mapping[str, np.ndarray], source: str) -> TinyRecursiveParams:
    """float32 parameters of `model` out of official tensors; `source` names them in errors.

    Raises InputError where a tensor is missing, has another shape, or has no place in the model.
    """
    short = {name[name.find("inner.") :] if "inner." in name else name: value for name, value in tensors.items()}
    used: set[str] = set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in short:
            raise InputError(f"{source}: the weights lack {name}", f"{CONFIG} describes a model that has it")
        array = np.asarray(short[name])
        if array.shape != shape:
            raise InputError(f"{source}: {name} has shape {list(array.shape)}, {CONFIG} asks for {list(shape)}")
        used.add(name)
        return array

    def leaf(path: Any, spec: ParamSpec) -> jax.Array:
        key = jax.tree_util.keystr(path)
        if key == ".halt":
            value = read(_HALT, (2, *spec.shape))[0]
        elif key == ".halt_bias":
            value = read(_HALT_BIAS, (2,))[:1]
        else:
            name, turned = _PLACES[key]
            if key.startswith(".layers."):
                shape = spec.shape[:0:-1] if turned else spec.shape[1:]
                stack = [read(name.format(layer), shape) for layer in range(model.layers)]
                value = np.stack([array.T if turned else array for array in stack])
            else:
                value = read(name, spec.shape)
        return jnp.asarray(value, jnp.float32)

    params = jax.tree_util.tree_map_with_path(leaf, model.spec(), is_leaf=lambda item: isinstance(item, ParamSpec))
    left = sorted(set(short) - used)
    if left:
        raise InputError(f"{source}: {len(left)} tensors have no place in the model like {left[0]}", f"see {CONFIG}")
    return params


def save_trm(
    folder: str | os.PathLike[str],
    model: TinyRecursive,
    params: TinyRecursiveParams,
    puzzles: Mapping[str, Any] | None = None,
    kind: str = MODEL_TYPE,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write `model` and `params` to `folder`, whole or not at all; `puzzles`, any JSON object, tells what it learned.

    kind: the model_type of config.json. files: further texts by name. An export already there is replaced; a folder
    that holds anything else is refused with InputError.
    """
    folder, texts = Path(os.path.abspath(folder)), dict(files or {})
    ours = {CONFIG, WEIGHTS, *texts}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= ours):
        raise InputError(f"{folder}: holds something other than an export of ours", "choose an empty or a new folder")
    config = {
        "model_type": kind,
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(model),
        "puzzle_source": dict(puzzles or {}),
    }

    def write(partial: Path) -> None:
        metadata = {"format": "pt", "ruvjax_format_version": str(FORMAT_VERSION)}
        save_file(to_official(model, jax.device_get(params)), partial / WEIGHTS, metadata)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")

    return write_folder(folder, write)


def load_trm(
    folder: str | os.PathLike[str], kind: str = MODEL_TYPE
) -> tuple[TinyRecursive, TinyRecursiveParams, dict[str, Any]]:
    """The model, its float32 parameters, and what it learned from. Raises InputError, naming the file, also where its
    model_type is not `kind`."""
    folder = Path(folder)
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "a model folder holds config.json") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON", "export the model again") from error
    if not isinstance(config, dict) or config.get("model_type") != kind:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{path}: model_type={found!r} is another kind of model", f"expected {kind!r}")
    if config.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(f"{path}: format_version={config['format_version']!r} is not known", "update ruvjax")
    puzzles = config.get("puzzle_source") or {}
    known = {field.name for field in dataclasses.fields(TinyRecursive)}
    settings = {name: value for name, value in config.items() if name in known}
    try:
        model = TinyRecursive(**settings)
    except (ConfigError, TypeError) as error:
        raise InputError(f"{path}: {error}", "export the model again") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder / WEIGHTS}: not a whole safetensors file ({reason})", "export it again") from error
    return model, from_official(model, tensors, str(folder / WEIGHTS)), puzzles
