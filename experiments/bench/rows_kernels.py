"""The rows of `name=kernels`: each op of kernels_pallas at one size, against torch or the plain form in jax.numpy."""

from experiments.bench.measure import Program
from experiments.bench.rows import Row

OURS = Program("ours", "experiments.bench.ours_kernels")
PLAIN = Program("plain XLA", "experiments.bench.ours_kernels")
SDPA = Program("torch SDPA", "peer_sdpa.py")

SCAN = {"batch": 1, "length": 2048, "width": 512, "state": 16, "warmup": 2, "repeats": 15}


def _row(name: str, job: dict, peer: Program = PLAIN, dtype: str = "float32") -> Row:
    return Row(name, "calls/s", {"work": name, **job}, 1, OURS, peer, {"form": "product"}, (dtype,), {"form": "plain"})


def kernels() -> list[Row]:
    """Attention against torch; the scan against `associative_scan`; the Q8_0 product at one row against the float32
    one; unmasking against softmax, sums and `jax.random.categorical`."""
    heads = {"batch": 1, "length": 2048, "heads": 8, "dim": 64, "warmup": 2, "repeats": 15}
    return [
        _row("attention_bf16", heads, SDPA, "bfloat16"),
        _row("scan_fwd", SCAN),
        _row("scan_grad", SCAN),
        _row("q8_matvec", {"size": 4096, "warmup": 5, "repeats": 50}),
        _row("unmask", {"rows": 64, "vocab_size": 32768, "warmup": 3, "repeats": 30}),
    ]
