"""What DiffusionModel reads: a model folder or a GGUF file, as it is stored or with its matrices in 4 bits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruvjax import errors
from ruvjax.api.ruvdllm_errors import ModelError
from ruvjax.api.tokenizer_files import read_tokenizer
from ruvjax.data.tokenize import Tokenizer
from ruvjax.io.gguf import open_gguf
from ruvjax.io.gguf_model import load_gguf
from ruvjax.io.huggingface import ModelFiles, load_model
from ruvjax.io.quantize import quantize_params
from ruvjax.models.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Read:
    """A network, its parameters, what else its files say, and its tokenizer where it can denoise text."""

    network: Transformer
    params: Any
    files: ModelFiles
    tokenizer: Tokenizer | None
    source: str


def read_files(path: Path, four_bits: bool) -> Read:
    """Raises ModelError.LoadError for files that are missing, damaged or no transformer, QuantizationError for matrices
    that cannot be quantized."""
    is_file = path.suffix == ".gguf" and path.is_file()
    try:
        read = _read_gguf(path, four_bits) if is_file else _read_folder(path)
    except errors.InputError as error:
        raise ModelError.LoadError(str(error), error.hint) from error
    if read.tokenizer is not None and read.tokenizer.vocab_size > read.network.vocab_size:
        sizes = f"{read.tokenizer.vocab_size} entries, the model {read.network.vocab_size}"
        raise ModelError.LoadError(f"{path}: the tokenizer has {sizes}", "copy the right one")
    return _quantized(read) if four_bits else read


def _read_folder(folder: Path) -> Read:
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    network, params, files = load_model(folder)
    source = str(folder / "config.json")
    if not isinstance(network, Transformer):
        raise errors.InputError(f"{source}: this is a Mamba, and no diffusion transformer", "ruvjax.api.repair")
    causal = files.mask_token_id is None  # then its tokenizer knows no mask either
    tokenizer = None if causal or files.tokenizer is None else read_tokenizer(folder, files)
    return Read(network, params, files, tokenizer, source)


def _read_gguf(path: Path, four_bits: bool) -> Read:
    file = open_gguf(path)
    wide = any(tensor.kind == "BF16" for tensor in file.tensors.values())  # whose range float16 lacks
    network, params, files = load_gguf(path, "bfloat16" if wide else "float16", quantized=four_bits)
    bare = files.mask_token_id is None or "tokenizer.ggml.tokens" not in file.metadata
    return Read(network, params, files, None if bare else read_tokenizer(path, files), str(path))


def _quantized(read: Read) -> Read:
    """Matrices that are arrays become Q4_K, or Q4_0 where their rows are no multiple of 256; tables Q8_0."""
    try:
        params, kinds = quantize_params(read.network, read.params, "Q4_K", read.source)
    except errors.InputError as error:
        raise ModelError.QuantizationError(str(error), "load_f16 reads it unquantized") from error
    return replace(read, params=params, files=replace(read.files, weights=kinds))
