"""The matrices of a transformer in blocks of few bits, whatever they were read from."""

from typing import Any

import jax
import numpy as np

from kernels_pallas.quant_matmul import KINDS, QuantizedWeight, quantize
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.weights import is_spec
from ruvjax.models.transformer import Transformer

TABLES = (".embedding", ".head")
MATRICES = tuple(f".layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def quantize_params(model: Transformer, params: Any, kind: str, source: str) -> tuple[Any, str]:
    """`params` with matrices of `kind` ("Q8_0", "Q4_0", "Q4_K"; the latter becomes Q4_0 where rows are no multiple of
    256) and tables of embeddings in Q8_0; what is in blocks already stays. Returns the kinds there are, as "Q4_K/Q8_0".

    Raises ConfigError for another kind, InputError naming `source` for matrices that have no such blocks.
    """
    if kind not in KINDS:
        raise ConfigError(f"weights of kind {kind!r} cannot be made", f"one of {', '.join(KINDS)}")
    specs, treedef = jax.tree_util.tree_flatten_with_path(model.spec(), is_leaf=is_spec)
    kept: list[Any] = []
    for (path, _), value in zip(specs, treedef.flatten_up_to(params), strict=True):
        name = jax.tree_util.keystr(path)
        if isinstance(value, QuantizedWeight) or value is None or name not in (*TABLES, *MATRICES):
            kept.append(value)
            continue
        matrix = np.asarray(value, np.float32)
        matrix = matrix.T if name in TABLES else matrix
        inner = matrix.shape[-2]
        own = "Q8_0" if name in TABLES else "Q4_0" if kind == "Q4_K" and inner % 256 else kind
        try:
            kept.append(quantize(matrix, own))
        except ValueError as error:
            raise InputError(f"{source}: {name[1:]} of {inner} rows: {error}", "read it unquantized") from error
    kinds = sorted({value.kind for value in kept if isinstance(value, QuantizedWeight)})
    return treedef.unflatten(kept), "/".join(kinds)
