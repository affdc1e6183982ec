"""PEFT adapter folders, adapter_config.json and adapter_model.safetensors, in and out: LoRA, rsLoRA and DoRA.

Matrices lie transposed there, one module a layer under the names of transformers; which modules, ranks and alphas there
are is decided as PEFT decides it. What the configuration asks for and this cannot do is refused by name.
"""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ruvjax.core.adapted import Lora
from ruvjax.core.files import write_folder
from ruvjax.errors import InputError
from ruvjax.io.layout import Network
from ruvjax.io.peft_config import (
    Described,
    Module,
    own_config,
    peft_config,
    read_described,
    read_modules,
    refuse_unsupported,
)
from ruvjax.io.weights import DTYPES, damaged, finite, read_json, write_json
from ruvjax.lora.sites import LoraConfig, plan
from ruvjax.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = 1
_PREFIX = "base_model.model."
_MARK = "ruvjax_format_version"
_HINT = "an adapter folder holds adapter_config.json and adapter_model.safetensors"
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(\.weight)?)")
# Modules of Mamba whose weight transformers takes out of them: PEFT refuses to adapt the first, and at the second its
# adapter stays zero and would do nothing.
_PASSED_BY = ("out_proj", "dt_proj")


def load_adapter(
    folder: str | os.PathLike[str], model: Network, model_type: str = "", dtype: str = "float32"
) -> tuple[dict[str, Lora], LoraConfig]:
    """Read a PEFT folder for `model`: its adapters, as `lora.adapter.attach` takes them, and the configuration that
    makes such adapters.

    model_type: that of the model's folder (`ModelFiles.model_type`), by which LLaDA's names differ. The dropout that an
    adapter was trained with is passed over. Raises InputError, naming the file, where one is missing, damaged or not
    finite, where a module is unknown, lacks a factor or has another shape than its rank says, and for whatever the
    configuration asks for that is not LoRA, rsLoRA or DoRA on linear modules.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder", _HINT)
    config = read_json(folder / CONFIG, _HINT)
    source = str(folder / CONFIG)
    refuse_unsupported(config, source)
    modules = read_modules(model, model_type)
    described = read_described(config, modules, source)
    own = own_config(config, modules, described, source)
    tensors = _read(folder / WEIGHTS, modules, described, own.dora)
    found: dict[str, Lora] = {}
    for path, site in plan(own, model).items():
        (*lead, inner, outer), rank = site.spec.shape, max(site.ranks)
        a, b = np.zeros((*lead, inner, rank), np.float32), np.zeros((*lead, rank, outer), np.float32)
        magnitude = np.zeros((*lead, outer), np.float32)
        for name in described:
            if (module := modules[name]).path != path:
                continue
            if not isinstance(model, Transformer) and name.endswith("dt_proj"):
                if own.dora or np.any(tensors[f"{name}.lora_B"]):
                    raise _passed_by(str(folder / WEIGHTS), name)
            at = (module.layer,) if site.stacked else ()
            own_rank = described[name].rank
            a[(*at, slice(None), slice(own_rank))] = tensors[f"{name}.lora_A"].T
            b[(*at, slice(own_rank))] = tensors[f"{name}.lora_B"].T
            if own.dora:
                magnitude[at] = tensors[f"{name}.lora_magnitude_vector"]
        scale = jnp.asarray(site.scales(own.rslora), jnp.float32).reshape(lead)
        factors = [jnp.asarray(x, dtype) for x in (a, b, magnitude)]
        found[path] = Lora(factors[0], factors[1], scale, factors[2] if own.dora else None)
    return found, own


def save_adapter(
    folder: str | os.PathLike[str],
    model: Network,
    adapters: Mapping[str, Lora],
    config: LoraConfig,
    model_type: str = "",
    base_model: str = "",
) -> Path:
    """Write `adapters`, made by `config` over `model`, as a PEFT folder that PEFT loads; whole or not at all.

    base_model: the name or folder of the model that PEFT shall load them onto. An adapter folder of ours is replaced.
    Raises InputError where the adapters are not such as `config` makes or are not finite, for sites that have no effect
    there (Mamba's output and step projections), and where `folder` holds something that ruvjax did not write.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_foreign(folder)
    modules = read_modules(model, model_type)
    sites = plan(config, model)
    if set(sites) != set(adapters):
        odd = ", ".join(sorted(set(sites) ^ set(adapters)))
        raise InputError(
            f"{folder}: adapters and configuration differ in {odd}", "give the configuration they were made by"
        )
    names = {(module.path, module.layer): name for name, module in modules.items()}
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, Described] = {}
    for path, site in sites.items():
        update = adapters[path]
        _check_fit(update, site.ranks, site.scales(config.rslora), config.dora, f"{folder}: {path}")
        whole = [np.asarray(x) for x in (update.a, update.b)]
        for layer, (rank, alpha) in enumerate(zip(site.ranks, site.alphas)):
            if not rank:
                continue
            name, at = names[path, layer], (layer,) if site.stacked else ()
            if not isinstance(model, Transformer) and name.endswith(_PASSED_BY):
                raise _passed_by(str(folder), name)
            described[name] = Described(rank, alpha)
            tensors[f"{name}.lora_A.weight"] = whole[0][at][:, :rank].T
            tensors[f"{name}.lora_B.weight"] = whole[1][at][:rank].T
            if config.dora:
                tensors[f"{name}.lora_magnitude_vector"] = np.asarray(update.magnitude)[at]
    for name, array in tensors.items():
        if not finite(array):
            raise InputError(f"{folder}: {name} holds NaN or infinite numbers", "nothing was written")

    def write(partial: Path) -> None:
        arrays = {_PREFIX + name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(arrays, partial / WEIGHTS, {"format": "pt", _MARK: str(FORMAT_VERSION)})
        write_json(partial / CONFIG, peft_config(config, model, model_type, described, base_model))

    return write_folder(folder, write)


def _passed_by(source: str, name: str) -> InputError:
    hint = "leave it out of the targets, or merge it into the weights"
    return InputError(f"{source}: an adapter of {name} has no effect in transformers", hint)


def _read(
    path: Path, modules: Mapping[str, Module], described: Mapping[str, Described], dora: bool
) -> dict[str, np.ndarray]:
    """Every factor by "module.part", in float32 and as it lies there, known to be what the configuration describes."""
    with ExitStack() as stack:
        if not path.is_file():
            raise InputError(f"{path}: no such file", _HINT)
        try:
            opened = stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
        stored = {_known(key, modules, described, path): key for key in opened.keys()}
        parts = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ()))
        tensors: dict[str, np.ndarray] = {}
        for name, what in described.items():
            module = modules[name]
            shapes = ([what.rank, module.inner], [module.outer, what.rank], [module.outer])
            for part, shape in zip(parts, shapes):
                if f"{name}.{part}" not in stored:
                    raise InputError(f"{path}: {part} of {name} is missing", f"{CONFIG} targets that module")
                tensors[f"{name}.{part}"] = _tensor(opened, stored.pop(f"{name}.{part}"), shape, path)
        if stored:
            left = next(iter(stored))
            raise InputError(
                f"{path}: {left} has no place in the adapter", f"{CONFIG} says use_dora={str(dora).lower()}"
            )
    return tensors


def _known(key: str, modules: Mapping[str, Module], described: Mapping[str, Described], path: Path) -> str:
    """ "module.part" of a tensor that belongs to an adapted module."""
    found = _TENSOR.fullmatch(key.removeprefix(_PREFIX))
    if found is None or not key.startswith(_PREFIX):
        raise InputError(
            f"{path}: {key} is no factor of a linear module", "only lora_A, lora_B and lora_magnitude_vector"
        )
    module, part = found["module"], found["part"].removesuffix(".weight")
    if module not in modules:
        close = difflib.get_close_matches(module, modules, n=1, cutoff=0.55)
        hint = f"the nearest that it has is {close[0]}" if close else "an adapter of another model?"
        raise InputError(f"{path}: the model has no linear module {module}", hint)
    if module not in described:
        raise InputError(f"{path}: {module} is not among the target_modules of {CONFIG}", "PEFT would pass it over")
    return f"{module}.{part}"


def _tensor(opened: Any, key: str, shape: list[int], path: Path) -> np.ndarray:
    part = opened.get_slice(key)
    if part.get_shape() != shape:
        raise InputError(f"{path}: {key} has shape {part.get_shape()}, {CONFIG} and the model ask for {shape}")
    if part.get_dtype() not in DTYPES:
        raise InputError(f"{path}: {key} is stored as {part.get_dtype()}", f"one of {', '.join(DTYPES)}")
    try:
        array = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    if not finite(array):
        raise InputError(f"{path}: {key} holds NaN or infinite numbers", "download or export it again")
    return array.astype(np.float32)


def _check_fit(update: Lora, ranks: tuple[int, ...], scales: tuple[float, ...], dora: bool, where: str) -> None:
    """Raise InputError where `update` is not what a configuration of such ranks and scales makes."""
    rank = max(ranks)
    a, b = np.asarray(update.a, np.float32), np.asarray(update.b, np.float32)
    a, b = a.reshape(len(ranks), -1, a.shape[-1]), b.reshape(len(ranks), b.shape[-2], -1)
    hint = "give the configuration they were made by"
    if a.shape[-1] != rank or b.shape[1] != rank or (update.magnitude is not None) != dora:
        raise InputError(f"{where} is of rank {a.shape[-1]}, the configuration says {rank}, dora={dora}", hint)
    if not np.allclose(np.ravel(update.scale), scales, rtol=1e-5, atol=0):
        raise InputError(
            f"{where} is scaled by {np.ravel(update.scale)[0]:.6g}, the configuration by {scales[0]:.6g}", hint
        )
    if any(np.any(a[i, :, r:]) or np.any(b[i, r:]) for i, r in enumerate(ranks) if r < rank):
        raise InputError(f"{where} has more columns than the rank of its layer", hint)


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder", "choose another path")
    names = {path.name for path in folder.iterdir()}
    if names and not (names == {CONFIG, WEIGHTS} and _is_own(folder / WEIGHTS)):
        raise InputError(f"{folder}: holds something other than an adapter of ours", "choose an empty or a new folder")


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as opened:
            return _MARK in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False
