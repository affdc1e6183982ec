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

from kernels_pallas.attention import Mask, attention
from kernels_pallas.kv_attention import append, dense, empty_pages, empty_tiers, kv_attention, migrate
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import quant_matmul, quantize
from kernels_pallas.selective_scan import selective_scan
from kernels_pallas.unmask import draw_noise, masked_cross_entropy, unmask

WEIGHTS = {"q8_matvec": "Q8_0", "q4_0_matvec": "Q4_0", "q4_k_matvec": "Q4_K"}


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


def naive_loss(logits, targets):
    """Cross-entropy by a log-softmax that is written out."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]


def filled_cache(job, bits: int):
    """A cache of `length` random tokens, the last `kept` of them (and what fills a page) in its tail."""
    shape = (job["batch"], job["length"], job["kv_heads"], job["dim"])
    k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0)))
    slots = -(-job["length"] // 64)
    pages = empty_pages(job["batch"], tail_slots=slots, store_slots=slots)
    tiers = empty_tiers(pages, job["kv_heads"], job["dim"], key_bits=bits, value_bits=bits)
    return migrate(*append(pages, tiers, k, v), keep=job["kept"])


def adapter_operands(job) -> tuple[jax.Array, ...]:
    """x, both matrices of every adapter of the bank, and the choice: for each sequence where there are several."""
    rows, length, width, bank, rank, k = (job[name] for name in ("rows", "length", "width", "bank", "rank", "selected"))
    keys = jax.random.split(jax.random.key(0), 5)
    each = (rows, k) if job["work"] == "lora_sequences" else (rows, length, k)
    return (
        jax.random.normal(keys[0], (rows, length, width)),
        jax.random.normal(keys[1], (bank, width, rank)),
        jax.random.normal(keys[2], (bank, rank, width)),
        jax.random.randint(keys[3], each, 0, bank),
        jax.random.uniform(keys[4], each),
    )


def gathered_adapters(x, a, b, ids, weights):
    """The chosen matrices gathered and multiplied, as one would write it."""
    if ids.ndim == 2:
        inner = jnp.einsum("sli,skir->slkr", x, a[ids])
        return jnp.einsum("slkr,sk,skro->slo", inner, weights, b[ids])
    inner = jnp.einsum("sli,slkir->slkr", x, a[ids])
    return jnp.einsum("slkr,slk,slkro->slo", inner, weights, b[ids])


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
        case "q8_matvec" | "q4_0_matvec" | "q4_k_matvec":
            size = job["size"]
            w, x = jax.random.normal(jax.random.key(0), (size, size)), jax.random.normal(jax.random.key(1), (1, size))
            if not product:
                return jnp.matmul, (x, w), {"bytes": 4.0 * size * size}
            weight = quantize(w, WEIGHTS[job["work"]])
            return quant_matmul, (x, weight), {"bytes": float(weight.nbytes)}
        case "unmask":
            logits = 4 * jax.random.normal(jax.random.key(0), (job["rows"], job["vocab_size"]))

            def draw(logits, key):
                return unmask(logits, draw_noise(key, logits.shape[:1], logits.shape[1]))

            return draw if product else naive_unmask, (logits, jax.random.key(1)), {"bytes": 4.0 * logits.size}
        case "masked_loss_grad":
            shape = (job["rows"], job["vocab_size"])
            logits = 4 * jax.random.normal(jax.random.key(0), shape)
            targets = jax.random.randint(jax.random.key(1), shape[:1], 0, shape[1])
            loss = masked_cross_entropy if product else naive_loss
            gradient = jax.value_and_grad(lambda logits, targets: jnp.mean(loss(logits, targets)))
            return gradient, (logits, targets), {"bytes": 2 * 4.0 * logits.size}
        case "kv_attention_int8" | "kv_attention_int4":
            pages, tiers = filled_cache(job, 8 if job["work"].endswith("int8") else 4)
            q = jax.random.normal(jax.random.key(1), (job["batch"], 1, job["heads"], job["dim"]))
            if product:
                tokens = {"tail": pages.lengths - pages.stored, "store": pages.stored}
                read = sum(
                    float(jnp.sum(count)) * sum(x[:1].nbytes for x in jax.tree.leaves(pool)) / pages.page
                    for count, pool in (
                        (tokens["tail"], (tiers.tail_k, tiers.tail_v)),
                        (tokens["store"], (tiers.store_k, tiers.store_v)),
                    )
                )
                return kv_attention, (q, tiers, pages), {"bytes": read}
            k, v, _, valid = dense(tiers, pages)
            order = jnp.argsort(~valid[0], stable=True)[: job["length"]]
            k, v = (x[:, order].astype(jnp.float32) for x in (k, v))
            return lambda q, k, v: attention(q, k, v, Mask()), (q, k, v), {"bytes": 4.0 * (k.size + v.size)}
        case "lora_sequences" | "lora_positions" | "lora_dense":
            operands = adapter_operands(job)
            x, a, b, ids, _ = operands
            chosen = min(ids.size, job["bank"]) * (a[0].nbytes + b[0].nbytes)
            return lora_bank if product else gathered_adapters, operands, {"bytes": chosen + 2.0 * x.nbytes}
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
