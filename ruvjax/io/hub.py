"""Model folders from the Hugging Face hub, through its own cache."""

import os
import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

import ruvjax
from ruvjax.errors import InputError

FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Mistral's repositories hold the same weights a second time, and many hold other formats in folders.
PASSED_OVER = ("consolidated*", "*/*")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class _Silent(tqdm):
    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **(settings | {"disable": True}))


def model_path(name: str | os.PathLike[str], *, token: str | None = None, revision: str | None = None) -> Path:
    """What `name` names: a folder or file that is there, or else a model of the hub, which is downloaded.

    Raises InputError where it is neither, or as `download` does.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InputError(f"{name}: no such folder or file", "give a model folder, or the id of a model of the hub")
    return download(name, token=token, revision=revision)


def download(
    model_id: str,
    *,
    file: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Fetch the configuration, tokenizer and safetensors of a model, or one `file` of it (such as a .gguf).

    What the cache holds is not fetched again; where the hub cannot be reached, or HF_HUB_OFFLINE=1 forbids it, the
    cached snapshot serves, if it is whole. token: for gated and private models; by default the one that is logged in.
    revision: a branch, tag or commit. cache: another folder than the hub's own. progress: bars on stderr. Returns the
    folder, or the file. Raises InputError where the model cannot be had.
    """
    where = f"{model_id}@{revision}" if revision else model_id
    try:
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=None if cache is None else Path(cache),
            token=token,
            allow_patterns=[file] if file else [*FILES, *WEIGHTS],
            ignore_patterns=None if file else list(PASSED_OVER),
            tqdm_class=cast(Any, tqdm if progress else _Silent),
            library_name="ruvjax",
            library_version=ruvjax.__version__,
        )
    except GatedRepoError as error:
        raise InputError(f"{where}: this model is gated", "accept its terms on the hub and give a token") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{where}: the model has no such revision") from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; a private one needs a token"
        raise InputError(f"{where}: no such folder here, and no such model on the hub", hint) from error
    except LocalEntryNotFoundError as error:
        missing = "the hub cannot be reached, and the cache does not hold the whole model"
        raise InputError(f"{where}: {missing}", "connect, unset HF_HUB_OFFLINE, or name a folder") from error
    except (HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: cannot be downloaded ({reason})") from error
    path = Path(folder) / file if file else Path(folder)
    if not path.exists():
        raise InputError(f"{where}: the model has no file {file}")
    return path
