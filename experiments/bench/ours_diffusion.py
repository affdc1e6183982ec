"""Our side of the diffusion rows: the training step and the sampler that `experiments.train` and `.sample` run.

A program of its own, like the peers, so that each side has its own allocator. Its argument is a JSON object, the last
line on stdout is another:  python -m experiments.bench.ours_diffusion '{...}'
"""

import json
import sys
import time
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp

from experiments.wiring import encode_of, forward_of, project_of
from ruvjax.core.params import count, init
from ruvjax.data.pipeline import Batch
from ruvjax.diffusion.loss import DiffusionLoss, objective
from ruvjax.diffusion.sampler import Sampler, sample
from ruvjax.models.transformer import Transformer
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from ruvjax.training.state import init_state
from ruvjax.training.step import compile_step, make_step


def model_of(job) -> Transformer:
    sizes = {key: job[key] for key in ("vocab_size", "layers", "width", "heads", "mlp_width", "dtype")}
    return Transformer(**sizes, max_length=job["length"], **job.get("model", {}))


def time_training(job, tokens, mask_id):
    """Seconds a step, compile apart. As in training, a step is dispatched before the loss of the last one is read."""
    model = model_of(job)
    config = OptimizerConfig(lr=1e-3, weight_decay=0.01, clip=0.0, schedule="constant", warmup_steps=0)
    optimizer = build_optimizer(config, model.spec())
    # The masked share of a batch whose times are spread evenly is 0.5, give or take a hundredth.
    loss = DiffusionLoss(kind="continuous", attend="row", masked_rows=0.54)
    goal = objective(loss, encode_of(model), project_of(model), mask_id=mask_id, batch_size=job["batch"])
    step = make_step(goal, optimizer, partial(learning_rate, config))
    state = init_state(init(model, jax.random.key(0)), optimizer, jax.random.key(1))
    batch = Batch(
        tokens=tokens,
        segments=jnp.ones_like(tokens),
        fixed=jnp.zeros(tokens.shape, bool),
        index=jnp.arange(job["batch"], dtype=jnp.int32),
    )
    began = time.perf_counter()
    step = compile_step(step, state, batch)
    compiled = time.perf_counter() - began
    values, moments = [], []
    state, metrics = step(state, batch)
    for _ in range(1 + job["warmup"] + job["repeats"]):
        before = metrics["loss"]
        state, metrics = step(state, batch)
        values.append(float(before))
        moments.append(time.perf_counter())
    values.append(float(metrics["loss"]))
    # Between two of these moments lies one whole step, whether the runtime dispatches ahead or not.
    seconds = [late - early for early, late in zip(moments, moments[1:])]
    return compiled, seconds[job["warmup"] :], values, count(model)


def time_sampling(job, tokens, mask_id):
    """Seconds for a whole batch of samples, compile apart."""
    model = model_of(job)
    params = init(model, jax.random.key(0))
    sampler = Sampler(order="confidence", steps=job["steps"], temperature=job["temperature"])
    tokens = tokens.at[:, job["length"] - job["generated"] :].set(mask_id)
    seconds, values = [], []
    for repeat in range(1 + job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        state = sample(sampler, forward_of(model), params, tokens, jax.random.key(repeat), mask_id=mask_id)
        values.append(float((state.tokens == mask_id).sum()))  # none may be left
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1 + job["warmup"] :], values, count(model)


def main() -> None:
    job = json.loads(sys.argv[1])
    mask_id = job["vocab_size"] - 1
    tokens = jax.random.randint(jax.random.key(2), (job["batch"], job["length"]), 0, mask_id, jnp.int32)
    work = {"train": time_training, "sample": time_sampling}[job["work"]]
    compiled, seconds, values, parameters = work(job, tokens, mask_id)
    device = jax.devices()[0]
    report = {
        "seconds": seconds,
        "first": compiled,
        "values": values,
        "parameters": parameters,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
