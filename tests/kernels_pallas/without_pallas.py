"""Run by test_without_pallas.py in a process of its own: every op, and a training step, where Pallas is not there.

Prints JSON: {"ops": [those that agree with the reference], "refused": {op: {impl: message}}, "losses": [...], "pallas":
[modules of it that were imported]}.
"""

import json
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "block_pallas.py"))

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import Mask, attention
from kernels_pallas.dispatch import ImplError
from kernels_pallas.entropy import entropy
from kernels_pallas.kv_attention import append, empty_pages, empty_tiers, kv_attention
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import quant_matmul, quantize
from kernels_pallas.retrieve import keys_of, retrieve
from kernels_pallas.selective_scan import selective_scan, state_space_dual
from kernels_pallas.unmask import draw_noise, masked_cross_entropy, unmask
from ruvjax.core.params import init
from ruvjax.models.transformer import Transformer
from ruvjax.training.optimizer import OptimizerConfig, build_optimizer
from ruvjax.training.state import init_state
from ruvjax.training.step import make_step


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def scan(impl):
    a, b, c = -jnp.exp(normal(64, 8)), normal(1, 8, 8), normal(1, 9, 8)[:, 1:]
    return selective_scan(normal(1, 8, 64), jax.nn.softplus(normal(1, 8, 64)), a, b, c, normal(64), impl=impl)


def dual(impl):
    b = normal(1, 8, 1, 4)
    return state_space_dual(normal(1, 8, 2, 4), jnp.ones((1, 8, 2)), -jnp.ones(2), b, b, normal(2), impl=impl)


def cached(impl):
    pages = empty_pages(1, page=4, tail_slots=2)
    pages, tiers = append(
        pages, empty_tiers(pages, 1, 128, dtype=jnp.float32), normal(1, 5, 1, 128), normal(1, 5, 1, 128)
    )
    return kv_attention(normal(1, 2, 2, 128), tiers, pages, impl=impl)


def bank(impl):
    ids = jnp.asarray([[[0], [3], [1], [-1]]], jnp.int32)
    return lora_bank(normal(1, 4, 128), normal(4, 128, 8), normal(4, 8, 128), ids, impl=impl)


def head(impl):
    return attention(normal(1, 8, 2, 8), normal(1, 8, 1, 8), normal(1, 8, 1, 8), Mask(causal=True), impl=impl)


OPS = {
    "attention": head,
    "entropy": lambda impl: entropy(normal(3, 5, 70), impl=impl),
    "kv_attention": cached,
    "lora_bank": bank,
    "quant_matmul": lambda impl: quant_matmul(normal(4, 256), quantize(normal(256, 256), "Q8_0"), impl),
    "retrieve": lambda impl: retrieve(keys_of(normal(50, 8)), jnp.arange(50) != 3, normal(2, 8), 4, impl=impl),
    "selective_scan": scan,
    "state_space_dual": dual,
    "masked_cross_entropy": lambda impl: masked_cross_entropy(normal(8, 256), jnp.arange(8), impl=impl),
    "unmask": lambda impl: unmask(normal(8, 256), draw_noise(jax.random.key(0), (8,), 256), impl=impl),
}


def refused(op):
    messages = {}
    for impl in ("pallas_gpu", "pallas_tpu", "interpret"):
        try:
            OPS[op](impl)
        except ImplError as error:
            messages[impl] = str(error)
    return messages


def losses():
    model = Transformer(vocab_size=16, layers=1, width=16, heads=2, kv_heads=1, mlp_width=32, max_length=8)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (4, 8)), jnp.int32)

    def objective(params, carry, batch, key):
        logits = model.apply(params, batch, mask=Mask(causal=True)).logits
        loss = jnp.mean(masked_cross_entropy(logits[:, :-1], batch[:, 1:]))
        return loss, (carry, {"loss": loss})

    optimizer = build_optimizer(OptimizerConfig(lr=0.01, warmup_steps=1), model.spec())
    state = init_state(init(model, jax.random.key(0)), optimizer, jax.random.key(1), ema=False)
    state = state.replace(total=jnp.int32(10))
    step = jax.jit(make_step(objective, optimizer, lambda count, total: 0.01, ema=0.0, accumulation=1))
    found = []
    for _ in range(5):
        state, metrics = step(state, tokens)
        found.append(float(metrics["loss"]))
    return found


def agree(op):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), OPS[op](None), OPS[op]("reference"))
    return op


report = {"ops": [agree(op) for op in OPS], "refused": {op: refused(op) for op in OPS}, "losses": losses()}
report["pallas"] = [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
print(json.dumps(report))
