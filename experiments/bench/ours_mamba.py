"""Our side of the Mamba rows: loss and gradients of one long row, and greedy decoding by the product's own loop.

`planned_bytes` is what XLA allocates for one call.

python -m experiments.bench.ours_mamba '{...}'          (see `rows_mamba.py`; the last line on stdout is JSON)
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

from experiments.bench.peer_mambapy import reset_peak, resident
from kernels_pallas.unmask import masked_cross_entropy
from ruvjax.core.params import count, init, unstack
from ruvjax.decoding.autoregressive import Decoding, generate
from ruvjax.models.mamba import Mamba


def timed(job, run) -> tuple[list[float], list[float], dict[str, int]]:
    """Seconds and value of each repetition after the warm-up, and the memory that the repetitions took."""
    seconds, values = [], []
    before = resident()
    reset_peak()
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        values.append(float(jax.block_until_ready(run())))
        seconds.append(time.perf_counter() - began)
    peak = resident(peak=True)
    return seconds[job["warmup"] :], values, {"peak_bytes": peak, "step_bytes": peak - before}


def fwdbwd(job, model: Mamba, params) -> tuple[Callable[[], jax.Array], Any]:
    """The mean next-token loss and all its gradients."""
    tokens = jax.random.randint(jax.random.key(1), (job["batch"], job["length"]), 0, job["vocab_size"])

    def loss(params):
        logits = model.apply(params, tokens).logits
        assert logits is not None
        return jnp.mean(masked_cross_entropy(logits[:, :-1], tokens[:, 1:]))

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return lambda: compiled(params)[0], compiled


def decode(job, model: Mamba, params) -> tuple[Callable[[], jax.Array], Any]:
    """`length` tokens after a prompt of one, the likeliest each."""

    def forward(params, tokens, time, carry):
        output = model.apply(params, tokens, cache=carry)
        return output, output.aux["cache"]

    canvas = jnp.zeros((job["batch"], 1 + job["length"]), jnp.int32)
    free = jnp.broadcast_to(jnp.arange(canvas.shape[1])[None, :] > 0, canvas.shape)
    carry = model.empty_cache(job["batch"])

    @jax.jit
    def run(params, *inputs, carry):
        apart = unstack(params, model.layers)
        return generate(Decoding(temperature=0.0), forward, apart, *inputs, start=1, carry=carry)

    compiled = run.lower(params, canvas, free, jax.random.key(2), carry=carry).compile()
    call = partial(compiled, params, canvas, free, jax.random.key(2), carry=carry)
    return lambda: jnp.sum(call().tokens), compiled


def main() -> None:
    job = json.loads(sys.argv[1])
    sizes = {key: job[key] for key in ("vocab_size", "layers", "width", "state", "dtype")}
    model = Mamba(**sizes, tied_head=False)
    params = init(model, jax.random.key(0))
    began = time.perf_counter()
    run, program = {"fwdbwd": fwdbwd, "decode": decode}[job["work"]](job, model, params)
    compiled = time.perf_counter() - began
    planned = program.memory_analysis()
    seconds, values, memory = timed(job, run)
    device = jax.devices()[0]
    report = {
        "seconds": seconds,
        "first": compiled,
        "values": values,
        "parameters": count(model),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        **memory,
        "planned_bytes": 0 if planned is None else planned.temp_size_in_bytes + planned.output_size_in_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
