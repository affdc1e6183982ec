"""Model folders: model.safetensors (or shards with an index), config.json, tokenizer.json.

`save_model` writes our own exports whole or not at all, `save_pretrained` the layout that a family's authors publish;
`load_model` reads both, and GGUF files: Llama 2 and 3, Mistral, Qwen2, 2.5 and 3, Dream, LLaDA, Mamba and Mamba-2.
Nothing is unpickled and no code from a checkpoint runs.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ruvjax.core.files import write_folder
from ruvjax.errors import InputError
from ruvjax.io import mamba_layout, transformer_layout
from ruvjax.io.gguf_model import load_gguf
from ruvjax.io.layout import (
    FORMAT_VERSION,
    ModelFiles,
    Network,
    is_causal,
    is_own,
    own_config,
    places,
    read_network,
)
from ruvjax.io.mamba_layout import refuse_other_version
from ruvjax.io.weights import INDEX, open_weights, read_json, read_params, write_json, write_weights
from ruvjax.models.transformer import Transformer

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MAX_SHARD_BYTES = 5 * 10**9
_TOKENS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_MARK = "ruvjax_format_version"  # in a published config.json that we wrote, which another export may therefore replace


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of `folder` (or the file itself). Raises InputError where it is missing or is not a JSON object."""
    path = Path(folder)
    path = path / CONFIG if path.is_dir() else path
    return read_json(path, "a model folder holds config.json and model.safetensors")


def load_model(
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    shardings: Callable[[Network], Any] | None = None,
    *,
    quantized: bool = False,
) -> tuple[Network, Any, ModelFiles]:
    """Read a model folder or a .gguf file: hyper-parameters of whichever family, parameters, and what else lies there.

    Parameters keep the dtype they are stored in unless `dtype` names one (a GGUF file's become float32); the compute
    dtype is what config.json names. `quantized` keeps a GGUF file's Q8_0, Q4_0 and Q4_K matrices in their blocks, as
    `load_gguf` says.
    `shardings` maps the model to a pytree of `NamedSharding` like its parameters, such as
    `lambda model: core.params.shardings(model, mesh, rules)`; then each process reads only what its devices hold.
    Raises InputError, naming the file, where one is missing, truncated, malformed or does not fit config.json, or where
    a weight is not finite; for `shardings` of a GGUF file and for `quantized` of a folder.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        if shardings is not None:
            raise InputError(f"{folder}: GGUF files are not read into shardings", "convert it to a model folder")
        return load_gguf(folder, dtype or "float32", quantized=quantized)
    if not folder.is_dir():
        hint = "a file must be a .gguf" if folder.is_file() else "give a folder with a config.json, or a .gguf file"
        raise InputError(f"{folder}: no such model folder", hint)
    if quantized:
        raise InputError(f"{folder}: only .gguf files hold quantized weights", "name one, or quantized=false")
    config = read_config(folder)
    source = str(folder / CONFIG)
    model = read_network(config, source)
    diffusion = config.get("diffusion") or {}
    if not isinstance(diffusion, dict):
        raise InputError(f"{source}: diffusion must be an object")
    tokenizer = folder / TOKENIZER
    ends = _end_tokens(folder, config, model, source)
    tokens = {name: next(iter(_tokens(config, name, model, source)), None) for name in _TOKENS}
    with ExitStack() as stack:
        shelf = open_weights(folder, stack)
        if not isinstance(model, Transformer):
            refuse_other_version(model, shelf, str(folder))
        wanted = None if shardings is None else shardings(model)
        table = places(model, config["model_type"])
        params, stored = read_params(model, table, shelf, folder, dtype, wanted)
    info = ModelFiles(
        folder=folder,
        model_type=config["model_type"],
        weights=stored,
        causal=is_causal(model, config),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        eos_token_ids=ends,
        diffusion=diffusion,
        **tokens,
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
    tokens = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    config = own_config(model, tokens, diffusion or {})
    return _save(Path(os.path.abspath(folder)), model, params, config, tokenizer_file, (TOKENIZER,), max_shard_bytes)


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Network,
    params: Any,
    tokenizer_file: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
    mask_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `model` and `params` to `folder` as `family` is published, so that transformers loads them.

    family: one of `transformer_layout.FAMILIES`; by default the causal one that the hyper-parameters are (Llama,
    Mistral, Qwen2 or Qwen3), Dream where the logits are shifted, and a Mamba's own. LLaDA has to be named. transformers
    reads LLaDA and Dream only with the modeling code of their authors, which is not written here. The files that lie
    beside `tokenizer_file` and belong to it are copied too. Otherwise as `save_model`; raises InputError for a model
    that `family` cannot be, and where `folder` holds a model that ruvjax did not write.
    """
    folder = Path(os.path.abspath(folder))
    if isinstance(model, Transformer):
        family = transformer_layout.family_of(model) if family is None else family
        if family not in transformer_layout.FAMILIES:
            raise InputError(f"family={family!r} is not known", f"one of {', '.join(transformer_layout.FAMILIES)}")
        config = transformer_layout.published_config(model, family, str(folder))
    elif model.direction == "forward" and family in (None, *mamba_layout.FAMILIES):
        config = mamba_layout.published_config(model)
    else:
        raise InputError(f"{folder}: this model is not one that is published as {family or 'a Mamba'}", "save_model")
    tokens = {
        "mask_token_id": mask_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if mask_token_id is None:
        del tokens["mask_token_id"]  # no causal family has the key
    config |= tokens | {_MARK: FORMAT_VERSION}
    return _save(folder, model, params, config, tokenizer_file, TOKENIZER_FILES, max_shard_bytes)


def _save(
    folder: Path,
    model: Network,
    params: Any,
    config: dict[str, Any],
    tokenizer_file: str | os.PathLike[str] | None,
    tokenizer_files: tuple[str, ...],
    max_shard_bytes: int,
) -> Path:
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise InputError(f"{tokenizer_file}: no such tokenizer file")
    _refuse_foreign(folder)
    table = places(model, config["model_type"])

    def write(partial: Path) -> None:
        # "pt": the layout's own name, without which transformers refuses the file.
        metadata = {"format": "pt", "ruvjax_format_version": str(FORMAT_VERSION)}
        write_weights(partial, model, params, table, max_shard_bytes, metadata)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / TOKENIZER)
            for name in tokenizer_files[1:]:
                if (Path(tokenizer_file).parent / name).is_file():
                    shutil.copyfile(Path(tokenizer_file).parent / name, partial / name)
        write_json(partial / CONFIG, config)

    return write_folder(folder, write)


def _end_tokens(folder: Path, config: Mapping[str, Any], model: Network, source: str) -> tuple[int, ...]:
    """Every token that ends a text: generation_config.json's, which some authors complete later, and config.json's."""
    path = folder / GENERATION
    further = read_json(path, "download the folder again") if path.is_file() else {}
    ids = _tokens(further, "eos_token_id", model, str(path)) + _tokens(config, "eos_token_id", model, source)
    return tuple(dict.fromkeys(ids))


def _tokens(config: Mapping[str, Any], key: str, model: Network, source: str) -> list[int]:
    value = config.get(key)
    if value is None or value == -1:  # old Llama checkpoints have a pad_token_id of -1: none
        return []
    values = value if isinstance(value, list) else [value]
    for number in values:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < model.vocab_size:
            raise InputError(f"{source}: {key}={value!r} is not a token of a vocabulary of {model.vocab_size}")
    return values


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder", "choose another path")
    names = {path.name for path in folder.iterdir()}
    ours = {CONFIG, INDEX, *TOKENIZER_FILES} | {name for name in names if name.endswith(".safetensors")}
    try:
        replaceable = not names or (names <= ours and _may_replace(read_config(folder)))
    except InputError:
        replaceable = False
    if not replaceable:
        raise InputError(f"{folder}: holds something other than an export of ours", "choose an empty or a new folder")


def _may_replace(config: Mapping[str, Any]) -> bool:
    return is_own(config) or _MARK in config
