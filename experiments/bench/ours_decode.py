"""Our side of the decoding rows: one prompt continued greedily over a key-value cache, as `experiments.sample` does it.

python -m experiments.bench.ours_decode '{...}'          (see `rows_decode.py`; the last line on stdout is JSON)

"form" is float32, or the kind of blocks that the matrices are put into. "limit_share" is the share of the time that
memory needs, at the rate measured in the same process, to hand over the weights that a token reads.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from experiments.bench.ours_kernels import ceiling
from experiments.drawing import BURST
from ruvjax.core.params import unstack
from ruvjax.decoding.autoregressive import Decoding
from ruvjax.decoding.batching import Request, decode, stream
from ruvjax.io.huggingface import load_model
from ruvjax.io.quantize import quantize_params
from ruvjax.models.causal import forward_left_of
from ruvjax.models.transformer import Transformer


def prompt_of(job, vocab_size: int) -> list[int]:
    """The same tokens for every side: a peer repeats this arithmetic."""
    return [(7919 * i + 13) % vocab_size for i in range(job["prompt"])]


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_per_token(params: Any) -> int:
    """What every token reads of the weights: all but the table of embeddings, of which it needs one row, unless that is
    the head too."""
    return bytes_of(params) - (bytes_of(params.embedding) if params.head is not None else 0)


def loaded(job) -> tuple[Transformer, Any, int]:
    """The model, its parameters in the form that was asked for, and how many weights there are."""
    model, params, _ = load_model(f"{job['folder']}/float32")
    assert isinstance(model, Transformer)
    weights = sum(x.size for x in jax.tree.leaves(params))
    if job["form"] != "float32":
        params, _ = quantize_params(model, params, job["form"], job["folder"])
    return model, unstack(params, model.layers), weights


def continued(job, model: Transformer, params: Any) -> list[int]:
    """The tokens that follow the prompt, prefill included."""
    told = stream(
        Decoding(temperature=0.0),
        forward_left_of(model),
        params,
        [Request(prompt_of(job, model.vocab_size), job["generated"])],
        jax.random.key(0),
        empty=lambda rows: model.empty_cache(rows, -(-(job["prompt"] + job["generated"]) // 64) * 64),
        vocabulary=model.vocab_size,
        slots=1,
        chunk=-(-job["prompt"] // 16) * 16,
        burst=BURST,
    )
    return decode(told)[0].tokens


def main() -> None:
    job = json.loads(sys.argv[1])
    model, params, weights = loaded(job)
    seconds, tokens = [], []
    for _ in range(1 + job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        tokens = continued(job, model, params)
        seconds.append(time.perf_counter() - began)
    first, seconds = seconds[0], seconds[1 + job["warmup"] :]
    device = jax.devices()[0]
    rate = bytes_per_token(params) * job["generated"] / statistics.median(seconds)
    report = {
        "seconds": seconds,
        "first": first,
        "values": [float(np.mean(tokens))],
        "parameters": weights,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "limit_share": rate / ceiling("bytes", "float32"),
        "facts": {"weight_bytes": bytes_of(params)},
        "tokens": tokens,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
