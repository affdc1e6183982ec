"""Model folders: model.safetensors (or shards with an index), config.json, tokenizer.json.

`save_model` writes our own exports whole or not at all; `load_model` reads them and the published layouts of Llama,
Qwen2, Qwen3, Mamba and Mamba-2. Nothing is unpickled and no code from a checkpoint runs.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ruvjax.core.files import write_folder
from ruvjax.core.params import ParamSpec
from ruvjax.errors import InputError
from ruvjax.io.layout import FORMAT_VERSION, Network, is_own, own_config, places, read_network
from ruvjax.io.mamba_layout import refuse_other_version
from ruvjax.io.place import Place
from ruvjax.models.transformer import Transformer

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
IGNORED = ("rotary_emb.inv_freq", "masked_bias")  # buffers that old checkpoints carry and nobody reads


@dataclass(frozen=True)
class ModelFiles:
    """What a model folder holds beside the weights. Token ids are None where config.json names none.

    diffusion: the settings the export was trained with (schedule, timesteps), {} for published causal checkpoints.
    weights: the dtype of the stored matrices, as safetensors calls it.
    """

    folder: Path
    model_type: str
    weights: str
    tokenizer: Path | None = None
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    diffusion: Mapping[str, Any] = field(default_factory=dict)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of `folder` (or the file itself). Raises InputError where it is missing or is not a JSON object."""
    path = Path(folder)
    path = path / CONFIG if path.is_dir() else path
    return _read_json(path, "a model folder holds config.json and model.safetensors")


def load_model(folder: str | os.PathLike[str], dtype: str | None = None) -> tuple[Network, Any, ModelFiles]:
    """Read a model folder: hyper-parameters of whichever family, its parameters, and what else lies there.

    Parameters keep the dtype they are stored in unless `dtype` names one; the compute dtype is what config.json names.
    Raises InputError, naming the file, where one is missing, truncated, malformed or does not fit config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder", "give the folder that holds config.json")
    config = read_config(folder)
    source = str(folder / CONFIG)
    model = read_network(config, source)
    with ExitStack() as stack:
        shelf = _open_weights(folder, stack)
        if not isinstance(model, Transformer):
            refuse_other_version(model, shelf, str(folder))
        params, stored = _read_params(model, shelf, folder, dtype)
    diffusion = config.get("diffusion") or {}
    if not isinstance(diffusion, dict):
        raise InputError(f"{source}: diffusion must be an object")
    tokenizer = folder / TOKENIZER
    info = ModelFiles(
        folder=folder,
        model_type=config["model_type"],
        weights=stored,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        mask_token_id=_token(config, "mask_token_id", model, source),
        eos_token_id=_token(config, "eos_token_id", model, source),
        pad_token_id=_token(config, "pad_token_id", model, source),
        diffusion=diffusion,
    )
    return model, params, info


def save_model(
    folder: str | os.PathLike[str],
    model: Network,
    params: Any,
    tokenizer_file: str | os.PathLike[str] | None = None,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    diffusion: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `model` and `params` to `folder`; a reader finds the whole export there, the previous one, or none.

    Everything is written beside it, flushed to disk and then renamed. An export already in `folder` is replaced;
    a folder that holds anything else is refused with InputError. `diffusion` is any JSON object.
    """
    folder = Path(os.path.abspath(folder))
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise InputError(f"{tokenizer_file}: no such tokenizer file")
    _refuse_foreign(folder)
    tokens = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    config = own_config(model, tokens, diffusion or {})

    def write(partial: Path) -> None:
        _write_weights(partial, model, params, max_shard_bytes)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / TOKENIZER)
        _write_json(partial / CONFIG, config)

    return write_folder(folder, write)


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", hint) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON", hint) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object", hint)
    return value


def _token(config: Mapping[str, Any], key: str, model: Network, source: str) -> int | None:
    value = config.get(key)
    if isinstance(value, list) and value:
        value = value[0]  # several end-of-text ids: the first one ends a text
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < model.vocab_size:
        raise InputError(f"{source}: {key}={value!r} is not a token of a vocabulary of {model.vocab_size}")
    return value


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Every tensor name of the folder, with the opened file that holds it."""
    if (folder / WEIGHTS).is_file():
        files, promised = [folder / WEIGHTS], {}
    elif (folder / INDEX).is_file():
        files, promised = _read_index(folder)
    else:
        other = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.gguf")]), None)
        hint = f"{other.name} is another format: convert it to safetensors" if other else "is this a model folder?"
        raise InputError(f"{folder}: holds no {WEIGHTS}", hint)
    shelf: dict[str, tuple[Path, Any]] = {}
    for path in files:
        try:
            opened = stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        shelf.update(dict.fromkeys(opened.keys(), (path, opened)))
    for name in promised:
        if name not in shelf or shelf[name][0].name != promised[name]:
            raise InputError(f"{folder / promised[name]}: tensor {name} is missing", f"{INDEX} promises it there")
    return shelf


def _read_index(folder: Path) -> tuple[list[Path], dict[str, str]]:
    path = folder / INDEX
    mapping = _read_json(path, "download the folder again").get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{path}: has no weight_map", "download the folder again")
    for name in mapping.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path}: {name!r} is not the name of a shard in this folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: this shard is missing", "download the folder again")
    return [folder / name for name in sorted(set(mapping.values()))], mapping


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{path}: not a whole safetensors file ({reason})", "download or export it again")


def _leaves(model: Network) -> Iterator[tuple[Place, ParamSpec, bool]]:
    """The place, the declaration and whether it is stacked over layers, of every weight in pytree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    table = places(model)
    for path, spec in flat:
        name = jax.tree_util.keystr(path)
        yield table[name], spec, name.startswith(".layers.")


def _read_params(model: Network, shelf, folder: Path, dtype: str | None) -> tuple[Any, str]:
    used: set[str] = set()
    stored: set[str] = set()

    def read(place: Place, shape: tuple[int, ...], layer: int = 0) -> np.ndarray:
        name = place.name.format(layer)
        if name not in shelf and place.alias in shelf:
            name = place.alias
        if name not in shelf:
            raise InputError(f"{folder}: the weights lack {name}", f"{CONFIG} describes a model that has it")
        path, opened = shelf[name]
        part = opened.get_slice(name)
        wanted = place.stored(shape)
        if part.get_shape() != wanted:
            raise InputError(f"{path}: {name} has shape {part.get_shape()}, {CONFIG} asks for {wanted}")
        if part.get_dtype() not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {part.get_dtype()}", f"one of {', '.join(DTYPES)}")
        try:
            array = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        used.add(name)
        stored.add(part.get_dtype())
        return place.read(array)

    leaves = []
    for place, spec, stacked in _leaves(model):
        if stacked:
            # The last layer first: config.json may promise any number of them, and memory is asked for after that.
            last = read(place, spec.shape[1:], model.layers - 1)
            whole = np.empty(spec.shape, last.dtype if dtype is None else jnp.dtype(dtype))
            for layer in range(model.layers):
                whole[layer] = read(place, spec.shape[1:], layer)
        else:
            whole = read(place, spec.shape)
        leaves.append(jnp.asarray(whole, dtype=dtype))
    _refuse_unread(set(shelf) - used, folder, model)
    treedef = jax.tree.structure(model.spec(), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return treedef.unflatten(leaves), "/".join(sorted(stored))


def _refuse_unread(names: set[str], folder: Path, model: Network) -> None:
    """A tensor that nothing reads means that the network described is not the network stored."""
    names = {name for name in names if not name.endswith(IGNORED)}
    if model.tied_head:
        names.discard(places(model)[".head"].name)
    if names:
        listed = ", ".join(sorted(names)[:3])
        raise InputError(
            f"{folder}: {len(names)} tensors have no place in the model, such as {listed}", f"see {CONFIG}"
        )


def _tensors(model: Network, params: Any) -> Iterator[tuple[str, jax.Array, Place]]:
    """Name, value in our orientation, and place, of every tensor of the export."""
    for (place, spec, stacked), leaf in zip(_leaves(model), jax.tree.leaves(params), strict=True):
        if leaf.shape != spec.shape:
            raise InputError(f"{place.name}: the parameters have shape {leaf.shape}, the model asks for {spec.shape}")
        if stacked:
            yield from ((place.name.format(layer), leaf[layer], place) for layer in range(model.layers))
        else:
            yield place.name, leaf, place


def _write_weights(folder: Path, model: Network, params: Any, max_shard_bytes: int) -> None:
    shards: list[list[tuple[str, jax.Array, Place]]] = [[]]
    room = max_shard_bytes
    for tensor in _tensors(model, params):
        if shards[-1] and tensor[1].nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor[1].nbytes
    total = len(shards)
    mapping: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        arrays = {name: np.ascontiguousarray(place.write(np.asarray(x))) for name, x, place in shard}
        metadata = {"format": "pt", "ruvjax_format_version": str(FORMAT_VERSION)}  # "pt": the layout's own name
        save_file(arrays, folder / file, metadata)
        mapping.update(dict.fromkeys(arrays, file))
    if total > 1:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": mapping})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder", "choose another path")
    names = {path.name for path in folder.iterdir()}
    ours = {CONFIG, TOKENIZER, INDEX} | {name for name in names if name.endswith(".safetensors")}
    try:
        replaceable = not names or (names <= ours and is_own(read_config(folder)))
    except InputError:
        replaceable = False
    if not replaceable:
        raise InputError(f"{folder}: holds something other than an export of ours", "choose an empty or a new folder")
