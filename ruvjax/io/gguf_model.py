"""Transformers out of GGUF files: what llama.cpp calls the hyper-parameters and the weights.

Architectures: llama (Llama, Mistral), qwen2, qwen3, dream and llada. Rows of the query and key matrices stand in
another order in the llama and llada architectures, because ggml rotates neighbours (x[2i], x[2i + 1]) there where ours
rotates halves (x[i], x[i + dim / 2]). `ruvjax.io.gguf_export` writes them.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quant_matmul import KINDS, from_blocks
from kernels_pallas.quant_matmul.formats import FORMATS, encode
from ruvjax.core.params import ParamSpec
from ruvjax.core.rope import RopeScaling
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.gguf import READ, GgufFile, open_gguf, short
from ruvjax.io.gguf_tokenizer import ENDS, TOKENS
from ruvjax.io.layout import ModelFiles
from ruvjax.io.place import Place, integer, number
from ruvjax.io.weights import finite, is_spec, leaves
from ruvjax.models.transformer import Transformer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "dream", "llada")
CAUSAL = ("llama", "qwen2", "qwen3")
NEIGHBOURS = ("llama", "llada")  # architectures whose rotary pairs are neighbours
ROPE_FACTORS = "rope_freqs.weight"
TABLES = ("token_embd.weight", "output.weight")  # [vocabulary, width] here and there

_BLOCK = "blk.{}."
PLACES = {
    ".embedding": Place("token_embd.weight"),
    ".head": Place("output.weight"),
    ".final_norm": Place("output_norm.weight"),
    ".layers.attention_norm": Place(_BLOCK + "attn_norm.weight"),
    ".layers.mlp_norm": Place(_BLOCK + "ffn_norm.weight"),
    ".layers.q": Place(_BLOCK + "attn_q.weight", True),
    ".layers.k": Place(_BLOCK + "attn_k.weight", True),
    ".layers.v": Place(_BLOCK + "attn_v.weight", True),
    ".layers.o": Place(_BLOCK + "attn_output.weight", True),
    ".layers.q_bias": Place(_BLOCK + "attn_q.bias"),
    ".layers.k_bias": Place(_BLOCK + "attn_k.bias"),
    ".layers.v_bias": Place(_BLOCK + "attn_v.bias"),
    ".layers.q_norm": Place(_BLOCK + "attn_q_norm.weight"),
    ".layers.k_norm": Place(_BLOCK + "attn_k_norm.weight"),
    ".layers.gate": Place(_BLOCK + "ffn_gate.weight", True),
    ".layers.up": Place(_BLOCK + "ffn_up.weight", True),
    ".layers.down": Place(_BLOCK + "ffn_down.weight", True),
}


def load_gguf(
    path: str | os.PathLike[str], dtype: str = "float32", *, quantized: bool = False
) -> tuple[Transformer, Any, ModelFiles]:
    """Read a GGUF file: hyper-parameters, parameters, and which tokens are special.

    dtype: that of the parameters. quantized: keep matrices in blocks (`QuantizedWeight`) where every layer has them in
    one of its kinds; a matrix that is in Q6_K, or in several types (as in the mixed "M" files), then becomes Q8_0,
    which adds an error of at most 1/226 of a block's largest weight. The other leaves have `dtype`. The tokenizer is
    written by `gguf_tokenizer.extract_tokenizer`. Raises InputError where the file is damaged, of an unknown
    architecture, does not fit its own header, or holds weights that are not finite.
    """
    file = open_gguf(path)
    model = read_model(file)
    architecture = file.metadata["general.architecture"]
    found: list[tuple[list[str], Place, ParamSpec, bool]] = []
    used = {ROPE_FACTORS}
    for place, spec, stacked in leaves(model, PLACES):
        names = [place.name.format(layer) for layer in range(model.layers if stacked else 1)]
        shape = tuple(place.stored(spec.shape[1:] if stacked else spec.shape))
        for name in names:
            _expect(file, name, shape)
        used.update(names)
        found.append((names, place, spec, stacked))
    left = sorted(set(file.tensors) - used)
    if left:
        raise InputError(f"{file.path}: {len(left)} tensors have no place in the model, such as {short(left[0])}")
    arrays = []
    for names, place, spec, stacked in found:
        keep = quantized and (place.matrix or place.name in TABLES)
        heads = permuted_heads(model, architecture, place)
        arrays.append((_blocks if keep else _dense)(file, names, place, spec, stacked, heads, dtype))
    treedef = jax.tree.structure(model.spec(), is_leaf=is_spec)
    kinds = {file.tensors[name].kind for name in used if name in file.tensors}
    tokens = {name: _token(file, key, model) for name, key in TOKENS.items()}
    ends = (tokens["eos_token_id"], *(_token(file, key, model) for key in ENDS))
    files = ModelFiles(
        folder=file.path.parent,
        model_type=architecture,
        weights="/".join(sorted(kinds)),
        causal=_entry(file, f"{architecture}.attention.causal", architecture in CAUSAL),
        mask_token_id=tokens["mask_token_id"],
        bos_token_id=tokens["bos_token_id"],
        eos_token_id=tokens["eos_token_id"],
        pad_token_id=tokens["pad_token_id"],
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )
    return model, treedef.unflatten(arrays), files


def _expect(file: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    if name not in file.tensors:
        raise InputError(f"{file.path}: the weights lack {name}", "the header describes a model that has it")
    tensor = file.tensors[name]
    if tensor.shape != shape:
        raise InputError(f"{file.path}: {name} has shape {list(tensor.shape)}, the header asks for {list(shape)}")
    if tensor.kind not in READ:
        raise InputError(f"{file.path}: {name} is stored as {tensor.kind}", f"this reads {', '.join(READ)}")


def permuted_heads(model: Transformer, architecture: str, place: Place) -> int:
    """The number of heads whose rows stand in ggml's order, 0 where they stand in ours."""
    if architecture not in NEIGHBOURS:
        return 0
    part = place.name.removeprefix(_BLOCK).split(".")[0]
    return {"attn_q": model.heads, "attn_k": model.key_heads}.get(part, 0)


def _to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * dim, ...] from ggml's order of rotary pairs to ours; heads 0 leaves them."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if heads else rows


def _dense(
    file: GgufFile, names: list[str], place: Place, spec: ParamSpec, stacked: bool, heads: int, dtype: str
) -> jax.Array:
    whole = np.empty(spec.shape if stacked else (1, *spec.shape), jnp.dtype(dtype))
    for i, name in enumerate(names):
        whole[i] = place.read(_to_halves(_finite(file, name), heads))
    return jnp.asarray(whole if stacked else whole[0])


def _finite(file: GgufFile, name: str) -> np.ndarray:
    array = file.read(name)
    if not finite(array):
        raise _not_finite(file, name)
    return array


def _blocks(
    file: GgufFile, names: list[str], place: Place, spec: ParamSpec, stacked: bool, heads: int, dtype: str
) -> Any:
    kinds = {file.tensors[name].kind for name in names}
    if not kinds & set(FORMATS):  # stored unquantized
        return _dense(file, names, place, spec, stacked, heads, dtype)
    kind = kinds.pop() if len(kinds) == 1 and kinds <= set(KINDS) else "Q8_0"
    rows = []
    for name in names:
        as_stored = file.tensors[name].kind == kind
        rows.append(_to_halves(file.blocks(name) if as_stored else encode(kind, _finite(file, name)), heads))
    weight = from_blocks(kind, np.stack(rows) if stacked else rows[0])
    scales = np.asarray(weight.scales if weight.steps is None else weight.steps)
    if not np.isfinite(scales).all():
        raise _not_finite(file, names[0] if not stacked else place.name.format("*"))
    return weight


def _not_finite(file: GgufFile, name: str) -> InputError:
    return InputError(f"{file.path}: {name} holds NaN or infinite numbers", "download or export it again")


def _token(file: GgufFile, key: str, model: Transformer) -> int | None:
    value = _entry(file, key, -1)
    if value in (-1, 2**32 - 1):
        return None
    if not 0 <= value < model.vocab_size:
        raise InputError(f"{file.path}: {key}={value} is not a token of a vocabulary of {model.vocab_size}")
    return value


def _entry(file: GgufFile, key: str, default: Any) -> Any:
    """An entry of the header of the type of `default`, which stands where it is absent."""
    value = file.metadata.get(key, default)
    if type(value) is not type(default):
        raise InputError(f"{file.path}: {short(key)} is a {type(value).__name__}, not a {type(default).__name__}")
    return value


def read_model(file: GgufFile) -> Transformer:
    """The hyper-parameters that the header of `file` describes.

    Raises InputError for an unknown architecture and for what the transformer cannot express.
    """
    architecture = _entry(file, "general.architecture", "")
    if architecture not in ARCHITECTURES:
        found = f"general.architecture={short(architecture)}"
        raise InputError(f"{file.path}: {found} is not known", f"one of {', '.join(ARCHITECTURES)}")
    if _entry(file, "split.count", 0) > 1:
        raise InputError(f"{file.path}: one of several parts of a model", "merge them with llama-gguf-split --merge")
    source = str(file.path)
    prefix = architecture + "."
    settings = {key.removeprefix(prefix): _number(v) for key, v in file.metadata.items() if key.startswith(prefix)}
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{source}: the weights lack token_embd.weight", "is this a language model?")
    width, heads = integer(settings, "embedding_length", source), integer(settings, "attention.head_count", source)
    layers = integer(settings, "block_count", source)
    if layers > len(file.tensors):
        raise InputError(f"{source}: the header promises {layers} layers, the file has {len(file.tensors)} tensors")
    dim = integer(settings, "attention.key_length", source, width // heads if heads > 0 else 0)
    shape = file.tensors["token_embd.weight"].shape
    _refuse_what_differs(file, settings, architecture, dim)
    try:
        return Transformer(
            vocab_size=shape[0] if len(shape) == 2 else 0,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=integer(settings, "attention.head_count_kv", source, heads),
            head_dim=dim,
            mlp_width=integer(settings, "feed_forward_length", source),
            max_length=integer(settings, "context_length", source),
            rope_theta=float(number(settings, "rope.freq_base", source, 10000.0)),
            rope_scaling=_scaling(file, settings, architecture, dim),
            norm_eps=_decimal(number(settings, "attention.layer_norm_rms_epsilon", source)),
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm=architecture == "qwen3",
            window=integer(settings, "attention.sliding_window", source, 0),
            shift=_entry(file, "diffusion.shift_logits", architecture == "dream"),
            tied_head="output.weight" not in file.tensors,
            dtype="auto",
            unroll=layers <= 8,
        )
    except ConfigError as error:
        raise InputError(f"{source}: {error}", error.hint) from error


def _number(value: Any) -> Any:
    """A number, also where it is given layer by layer and is the same for all; of anything else the type's name."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()
    return value if isinstance(value, (int, float)) else type(value).__name__


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5, where the file holds 9.99999974738e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _refuse_what_differs(file: GgufFile, settings: Mapping[str, Any], architecture: str, dim: int) -> None:
    plain = {
        "expert_count": (0, "experts"),
        "attention.value_length": (dim, "values of another width than keys"),
        "rope.dimension_count": (dim, "rotary embeddings of a part of the head"),
        "attention.scale": (0, "a scale of the attention logits"),
        "rope.scaling.attn_factor": (1, "a factor on the rotary embeddings"),
        "rope.scaling.yarn_log_multiplier": (0, "yarn with its own logarithm"),
    }
    reasons = {reason: number(settings, key, str(file.path), usual) != usual for key, (usual, reason) in plain.items()}
    reasons["shifted logits"] = architecture != "dream" and _entry(file, "diffusion.shift_logits", False)
    reasons["sliding windows in some layers"] = f"{architecture}.attention.sliding_window_pattern" in file.metadata
    for reason, found in reasons.items():
        if found:
            raise InputError(f"{file.path}: {reason} cannot be expressed by this transformer")


def _scaling(file: GgufFile, settings: Mapping[str, Any], architecture: str, dim: int) -> RopeScaling:
    source = str(file.path)
    kind = _entry(file, f"{architecture}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        _expect(file, ROPE_FACTORS, (dim // 2,))
        if kind != "none":
            raise InputError(f"{source}: rope scaling {kind!r} beside {ROPE_FACTORS} cannot be expressed")
        factors = np.asarray(_finite(file, ROPE_FACTORS), np.float32)
        return RopeScaling("factors", factors=tuple(map(float, factors)))
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{source}: rope scaling {short(kind)} is not known", "one of none, linear, yarn")
    factor = float(number(settings, "rope.scaling.factor", source, 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor)
    length = integer(settings, "context_length", source)
    return RopeScaling(
        "yarn",
        factor,
        integer(settings, "rope.scaling.original_context_length", source, length),
        beta_fast=float(number(settings, "rope.scaling.yarn_beta_fast", source, 32.0)),
        beta_slow=float(number(settings, "rope.scaling.yarn_beta_slow", source, 1.0)),
    )
