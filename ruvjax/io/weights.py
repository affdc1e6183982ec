"""Tensors of safetensors files, whole or in shards, read into stacked parameters and written from them.

Nothing is read before every tensor that the model needs is known to be there in the right shape and dtype; then each
leaf is filled layer by layer in its final dtype, and where it is sharded only the parts that this process holds.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ruvjax.core.params import ParamSpec
from ruvjax.errors import InputError
from ruvjax.io.place import Place

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
IGNORED = ("rotary_emb.inv_freq", "masked_bias")  # buffers that old checkpoints carry and nobody reads

Shelf = Mapping[str, tuple[Path, Any]]


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError where it is missing or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", hint) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON", hint) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object", hint)
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def leaves(model: Any, table: Mapping[str, Place]) -> Iterator[tuple[Place, ParamSpec, bool]]:
    """The place, the declaration and whether it is stacked over layers, of every weight in pytree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=is_spec)
    for path, spec in flat:
        name = jax.tree_util.keystr(path)
        yield table[name], spec, name.startswith(".layers.")


def open_weights(folder: Path, stack: ExitStack) -> dict[str, tuple[Path, Any]]:
    """Every tensor name of the folder, with the opened file that holds it; `stack` closes them.

    Raises InputError where a file or a shard is missing or damaged.
    """
    if (folder / WEIGHTS).is_file():
        files, promised = [folder / WEIGHTS], {}
    elif (folder / INDEX).is_file():
        files, promised = _read_index(folder)
    else:
        other = next(iter([*folder.glob("*.gguf"), *folder.glob("*.bin"), *folder.glob("*.pt")]), None)
        hint = "is this a model folder?"
        if other is not None:
            hint = "name that file itself" if other.suffix == ".gguf" else "convert it to safetensors"
            hint = f"{other.name} is another format: {hint}"
        raise InputError(f"{folder}: holds no {WEIGHTS}", hint)
    shelf: dict[str, tuple[Path, Any]] = {}
    for path in files:
        try:
            opened = stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        shelf.update(dict.fromkeys(opened.keys(), (path, opened)))
    for name in promised:
        if name not in shelf or shelf[name][0].name != promised[name]:
            raise InputError(f"{folder / promised[name]}: tensor {name} is missing", f"{INDEX} promises it there")
    return shelf


def _read_index(folder: Path) -> tuple[list[Path], dict[str, str]]:
    path = folder / INDEX
    mapping = read_json(path, "download the folder again").get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{path}: has no weight_map", "download the folder again")
    for name in mapping.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path}: {name!r} is not the name of a shard in this folder")
        if not os.path.isfile(folder / name):  # unlike Path.is_file, False for a name that is too long
            raise InputError(f"{folder / name}: this shard is missing", "download the folder again")
    return [folder / name for name in sorted(set(mapping.values()))], mapping


def damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{path}: not a whole safetensors file ({reason})", "download or export it again")


@dataclass(frozen=True)
class _Stored:
    """One tensor that was found to be what the model asks for."""

    name: str
    path: Path
    opened: Any
    place: Place

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the weight in our orientation. Raises InputError where it is not finite."""
        try:
            array = self.opened.get_slice(self.name)[self.place.part(index)]
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error
        if not finite(array):
            raise InputError(f"{self.path}: {self.name} holds NaN or infinite numbers", "download or export it again")
        return self.place.read(array)


def finite(array: np.ndarray) -> bool:
    """Whether every number is finite: the exponent of none has all bits set.

    Over integers and in parts that stay in the cache, 5 to 30 times as fast as np.isfinite, which has no loop of its
    own for bfloat16.
    """
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize]
    limit = int(np.array(np.inf, array.dtype).view(bits))
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    magnitude = bits(np.iinfo(bits).max >> 1)
    return all(int(np.max(flat[i : i + 65536] & magnitude)) < limit for i in range(0, flat.size, 65536))


def read_params(
    model: Any, table: Mapping[str, Place], shelf: Shelf, folder: Path, dtype: str | None, shardings: Any = None
) -> tuple[Any, str]:
    """The parameters of `model`, and the dtypes they are stored in, such as "BF16".

    dtype: that of every leaf; by default the stored one. shardings: a pytree of `NamedSharding` like the parameters.
    Raises InputError where a tensor is missing, superfluous, of another shape or dtype, damaged or not finite.
    """
    used: set[str] = set()
    stored: set[str] = set()

    def find(place: Place, shape: tuple[int, ...], layer: int = 0) -> _Stored:
        name = place.name.format(layer)
        if name not in shelf and place.alias in shelf:
            name = place.alias
        if name not in shelf:
            raise InputError(f"{folder}: the weights lack {name}", "config.json describes a model that has it")
        path, opened = shelf[name]
        part = opened.get_slice(name)
        wanted = place.stored(shape)
        if part.get_shape() != wanted:
            raise InputError(f"{path}: {name} has shape {part.get_shape()}, config.json asks for {wanted}")
        if part.get_dtype() not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {part.get_dtype()}", f"one of {', '.join(DTYPES)}")
        used.add(name)
        stored.add(part.get_dtype())
        return _Stored(name, path, opened, place)

    found: list[tuple[list[_Stored], ParamSpec, bool, np.dtype]] = []
    for place, spec, stacked in leaves(model, table):
        if stacked:
            # The last layer first: config.json may promise any number of them, and lists are made after that.
            last = find(place, spec.shape[1:], model.layers - 1)
            tensors = [find(place, spec.shape[1:], layer) for layer in range(model.layers - 1)] + [last]
        else:
            tensors = [find(place, spec.shape)]
        kind = DTYPES[tensors[-1].opened.get_slice(tensors[-1].name).get_dtype()] if dtype is None else dtype
        found.append((tensors, spec, stacked, jnp.dtype(kind)))
    _refuse_unread(set(shelf) - used, folder, model, table)
    treedef = jax.tree.structure(model.spec(), is_leaf=is_spec)
    wanted = [None] * len(found) if shardings is None else treedef.flatten_up_to(shardings)
    arrays = [_leaf(*leaf, sharding) for leaf, sharding in zip(found, wanted, strict=True)]
    return treedef.unflatten(arrays), "/".join(sorted(stored))


def _leaf(tensors: list[_Stored], spec: ParamSpec, stacked: bool, dtype: np.dtype, sharding: Any) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        index = tuple(slice(*entry.indices(size)) for entry, size in zip(index, spec.shape))
        if not stacked:
            return tensors[0].read(index).astype(dtype, copy=False)
        chosen = tensors[index[0]]
        whole = np.empty([entry.stop - entry.start for entry in index], dtype)
        for i, tensor in enumerate(chosen):
            whole[i] = tensor.read(index[1:])
        return whole

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(spec.shape)))
    return jax.make_array_from_callback(spec.shape, sharding, cast(Any, part))


def _refuse_unread(names: set[str], folder: Path, model: Any, table: Mapping[str, Place]) -> None:
    """A tensor that nothing reads means that the network described is not the network stored."""
    names = {name for name in names if not name.endswith(IGNORED)}
    if model.tied_head:
        names.discard(table[".head"].name)
    if names:
        listed = ", ".join(sorted(names)[:3])
        raise InputError(
            f"{folder}: {len(names)} tensors have no place in the model, such as {listed}", "see config.json"
        )


def write_weights(
    folder: Path, model: Any, params: Any, table: Mapping[str, Place], max_shard_bytes: int, metadata: dict[str, str]
) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` (one tensor may be larger) and their index."""
    shards: list[list[tuple[str, jax.Array, Place]]] = [[]]
    room = max_shard_bytes
    for tensor in _tensors(model, params, table):
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
        save_file(arrays, folder / file, metadata)
        mapping.update(dict.fromkeys(arrays, file))
    if total > 1:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": mapping})


def _tensors(model: Any, params: Any, table: Mapping[str, Place]) -> Iterator[tuple[str, jax.Array, Place]]:
    """Name, value in our orientation, and place, of every tensor of the export."""
    for (place, spec, stacked), leaf in zip(leaves(model, table), jax.tree.leaves(params), strict=True):
        if leaf.shape != spec.shape:
            raise InputError(f"{place.name}: the parameters have shape {leaf.shape}, the model asks for {spec.shape}")
        if stacked:
            yield from ((place.name.format(layer), leaf[layer], place) for layer in range(model.layers))
        else:
            yield place.name, leaf, place
