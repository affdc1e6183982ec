"""The rows of `name=kernels`: each op of kernels_pallas at one size, against torch or the plain form in jax.numpy."""

from experiments.bench.measure import Program
from experiments.bench.rows import Row

OURS = Program("ours", "experiments.bench.ours_kernels")
PLAIN = Program("plain XLA", "experiments.bench.ours_kernels")
SDPA = Program("torch SDPA", "peer_sdpa.py")

CACHE = {"batch": 1, "length": 4096, "kept": 256, "heads": 8, "kv_heads": 8, "dim": 64, "warmup": 3, "repeats": 30}
SCAN = {"batch": 1, "length": 2048, "width": 512, "state": 16, "warmup": 2, "repeats": 15}


def _row(name: str, job: dict, peer: Program = PLAIN, dtype: str = "float32") -> Row:
    return Row(name, "calls/s", {"work": name, **job}, 1, OURS, peer, {"form": "product"}, (dtype,), {"form": "plain"})


def kernels() -> list[Row]:
    """Attention against torch; the scan against `associative_scan`; quantized products at one row against the float32
    one; unmasking against softmax, sums and `jax.random.categorical`, its loss against `log_softmax`; one query over a
    cache in two tiers against a softmax over the same keys and values in float32; selected adapters against a gather
    of their matrices."""
    matvec = {"size": 4096, "warmup": 5, "repeats": 50}
    adapters = {"width": 256, "warmup": 3, "repeats": 30}
    heads = {"batch": 1, "length": 2048, "heads": 8, "dim": 64, "warmup": 2, "repeats": 15}
    return [
        _row("attention_bf16", heads, SDPA, "bfloat16"),
        _row("scan_fwd", SCAN),
        _row("scan_grad", SCAN),
        _row("q8_matvec", matvec),
        _row("q4_0_matvec", matvec),
        _row("q4_k_matvec", matvec),
        _row("unmask", {"rows": 64, "vocab_size": 32768, "warmup": 3, "repeats": 30}),
        _row("masked_loss_grad", {"rows": 1024, "vocab_size": 8192, "warmup": 2, "repeats": 15}),
        _row("kv_attention_int8", CACHE),
        _row("kv_attention_int4", CACHE),
        _row("lora_sequences", {"rows": 32, "length": 64, "selected": 4, "bank": 10000, "rank": 8, **adapters}),
        _row("lora_positions", {"rows": 1, "length": 64, "selected": 8, "bank": 100000, "rank": 2, **adapters}),
        _row("lora_dense", {"rows": 8, "length": 256, "selected": 2, "bank": 16, "rank": 8, **adapters}),
    ]
