"""The documented MicroLoRA at work: each call is `adapt` on a numpy vector with a gradient estimate, then
`apply_updates`, host transfers included.

python -m experiments.bench.ours_micro '{...}'          (see `rows_banks.py`; the last line on stdout is JSON)

"seconds" holds one number, the 99th percentile of all calls, whose whole distribution is under "facts". With "form":
"limit" it is the limit that the job gives, as the other side of the row.
"""

import json
import sys
import time
from importlib.metadata import version

import jax
import numpy as np

from ruvjax.api.ruvllm_lora import AdaptFeedback, MicroLoRA, MicroLoraConfig

SHARES = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9, "slowest": 100}


def run(job) -> tuple[list[float], float, MicroLoRA]:
    """Seconds of every call, of the first one (with compilation), and what was adapted."""
    lora = MicroLoRA.new(MicroLoraConfig.for_hidden_dim(job["hidden"]))
    module = lora.stats().pending.keys()
    draw = np.random.default_rng(0)
    inputs, directions = (draw.normal(size=(64, job["hidden"])).astype(np.float32) / 64 for _ in range(2))
    seconds: list[float] = []
    for call in range(1 + job["warmup"] + job["calls"]):
        x, g = inputs[call % 64], directions[call % 64]
        began = time.perf_counter()
        lora.adapt(x, AdaptFeedback(0.9, gradient_estimate=g))
        lora.apply_updates(1e-3)
        seconds.append(time.perf_counter() - began)
    assert all(np.isfinite(lora.forward(inputs[0], m)).all() for m in module)
    return seconds[1 + job["warmup"] :], seconds[0], lora


def main() -> None:
    job = json.loads(sys.argv[1])
    facts: dict[str, float] = {}
    seconds, first, parameters = [job["limit_s"]], 0.0, 0
    if job["form"] == "product":
        every, first, lora = run(job)
        parameters = lora.stats().parameters
        facts = {f"{name}_us": 1e6 * float(np.percentile(every, q)) for name, q in SHARES.items()}
        seconds = [float(np.percentile(every, 99))]
    device = jax.devices()[0]
    report = {
        "seconds": seconds,
        "first": first,
        "values": [0.0],
        "parameters": parameters,
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "facts": facts,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
