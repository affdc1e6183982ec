"""The tokenizer and the chat template that belong to a model's files, whatever the format of the files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruvjax.data.tokenize import Tokenizer, load_tokenizer
from ruvjax.errors import InputError
from ruvjax.io.chat import ChatTemplate, read_chat_template
from ruvjax.io.gguf import open_gguf
from ruvjax.io.gguf_tokenizer import extract_tokenizer
from ruvjax.io.layout import ModelFiles


def read_tokenizer(path: Path, files: ModelFiles) -> Tokenizer:
    """The tokenizer of the model at `path`, a folder or a GGUF file, with the ids that `files` names.

    Raises InputError where there is none or it cannot be read.
    """
    ids = {"mask_id": files.mask_token_id, "eos_id": files.eos_token_id, "pad_id": files.pad_token_id}
    if path.is_file():
        with _extracted(path) as file:
            return load_tokenizer(file, **ids, masked=not files.causal)
    if files.tokenizer is None:
        raise InputError(f"{path} holds no tokenizer.json", "copy the tokenizer of the model there")
    return load_tokenizer(files.tokenizer, **ids, masked=not files.causal)


def read_template(path: Path) -> ChatTemplate:
    """The chat template of the model at `path`, a folder or a GGUF file.

    Raises InputError where it has none, being a base model, or where it cannot be read.
    """
    if path.is_file():
        with _extracted(path) as file:
            found = read_chat_template(file.parent)
    else:
        found = read_chat_template(path)
    if found is None:
        raise InputError(f"{path} holds no chat template", "give a base model the text that it continues")
    return found


@contextmanager
def _extracted(path: Path) -> Iterator[Path]:
    """The tokenizer.json of a GGUF file, beside its tokenizer_config.json, for as long as it is read."""
    with tempfile.TemporaryDirectory() as folder:
        yield extract_tokenizer(open_gguf(path), folder)
