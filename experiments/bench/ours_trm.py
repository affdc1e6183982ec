"""Our side of the TRM rows: the training step that `experiments.train experiment=trm_sudoku9` runs.

A program of its own, like the peers. Its argument is a JSON object, the last line on stdout is another, whose
"limit_share" is the share of the matmul rate measured in the same process that the step's multiplications come to.
"""

import json
import sys
import time
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp

from ruvjax.core.params import count, init
from ruvjax.data.puzzles.stream import PuzzleBatch
from ruvjax.models.trm import TinyRecursive
from ruvjax.models.trm_loss import TrmLoss, init_carry, objective
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import compile_step, make_step


def model_of(job) -> TinyRecursive:
    names = ("vocab_size", "length", "prefix", "width", "heads", "layers", "cycles", "updates", "mixer", "dtype")
    return TinyRecursive(**{name: job[name] for name in names}, mlp_width=3 * job["width"], **job.get("model", {}))


def multiplications(model: TinyRecursive, batch: int) -> float:
    """Floating-point operations of the matrix multiplies of one step: 2 for each multiply and add, backward twice
    forward, nothing computed again."""
    p, d = model.positions, model.width
    block = 3 * p * d * model.mlp_width
    if model.mixer == "mlp":
        block += 3 * d * p * model.position_width
    else:
        block += 4 * p * d * d + 2 * p * p * d
    networks = model.layers * (model.updates + 1) * (model.cycles - 1 + 3)
    return 2.0 * batch * (block * networks + 3 * model.length * d * model.vocab_size)


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Floating-point operations a second of a square product, the best of five."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def main() -> None:
    job = json.loads(sys.argv[1])
    rate = matmul_rate(job["dtype"])
    model = model_of(job)
    config = OptimizerConfig(
        kind="adam_atan2", lr=1e-4, b1=0.9, b2=0.95, weight_decay=1.0, clip=0.0, schedule="constant", warmup_steps=0
    )
    optimizer = build_optimizer(config, model.spec())
    rows = job["batch"]
    drawn = jax.random.randint(jax.random.key(2), (2, rows, job["length"]), 1, job["vocab_size"], jnp.int32)
    batch = PuzzleBatch(drawn[0], drawn[1], jnp.zeros((rows,), jnp.int32), jnp.arange(rows, dtype=jnp.int32))
    params = init(model, jax.random.key(0))
    state = init_state(params, optimizer, jax.random.key(1), carry=init_carry(model, params, batch))
    began = time.perf_counter()
    rate_of, parts = partial(learning_rate, config), job["accumulation"]
    step = compile_step(make_step(objective(model, TrmLoss()), optimizer, rate_of, accumulation=parts), state, batch)
    compiled = time.perf_counter() - began
    seconds, values = [], []
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - began)
    seconds = seconds[job["warmup"] :]
    device = jax.devices()[0]
    report = {
        "seconds": seconds,
        "first": compiled,
        "values": values,
        "parameters": count(model),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "limit_share": multiplications(model, rows) / sorted(seconds)[len(seconds) // 2] / rate,
        "matmul_flops": rate,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
