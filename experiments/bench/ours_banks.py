"""Our side of the rows on banks: a search among the keys of a full bank, and denoising with full banks or without.

python -m experiments.bench.ours_banks '{...}'          (see `rows_banks.py`; the last line on stdout is JSON)

Beside the times: the median and the 99th percentile of a query in banks of 10k, 50k and 100k, and the recall of the 8
nearest against float64 products, in keys that are clustered and in keys that are not; of the step, its time with each
bank alone, which is then searched at every step, and the bytes that the banks take.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import bank_keys
from experiments.wiring import forward_of
from ruvjax.core.params import count, init, unstack
from ruvjax.diffusion.sampler import Sampler, sample
from ruvjax.lora import bank as banking
from ruvjax.lora import denoise
from ruvjax.lora.guided import DGR
from ruvjax.lora.talora import TALoRA
from ruvjax.models.transformer import Transformer

RECALLED = 64  # queries


def timed(run: Callable[[int], Any], warmup: int, repeats: int) -> list[float]:
    """Seconds of each call, which is given its number."""
    seconds: list[float] = []
    for number in range(warmup + repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(number))
        seconds.append(time.perf_counter() - began)
    return seconds[warmup:]


def bank_of(keys: np.ndarray, rank: int, hidden: int) -> banking.Bank:
    """A full bank with these keys and small random adapters."""
    # The same million numbers again and again: drawing a quarter of a billion takes longer than what is timed.
    drawn = (0.02 * np.random.default_rng(rank).standard_normal(1_000_003, np.float32)).astype(jnp.bfloat16)
    shapes = ((len(keys), hidden, rank), (len(keys), rank, hidden))
    a, b = (jnp.asarray(np.resize(drawn, shape)) for shape in shapes)
    return banking.filled(jnp.asarray(keys), a, b)


def recalled(slots: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> float:
    """The share of the nearest by float64 products that are among `slots`. What is as near, to rounding, is as good."""
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    worst = np.sort(scores, axis=1)[:, -slots.shape[1]]
    return float(np.mean(np.take_along_axis(scores, slots, axis=1) >= worst[:, None] - 1e-6))


_look = jax.jit(banking.retrieve, static_argnums=2)


def search(job) -> dict[str, Any]:
    seconds: list[float] = []
    first, facts, nearest = 0.0, {}, []

    def asking(bank: banking.Bank, queries: np.ndarray, at_once: int) -> list[float]:
        rows = [jnp.asarray(queries[i : i + at_once]) for i in range(RECALLED - at_once + 1)]
        return timed(lambda number: _look(bank, rows[number % len(rows)], job["k"]), job["warmup"], job["repeats"])

    for size in (job["count"] // 10, job["count"] // 2, job["count"]):
        for kind in ("clustered", "iid"):
            keys = bank_keys.keys(kind, size, job["dim"])
            queries = bank_keys.queries(kind, keys, RECALLED)
            bank = bank_of(keys, 1, job["dim"])
            began = time.perf_counter()
            jax.block_until_ready(_look(bank, queries[:1], job["k"]))
            first = time.perf_counter() - began
            seconds = asking(bank, queries, 1)
            slots = np.asarray(_look(bank, queries, job["k"])[0])
            label = f"{size // 1000}k_{kind}"
            facts[f"recall_{label}"] = recalled(slots, keys, queries)
            facts |= {f"p{p}_ms_{label}": 1e3 * float(np.percentile(seconds, p)) for p in (50, 99)}
            if size == job["count"]:
                facts[f"p50_ms_{label}_11_queries"] = 1e3 * float(np.percentile(asking(bank, queries, 11), 50))
            nearest += slots.ravel().tolist()
    # What is timed last is the row: the i.i.d. keys of the largest bank.
    return {"seconds": seconds, "first": first, "values": [0.0], "parameters": 0, "facts": facts, "tokens": nearest}


def step(job) -> dict[str, Any]:
    sizes = {key: job[key] for key in ("vocab_size", "layers", "width", "heads", "mlp_width", "dtype")}
    model = Transformer(**sizes, max_length=job["length"])
    params = unstack(init(model, jax.random.key(0)), model.layers)
    base, mask_id = forward_of(model), job["vocab_size"] - 1
    sampler = Sampler(order="random", steps=job["steps"])
    tokens = np.full((1, job["length"]), mask_id, np.int32)

    def trajectory(forward, given, carry, number: int):
        state = sample(sampler, forward, given, tokens, jax.random.key(number), mask_id=mask_id, carry=carry)
        return state.tokens

    def adapted(pairs, boundaries, held) -> Callable[[int], Any]:
        config, guide = TALoRA(job["width"], pairs, boundaries, layer=job["layer"]), DGR(threshold=0.0)
        forward = denoise.forward(config, base, mask_id=mask_id, timeless=True, guide=guide)
        carry = denoise.begin(config, 1, job["length"], None, guide=guide)
        return partial(trajectory, forward, denoise.Params(params, held), carry)

    run, facts = partial(trajectory, base, params, None), {}
    each: list[Callable[[int], Any]] = []
    if job["form"] == "adapted":
        pairs = tuple((capacity, rank) for capacity, rank in job["banks"])
        held = tuple(bank_of(bank_keys.keys("iid", c, job["width"]), r, job["width"]) for c, r in pairs)
        run = adapted(pairs, tuple(job["boundaries"]), held)
        each = [adapted((pair,), (), (bank,)) for pair, bank in zip(pairs, held)]
        adapters = sum(bank.a.nbytes + bank.b.nbytes for bank in held)
        facts = {"adapter_bytes": adapters, "bank_bytes": sum(bank.nbytes for bank in held)}
    began = time.perf_counter()
    left = int(np.sum(np.asarray(run(0)) == mask_id))
    first = time.perf_counter() - began
    seconds = timed(run, job["warmup"], job["repeats"])
    facts["step_ms"] = 1e3 * float(np.median(seconds)) / job["steps"]
    for alone, name in zip(each, ("coarse", "domain", "fine")):
        facts[f"step_ms_{name}_alone"] = 1e3 * float(np.median(timed(alone, 1, 1))) / job["steps"]
    return {"seconds": seconds, "first": first, "values": [float(left)], "parameters": count(model), "facts": facts}


def main() -> None:
    job = json.loads(sys.argv[1])
    report = {"search": search, "step": step}[job["work"]](job)
    device = jax.devices()[0]
    report["device"] = "cpu" if device.platform == "cpu" else device.device_kind
    report["versions"] = {name: version(name) for name in ("jax", "jaxlib")}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
