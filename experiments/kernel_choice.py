"""Which body each op of kernels_pallas takes on this machine, and why: a call of each at a usual size, traced only."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, native
from kernels_pallas.attention import attention
from kernels_pallas.entropy import entropy
from kernels_pallas.kv_attention import empty_pages, empty_tiers, kv_attention
from kernels_pallas.lora_bank import lora_bank
from kernels_pallas.quant_matmul import quant_matmul, quantize
from kernels_pallas.retrieve import keys_of, retrieve
from kernels_pallas.selective_scan import selective_scan, state_space_dual
from kernels_pallas.unmask import draw_noise, masked_cross_entropy, unmask

NATIVE = "xla by C++"
NOT_NATIVE = ("state_space_dual",)  # it shares its folder with an op that has a C++ kernel
DEVICES = {"pallas_gpu": ("cuda", "GPU"), "pallas_tpu": ("tpu", "TPU")}


def examples(attention_impl: str | None) -> dict[str, Callable[[], Any]]:
    """A call of each op by "folder/op", of the sizes of a small model, in the dtype that the device computes in."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    key, weight = jax.random.key(0), quantize(jnp.zeros((256, 256)), "Q8_0")

    def x(*shape: int, of: Any = dtype) -> jax.Array:
        return jnp.zeros(shape, of)

    def cached(q):
        pages = empty_pages(4, page=64, tail_slots=4, store_slots=8)
        return kv_attention(q, empty_tiers(pages, 4, 128, dtype=dtype), pages)

    def heads():
        return attention(x(4, 256, 8, 64), x(4, 256, 4, 64), x(4, 256, 4, 64), impl=attention_impl)

    def scan():
        states = x(2, 256, 16)
        return selective_scan(x(2, 256, 512), x(2, 256, 512), x(512, 16), states, states, x(512))

    def dual():
        states = x(2, 256, 1, 64)
        return state_space_dual(x(2, 256, 8, 64), x(2, 256, 8), x(8), states, states, x(8))

    def bank():  # many adapters, one choice for each position: where a kernel could pay
        return lora_bank(x(2, 256, 512), x(512, 512, 8), x(512, 8, 512), x(2, 256, 2, of=jnp.int32))

    return {
        "attention/attention": heads,
        "entropy/entropy": lambda: entropy(x(256, 8192)),
        "kv_attention/kv_attention": lambda: cached(x(4, 1, 8, 128)),
        "lora_bank/lora_bank": bank,
        "quant_matmul/quant_matmul": lambda: quant_matmul(x(8, 256), weight),
        "retrieve/retrieve": lambda: retrieve(keys_of(x(4096, 256)), x(4096, of=bool), x(11, 256), 8),
        "selective_scan/selective_scan": scan,
        "selective_scan/state_space_dual": dual,
        "unmask/masked_cross_entropy": lambda: masked_cross_entropy(x(512, 32768), x(512, of=jnp.int32)),
        "unmask/unmask": lambda: unmask(x(64, 32768), draw_noise(key, (64,), 32768)),
    }


def kernel_rows(attention_impl: str | None) -> list[tuple[str, str]]:
    """(op, what it takes here and why), one line each. Compiles the C++ kernels where that has not been done."""
    return [
        (name.split("/")[1], describe(name.split("/")[0], call, name == "attention/attention" and attention_impl or ""))
        for name, call in examples(attention_impl).items()
    ]


def describe(folder: str, call: Callable[[], Any], asked: str = "") -> str:
    """The body that `call` of the op in `folder` takes; `asked`: the one that was named."""
    with dispatch.observe() as decisions:
        try:
            jax.eval_shape(call)
        except dispatch.ImplError as error:
            return f"none: {error}"
    if not decisions:
        taken, reasons = _native(folder)
        return f"{taken}: {reasons[0]}" if taken == NATIVE else "a library's kernel: the op itself chose it"
    decision = decisions[0]  # an op inside another comes after it
    taken = next(iter(decision.taken.values()))
    reasons = [f"asked for by kernels.{folder}"] if asked else []
    if taken == "xla" and decision.op not in NOT_NATIVE:
        taken, more = _native(folder)
        reasons += more
    if taken in DEVICES and not asked:
        reasons.append("the best body for this device")
    elif not asked:
        for name, (platform, device) in DEVICES.items():
            if name in decision.refused:
                reasons.append(f"{name} cannot run: {decision.refused[name]}")
            elif name in decision.written and platform not in decision.taken:
                reasons.append(f"{name} needs a {device}")
    return f"{taken}: {'; '.join(reasons) or 'no kernel is written for this op'}"


def _native(folder: str) -> tuple[str, list[str]]:
    """The XLA body or its native equal, and why."""
    if find_spec(f"kernels_pallas.{folder}.cpu") is None:
        return "xla", []
    if dispatch.platforms() != ("cpu",):
        return "xla", ["the C++ kernel runs where there is a CPU alone"]
    module = import_module(f"kernels_pallas.{folder}.cpu")
    reason = native.unavailable(module.SOURCE, module.TARGETS)
    return ("xla", [f"no C++ kernel: {reason}"]) if reason else (NATIVE, ["compiled for this processor"])
