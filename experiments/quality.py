"""What quantization costs a trained model: weights of fewer bits, and caches in two tiers, against the model as it is.

Every figure is over the same held-out rows: the Kullback-Leibler divergence of the next token from the unquantized
model's, in nats a token, the change of perplexity, and how often both hold the same token for the likeliest.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.wiring import Loaded
from kernels_pallas.attention import Mask
from kernels_pallas.quant_matmul import KINDS, QuantizedWeight
from ruvjax.api.ruvllm_kv import CacheQuantization, KvCacheConfig, TwoTierKvCache
from ruvjax.core import tiered
from ruvjax.core.tiered import Tiers
from ruvjax.data.pack import Packed
from ruvjax.errors import ConfigError, InputError
from ruvjax.io.quantize import quantize_params
from ruvjax.models.transformer import Transformer, TransformerParams

CHUNK = 32  # tokens that a cache reads in one pass: what is quantized was so before them
STORES = tiered.KINDS
TAILS = (64, 128, 256)
LENGTHS = (1024, 4096, 16384)
OUTLIER = 64.0  # the planted channels of the keys are so many times as large


class Cost(NamedTuple):
    """One line of the table. kl: nats a token, and its 95% interval over rows as plus or minus. perplexity: that of the
    quantized model, and its change as a share. agreement: share of the same likeliest token. bits: a weight."""

    name: str
    kl: float
    kl_error: float
    perplexity: float
    change: float
    agreement: float
    bits: float | None = None


Form = Callable[[Any, jax.Array], jax.Array]  # (params, rows) -> logits


def check(loaded: Loaded) -> Transformer:
    """Raises ConfigError for a model whose quantization is not written."""
    model = loaded.model
    if not isinstance(model, Transformer) or not loaded.autoregressive or model.window:
        raise ConfigError("quality=true is for autoregressive transformers without a window", "quality=false")
    if any(isinstance(x, QuantizedWeight) for x in jax.tree.leaves(loaded.params, is_leaf=_is_quantized)):
        raise ConfigError("quality=true compares with unquantized weights", "model.quantized=false")
    return model


def table(loaded: Loaded, packed: Packed, count: int) -> Iterator[Cost]:
    """The lines, one after the other as they are measured; the first is the model as it is.

    `packed` holds rows of at least 1.5 times the longest tail, of which `count` full ones are read. Raises ConfigError
    as `check` does, InputError for rows that are too short.
    """
    model = check(loaded)
    least = 3 * max(TAILS) // 2
    if packed.length < least:
        raise InputError(f"quality=true needs rows of at least {least} tokens, not {packed.length}", "set length=")
    rows = packed.tokens[(packed.segments != 0).all(axis=1)][:count, : packed.length // CHUNK * CHUNK]
    if not len(rows):
        raise InputError(f"quality=true needs a text that fills a row of {packed.length} tokens", "lower length=")
    plain = _plain(model, loaded.attention)
    cost = functools.partial(_cost, functools.partial(plain, loaded.params), rows)
    yield cost("as it is", plain, loaded.params)
    for kind in KINDS:
        params, kinds = quantize_params(model, loaded.params, kind, "the model")
        yield cost(f"weights {kind} ({kinds})", plain, params)._replace(bits=_bits(params))
    for planted, params in (("", loaded.params), (", planted outliers", plant(model, loaded.params))):
        for tail in TAILS:
            for store in STORES:
                for scales in ("channel", "token") if store == "int4" else ("channel",):
                    form = _cached(model, Tiers(store, tail, key_scales=scales))
                    other = ", keys by token" if scales == "token" else ""
                    yield cost(f"cache {store}{other}, tail {tail}{planted}", form, params)


def line(cost: Cost) -> str:
    """One line for the terminal."""
    return (
        f"{cost.name}: KL {cost.kl:.2e} (+- {cost.kl_error:.1e}) nats a token, perplexity {cost.perplexity:.3f} "
        f"({cost.change:+.2%}), same likeliest token {cost.agreement:.2%}"
    )


def html(costs: list[Cost], ratios: dict[str, float]) -> str:
    """Both tables for the report."""

    def rows(cells: list[list[str]]) -> str:
        return "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)

    lines = [
        [c.name, f"{c.kl:.2e} ± {c.kl_error:.1e}", f"{c.perplexity:.3f}", f"{c.change:+.2%}", f"{c.agreement:.2%}"]
        for c in costs
    ]
    heads = "<tr><th></th><th>KL, nats a token</th><th>perplexity</th><th>change</th><th>same likeliest token</th></tr>"
    less = rows([[name, f"{ratio:.2f}x"] for name, ratio in ratios.items()])
    return f"<table>{heads}{rows(lines)}</table><h3>Cache against bfloat16, all bytes</h3><table>{less}</table>"


def compression() -> dict[str, float]:
    """What a cache of 8 heads of 128 channels takes less than bfloat16, all bytes counted, by "store, tail, tokens"."""
    found = {}
    for store in (CacheQuantization.INT8, CacheQuantization.INT4):
        for tail in TAILS:
            cache = TwoTierKvCache(KvCacheConfig(tail, store_precision=store, max_tokens=2 * max(LENGTHS)))
            held = 0
            for length in LENGTHS:
                blank = np.zeros((length - held, 8, 128), np.float32)
                cache.append(blank, blank)
                held = length
                found[f"{store.value}, tail {tail}, {length} tokens"] = cache.stats().compression_ratio
    return found


def plant(model: Transformer, params: TransformerParams) -> TransformerParams:
    """The same function with outliers among the channels of its keys: one pair of every head grows by `OUTLIER`, and
    the queries shrink by it. Both channels of a rotary pair do, so that the scores stay as they are."""
    half = model.dim_per_head // 2
    grow = np.ones(model.dim_per_head, np.float32)
    grow[[0, half]] = OUTLIER
    layers = params.layers
    assert not isinstance(layers, tuple)
    changed: dict[str, Any] = {}
    for name, heads, by in (("q", model.heads, 1 / grow), ("k", model.key_heads, grow)):
        norm, weight, bias = (getattr(layers, field) for field in (f"{name}_norm", name, f"{name}_bias"))
        if norm is not None:  # it follows the matrix, and undoes what is done there
            changed[f"{name}_norm"] = norm * _last(by, norm)
            continue
        changed[name] = weight * _last(np.tile(by, heads), weight)
        if bias is not None:
            changed[f"{name}_bias"] = bias * _last(np.tile(by, heads), bias)
    return dataclasses.replace(params, layers=dataclasses.replace(layers, **changed))


def _last(by: np.ndarray, x: jax.Array) -> np.ndarray:
    return by.reshape((1,) * (x.ndim - 1) + (-1,))


@functools.cache
def _plain(model: Transformer, attention: str | None):
    return jax.jit(lambda params, rows: model.apply(params, rows, mask=Mask(causal=True), impl=attention).logits)


@functools.cache
def _cached(model: Transformer, settings: Tiers):
    """Jitted `(params, rows) -> logits`, read in chunks through a cache."""

    @jax.jit
    def run(params, rows):
        batch, length = rows.shape
        cache = model.empty_tiered_cache(settings, batch, length, chunk=CHUNK)

        def read(cache, part):
            output = model.apply(params, part, mask=Mask(causal=True), cache=cache)
            return output.aux["cache"], output.logits

        parts = rows.reshape(batch, -1, CHUNK).swapaxes(0, 1)
        logits: Any = jax.lax.scan(read, cache, parts)[1]
        return logits.swapaxes(0, 1).reshape(batch, length, -1)

    return run


@jax.jit
def _compare(base, got, rows):
    """(KL, nats, nats of the base, agreement) of every row, over all tokens but the first."""
    p, q = (jax.nn.log_softmax(x[:, :-1]) for x in (base, got))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean(axis=1)
    nats, plain = (-jnp.take_along_axis(x, rows[:, 1:, None], axis=-1)[..., 0].mean(axis=1) for x in (q, p))
    return kl, nats, plain, (p.argmax(-1) == q.argmax(-1)).mean(axis=1)


def _cost(base: Callable[[jax.Array], jax.Array], rows: np.ndarray, name: str, form: Form, params: Any) -> Cost:
    """Row by row: the logits of all would not fit where vocabularies are large."""
    found = [_compare(base(row), form(params, row), row) for row in jnp.asarray(rows)[:, None]]
    kl, nats, plain, agreement = (np.asarray(x, np.float64).reshape(-1) for x in zip(*found))
    perplexity, before = math.exp(nats.mean()), math.exp(plain.mean())
    error = 1.96 * kl.std(ddof=1) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
    return Cost(name, float(kl.mean()), error, perplexity, perplexity / before - 1, float(agreement.mean()))


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedWeight)


def _bits(params: Any) -> float:
    """Bits a weight of the quantized matrices, tables included."""
    leaves = jax.tree.leaves(params, is_leaf=_is_quantized)
    held = [x for x in leaves if isinstance(x, QuantizedWeight)]
    return 8 * sum(x.nbytes for x in held) / sum(math.prod(x.shape) for x in held)
