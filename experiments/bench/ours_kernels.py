"""One op of kernels_pallas at one size: its product form ("form": "product") or the plain one that it replaces.

python -m experiments.bench.ours_kernels '{...}'          (see `rows_kernels.py`; the last line on stdout is JSON)

"limit_share" is the share of the ceiling measured in the same process: the matmul rate for attention, the rate at which
memory is read for the other ops, counting what they must read and write once.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention import attention
from kernels_pallas.quant_matmul import quant_matmul, quantize
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.unmask import draw_noise, unmask


def scan_operands(job) -> tuple[jax.Array, ...]:
    batch, length, width, state = (job[name] for name in ("batch", "length", "width", "state"))
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (batch, length, width))
    delta = jax.nn.softplus(jax.random.normal(keys[1], x.shape) - 4)
    a = -jnp.tile(jnp.arange(1.0, state + 1), (width, 1))
    b, c = (jax.random.normal(key, (batch, length, state)) for key in keys[2:4])
    return x, delta, a, b, c, jnp.ones(width)


def associative_scan(x, delta, a, b, c, d):
    """The recurrence by `lax.associative_scan`, all states written out."""

    def compose(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay = jnp.exp(delta[..., None] * a[None, None])
    _, states = lax.associative_scan(compose, (decay, (delta * x)[..., None] * b[:, :, None]), axis=1)
    return jnp.einsum("blds,bls->bld", states, c) + d[None, None] * x


def naive_unmask(logits, key):
    """What a sampler needs of each row, as one would write it: token, log-probability, confidence, entropy, margin."""
    probs = jax.nn.softmax(logits, axis=-1)
    token = jax.random.categorical(key, logits, axis=-1)
    top = lax.top_k(probs, 2)[0]
    entropy = -jnp.sum(probs * jnp.log(jnp.maximum(probs, 1e-30)), axis=-1)
    log_prob = jnp.log(jnp.take_along_axis(probs, token[:, None], axis=-1)[:, 0])
    return token, log_prob, top[:, 0], entropy, top[:, 0] - top[:, 1]


def work_of(job) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, float]]:
    """The function, its operands, and the "flops" or "bytes" that it cannot do without."""
    product, dtype = job["form"] == "product", job["dtype"]
    match job["work"]:
        case "attention_bf16":
            shape = (job["batch"], job["length"], job["heads"], job["dim"])
            q, k, v = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
            return attention, (q, k, v), {"flops": 4.0 * q.size * job["length"]}
        case "scan_fwd" | "scan_grad":
            operands = scan_operands(job)

            def scan(*operands):
                return selective_scan(*operands)[0] if product else associative_scan(*operands)

            read = 4.0 * sum(x.size for x in operands) + 4.0 * operands[0].size
            if job["work"] == "scan_fwd":
                return scan, operands, {"bytes": read}
            gradient = jax.grad(lambda *operands: jnp.sum(jnp.square(scan(*operands))), argnums=tuple(range(6)))
            return gradient, operands, {"bytes": 2 * read}
        case "q8_matvec":
            size = job["size"]
            w, x = jax.random.normal(jax.random.key(0), (size, size)), jax.random.normal(jax.random.key(1), (1, size))
            if not product:
                return jnp.matmul, (x, w), {"bytes": 4.0 * size * size}
            weight = quantize(w, "Q8_0")
            return quant_matmul, (x, weight), {"bytes": float(weight.nbytes)}
        case "unmask":
            logits = 4 * jax.random.normal(jax.random.key(0), (job["rows"], job["vocab_size"]))

            def draw(logits, key):
                return unmask(logits, draw_noise(key, logits.shape[:1], logits.shape[1]))

            return draw if product else naive_unmask, (logits, jax.random.key(1)), {"bytes": 4.0 * logits.size}
    raise ValueError(job["work"])


def seconds_of(run, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return seconds


def ceiling(unit: str, dtype: str) -> float:
    """The measured matmul rate (flop/s) or the rate at which memory is read (bytes/s), median of 10."""
    if unit == "flops":
        x = jnp.ones((1024, 1024), dtype)
        program = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32))
        amount, run = 2.0 * 1024**3, lambda: program(x, x)
    else:
        many = jnp.ones(1 << 26, jnp.float32)
        total = jax.jit(jnp.sum)
        amount, run = 4.0 * many.size, lambda: total(many)
    run().block_until_ready()
    return amount / sorted(seconds_of(run, 10))[5]


def main() -> None:
    job = json.loads(sys.argv[1])
    function, operands, needed = work_of(job)
    began = time.perf_counter()
    program = jax.jit(function).lower(*operands).compile()
    compiled = time.perf_counter() - began
    seconds = seconds_of(lambda: program(*operands), job["warmup"] + job["repeats"])[job["warmup"] :]
    (unit, amount), *_ = needed.items()
    planned, device = program.memory_analysis(), jax.devices()[0]
    # In bfloat16 and of any tree: that it is finite is all that the value is for.
    value = sum(float(jnp.sum(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(program(*operands)))
    report = {
        "seconds": seconds,
        "first": compiled,
        "values": [value],
        "parameters": 0,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "limit_share": amount / sorted(seconds)[len(seconds) // 2] / ceiling(unit, job["dtype"]),
        "step_bytes": 0 if planned is None else planned.temp_size_in_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
