"""Our side of the denoising rows: half-masked held-out text filled by a trained model, one row at a time, greedily.

python -m experiments.bench.ours_denoise '{...}'          (see `rows_decode.py`; the last line on stdout is JSON)

"form": dual keeps keys and values of the other blocks and commits all tokens surer than a bar; uncached runs the whole
row for every token. Beside the time: the share of the masked tokens that are what the text has, and the forward passes.
"""

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version

import jax
import numpy as np

from experiments.bench.make_models import CANVAS, RUN
from experiments.settings import ModelPath
from experiments.wiring import Loaded, load
from ruvjax.diffusion.sampler import Sampler, SamplerState, sample
from ruvjax.models.transformer import Transformer


def sampler_of(job) -> Sampler:
    tokens = job["length"] // job["block"] * job["masked"]
    common = {"order": "confidence", "temperature": 0.0, "block_size": job["block"], "block_origin": "canvas"}
    if job["form"] == "uncached":
        return Sampler(steps=tokens, tokens_per_step=1, **common)
    return Sampler(steps=tokens, threshold=job["threshold"], cache="dual", **common)


def filled(sampler: Sampler, loaded: Loaded, row: np.ndarray) -> SamplerState:
    """One row [length] denoised."""
    forward, carry = loaded.denoiser(sampler, 1, len(row), None)
    mask_id = loaded.tokenizer.mask_id
    return sample(sampler, forward, loaded.params, row[None], jax.random.key(0), mask_id=mask_id, carry=carry)


def main() -> None:
    job = json.loads(sys.argv[1])
    loaded = load(ModelPath(f"{job['folder']}/{RUN}"))
    assert isinstance(loaded.model, Transformer)
    loaded = replace(loaded, model=replace(loaded.model, dtype=job["dtype"]))
    canvas = np.load(f"{job['folder']}/{CANVAS}")
    masked, text, sampler = canvas["masked"], canvas["text"], sampler_of(job)
    mask_id = loaded.tokenizer.mask_id
    began = time.perf_counter()
    jax.block_until_ready(filled(sampler, loaded, masked[0]).tokens)
    first, seconds, states = time.perf_counter() - began, [], []
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        states = [filled(sampler, loaded, row) for row in masked]
        jax.block_until_ready([state.tokens for state in states])
        seconds.append(time.perf_counter() - began)
    tokens, free = np.concatenate([state.tokens for state in states]), masked == mask_id
    device = jax.devices()[0]
    report = {
        "seconds": seconds[job["warmup"] :],
        "first": first,
        "values": [float(np.sum(tokens == mask_id))],  # none may be left
        "parameters": sum(x.size for x in jax.tree.leaves(loaded.params)),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "facts": {
            "accuracy": float(np.mean((tokens == text)[free])),
            "passes_per_token": float(sum(int(state.nfe[0]) for state in states) / free.sum()),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
