"""Transformers into GGUF files that llama.cpp and `ruvjax.io.gguf_model` read."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kernels_pallas.quant_matmul import QuantizedWeight, to_blocks
from kernels_pallas.quant_matmul.formats import FORMATS
from ruvjax.core.rope import RopeScaling, frequencies
from ruvjax.errors import InputError
from ruvjax.io.gguf import TYPES
from ruvjax.io.gguf_model import NEIGHBOURS, PLACES, ROPE_FACTORS, TABLES, permuted_heads
from ruvjax.io.gguf_tokenizer import tokenizer_metadata
from ruvjax.io.gguf_write import WRITTEN, Out, encode, write_gguf
from ruvjax.io.weights import leaves
from ruvjax.models.transformer import Transformer

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "BF16": 32}  # general.file_type


def save_gguf(
    path: str | os.PathLike[str],
    model: Transformer,
    params: Any,
    kind: str = "Q8_0",
    tokenizer_file: str | os.PathLike[str] | None = None,
    *,
    causal: bool = True,
    name: str = "",
    tokens: Mapping[str, int | None] | None = None,
) -> Path:
    """Write `model` and `params` to a GGUF file that llama.cpp reads, whole or not at all.

    kind: the type of the matrices, one of `WRITTEN`; leaves that are quantized already keep their blocks. A
    matrix whose rows are no whole blocks of `kind` becomes Q8_0, or F16 where its rows are no multiple of 32 either;
    under the 4-bit kinds the matrix of the head is Q8_0 (llama.cpp's own files give it more bits too). Vectors are F32.
    tokenizer_file: a tokenizer.json, and the tokenizer_config.json beside it, whose entries go into the file. causal:
    False for a diffusion model. tokens: special token ids by the names of `ModelFiles`. llama.cpp does not read the
    window of a Mistral, so texts longer than that differ there. Raises InputError for a model that no architecture
    expresses, and where a weight cannot be written as `kind`.
    """
    path = Path(path)
    if kind not in WRITTEN:
        raise InputError(f"kind={kind!r} cannot be written", f"one of {', '.join(WRITTEN)}")
    architecture = _architecture(model, causal, path)
    metadata = _metadata(model, architecture, kind, causal, name)
    metadata |= tokenizer_metadata(tokenizer_file, model.vocab_size, tokens or {})
    return write_gguf(path, metadata, _tensors(model, params, architecture, kind, path))


def _architecture(model: Transformer, causal: bool, path: Path) -> str:
    architecture = "qwen3" if model.qk_norm else "qwen2" if model.qkv_bias else "llama"
    if not causal:
        architecture = "dream" if model.shift else "llada"
    reasons = {
        f"time={model.time!r}": model.time != "none",
        f"norm={model.norm!r}": model.norm != "rms",
        f"mlp={model.mlp!r}": model.mlp != "swiglu",
        f"qk_norm={model.qk_norm}": model.qk_norm and (model.qkv_bias or not causal),
        f"shift={model.shift}": model.shift and causal,
        f"window={model.window}": bool(model.window) and not causal,
        f"rope_scaling.kind={model.rope_scaling.kind!r}": model.rope_scaling.kind == "dynamic"
        or (model.rope_scaling.kind in ("llama3", "factors") and architecture not in NEIGHBOURS),
    }
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{path}: model.{reason} is not what {architecture} can be in a GGUF file")
    return architecture


def _metadata(model: Transformer, architecture: str, kind: str, causal: bool, name: str) -> dict[str, Any]:
    own = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_length,
        "embedding_length": model.width,
        "block_count": model.layers,
        "feed_forward_length": model.mlp_width,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.key_heads,
        "attention.key_length": model.dim_per_head,
        "attention.value_length": model.dim_per_head,
        "attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "rope.dimension_count": model.dim_per_head,
        "rope.freq_base": float(model.rope_theta),
    }
    scaling = model.rope_scaling
    if scaling.kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        own |= {
            "rope.scaling.original_context_length": scaling.original_length,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    if model.window:
        own["attention.sliding_window"] = model.window
    if not causal:
        own["attention.causal"] = False
    general: dict[str, Any] = {"general.architecture": architecture, "general.type": "model"}
    if name:
        general["general.name"] = name
    general["general.file_type"] = FILE_TYPES[kind]
    if kind in FORMATS:
        general["general.quantization_version"] = 2
    if not causal:
        general["diffusion.shift_logits"] = model.shift
    return general | {f"{architecture}.{key}": value for key, value in own.items()}


def _tensors(model: Transformer, params: Any, architecture: str, kind: str, path: Path) -> Iterator[Out]:
    head = "token_embd.weight" if model.tied_head else "output.weight"
    flat = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    if model.rope_scaling.kind in ("llama3", "factors"):
        factors = _factors(model)
        yield Out(ROPE_FACTORS, "F32", factors.shape, lambda: encode("F32", factors))
    for (place, spec, stacked), leaf in zip(leaves(model, PLACES), flat, strict=True):
        heads = permuted_heads(model, architecture, place)
        quantized = isinstance(leaf, QuantizedWeight)
        table = place.name in TABLES
        found = leaf.shape if not (quantized and table) else leaf.shape[::-1]  # held as its transpose
        if tuple(found) != spec.shape:
            raise InputError(f"{path}: {place.name} has shape {found}, the model asks for {spec.shape}")
        for layer in range(model.layers) if stacked else [None]:
            shape = tuple(place.stored(spec.shape[1:] if stacked else spec.shape))
            stored = leaf.kind if quantized else _kind(kind, shape, place.name == head)
            name = place.name.format(layer)

            def data(leaf=leaf, layer=layer, place=place, heads=heads, stored=stored) -> np.ndarray:
                part = leaf if layer is None else jax.tree.map(lambda x: x[layer], leaf)
                if isinstance(part, QuantizedWeight):
                    return _to_neighbours(to_blocks(part), heads)
                rows = _to_neighbours(place.write(np.asarray(part)), heads)
                return encode(stored, rows)

            yield Out(name, stored, shape, data)


def _to_neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * dim, ...] from our order of rotary pairs to ggml's; heads 0 leaves them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def _kind(kind: str, shape: tuple[int, ...], head: bool) -> str:
    """The type of a tensor in a file of `kind`."""
    if len(shape) < 2:
        return "F32"
    wanted = "Q8_0" if head and kind in ("Q4_0", "Q4_K") else kind
    return next(found for found in (wanted, "Q8_0", "F16") if shape[-1] % TYPES[found].weights == 0)


def _factors(model: Transformer) -> np.ndarray:
    """What the frequency of every rotary pair is divided by, float32."""
    plain, _ = frequencies(model.dim_per_head, model.rope_theta, RopeScaling())
    scaled, _ = frequencies(model.dim_per_head, model.rope_theta, model.rope_scaling)
    return np.asarray(plain / scaled, np.float32)
