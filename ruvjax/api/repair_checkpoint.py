"""The documented `load_pretrained`, `save_checkpoint` and `load_checkpoint` of `MambaLM`, without pickle."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ruvjax.api.repair_mamba import MambaLM, MambaLMConfig, placed
from ruvjax.core.files import write_atomic, write_json
from ruvjax.errors import InputError
from ruvjax.io.huggingface import load_model, read_config, save_model
from ruvjax.models.mamba import Mamba

FORMAT_VERSION = 1
STATE, OPTIMIZER = "training.json", "optimizer.safetensors"


def load_pretrained(model_name_or_path: str | os.PathLike[str], device: Any = None, dtype: Any = None) -> MambaLM:
    """Load a Mamba from a folder: one of `save_checkpoint`, an export, or a published model of transformers.

    dtype: that of the computation, by default what config.json names; the parameters keep theirs. Raises InputError
    where the folder cannot be read or holds something other than Mamba-1 that scans from left to right.
    """
    folder = Path(model_name_or_path)
    model = folder / "model" if (folder / "model").is_dir() else folder
    with placed(device):
        network, params, _ = load_model(model)
    if not isinstance(network, Mamba) or network.direction != "forward":
        title = type(network).__name__ if not isinstance(network, Mamba) else "a Mamba of both directions"
        raise InputError(f"{model}: holds {title}, MambaLM is Mamba-1 from left to right")
    saved = read_config(folder / STATE).get("config") if (folder / STATE).is_file() else None
    try:
        config = MambaLMConfig.of(network) if saved is None else MambaLMConfig(**saved)
    except TypeError as error:
        raise InputError(f"{folder / STATE}: {error}", "save the checkpoint again") from error
    return MambaLM(config, params, dtype=network.dtype if dtype is None else dtype)


def save_checkpoint(
    model: MambaLM,
    optimizer: Any,
    path: str | os.PathLike[str],
    step: int | None = None,
    epoch: int | None = None,
    **extra: Any,
) -> None:
    """Write a folder: `model/` (which `load_pretrained` and transformers read), `optimizer.safetensors` and
    `training.json`.

    optimizer: any pytree of arrays, such as an optax state, or None. `extra`: whatever JSON holds. The three are
    written one after the other, each whole or not at all, `training.json` last: it names the step they belong to.
    """
    folder = Path(path)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(optimizer)]
    save_model(folder / "model", model.network, jax.device_get(model.params))
    write_atomic(folder / OPTIMIZER, save({str(i): leaf for i, leaf in enumerate(leaves)}))
    state = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config),
        "step": step,
        "epoch": epoch,
        "optimizer": {"leaves": len(leaves), "structure": str(jax.tree.structure(optimizer))},
        "extra": extra,
    }
    write_json(folder / STATE, state)


def load_checkpoint(
    path: str | os.PathLike[str], model: MambaLM | None = None, optimizer: Any = None, device: Any = None
) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote: {"model", "optimizer", "step", "epoch", and what was given beside them}.

    model: gets the loaded parameters; a new one is made where none is given. optimizer: a state of the same structure,
    whose leaves the loaded ones replace in the result ("optimizer" is None without it). Raises InputError where the
    folder is damaged or fits neither.
    """
    folder = Path(path)
    state = read_config(folder / STATE)
    version = state.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(f"{folder / STATE}: format_version={version!r}, this ruvjax reads up to {FORMAT_VERSION}")
    loaded = load_pretrained(folder, device)
    if model is not None:
        if model.config != loaded.config:
            raise InputError(
                f"{folder}: holds a model of another configuration", "make MambaLM(config) of the saved one"
            )
        model.params = loaded.params
    restored = None
    if optimizer is not None:
        leaves, treedef = jax.tree.flatten(optimizer)
        with placed(device):
            restored = treedef.unflatten(_read_optimizer(folder, leaves, str(treedef), state))
    extra = state.get("extra") or {}
    own = {"model": model or loaded, "optimizer": restored, "step": state.get("step"), "epoch": state.get("epoch")}
    return {**extra, **own}


def _read_optimizer(folder: Path, leaves: list[Any], structure: str, state: dict[str, Any]) -> list[jax.Array]:
    path = folder / OPTIMIZER
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file", "save the checkpoint again") from error
    shapes = [np.shape(leaf) for leaf in leaves]
    found = [stored[str(i)].shape for i in range(len(stored)) if str(i) in stored]
    if found != shapes or (state.get("optimizer") or {}).get("structure") != structure:
        raise InputError(f"{path}: does not fit the optimizer that was given", "give the same optimizer's state")
    return [jnp.asarray(stored[str(i)]) for i in range(len(leaves))]
