"""The rows of `name=decode`: one token after the other over a cache of keys and values, and blocks denoised so."""

from collections.abc import Mapping
from typing import Any

from experiments.bench.measure import Program
from experiments.bench.rows import Row

OURS = Program("ours", "experiments.bench.ours_decode")
FLOAT32 = Program("ruvjax float32", "experiments.bench.ours_decode")
TRANSFORMERS = Program("transformers", "peer_transformers.py", imports=("torch", "transformers"))
LLAMA_CPP = Program("llama.cpp", "peer_llama_cpp.py", imports=("llama_cpp",), install="llama-cpp-python")
DENOISE = Program("ours", "experiments.bench.ours_denoise")
ONE_BY_ONE = Program("ruvjax uncached", "experiments.bench.ours_denoise")
LLADA = Program("plain torch", "peer_llada.py", imports=("torch", "safetensors"))

# 63 M parameters, 185 MB of which every token reads.
LLAMA = {
    "vocab_size": 32000,
    "layers": 8,
    "width": 512,
    "heads": 8,
    "kv_heads": 4,
    "mlp_width": 1920,
    "max_length": 1024,
    "tied_head": False,
}
RANDOM = {"make": "llama", "model": LLAMA}

GREEDY = {"work": "decode", "prompt": 64, "generated": 128, "warmup": 1, "repeats": 4}
# Held-out rows, one at a time; of every 64 bytes half are masked. What is surer than the threshold is committed: a
# lower one is faster, and `accuracy` tells what it costs. This one was chosen on 16 rows of the validation part.
CANVAS = {"rows": 8, "length": 512, "block": 64, "masked": 32, "threshold": 0.5}
TEXT = {"make": "trained", "steps": 2500, "batch": 4, "settings": [], **CANVAS}  # three to eight minutes on two cores
# Eight boards a row, a block each: 36 cells, 20 of them open, and the end of the line. One wrong cell spoils a board,
# so the threshold is higher.
BOARDS = {"rows": 16, "length": 296, "block": 37, "masked": 20, "threshold": 0.9}
PUZZLES = {"make": "puzzles", "steps": 1500, "batch": 8, "settings": [], **BOARDS}
# A repetition is thousands of passes, so one is enough.
FILLED = {"work": "sample", "warmup": 0, "repeats": 1}


def _decode(name: str, form: str, peer: Program, theirs: Mapping[str, Any]) -> Row:
    tokens = GREEDY["generated"]
    return Row(name, "tokens/s", GREEDY, tokens, OURS, peer, {"form": form}, theirs=theirs, prepare=RANDOM)


def _denoise(
    name: str,
    prepare: Mapping[str, Any],
    peer: Program,
    theirs: Mapping[str, Any],
    dtypes: tuple[str, ...] = ("float32",),
) -> Row:
    job = {**FILLED, **{key: prepare[key] for key in CANVAS}}
    tokens = job["rows"] * job["length"] // job["block"] * job["masked"]
    return Row(name, "tokens/s", job, tokens, DENOISE, peer, {"form": "dual"}, dtypes, theirs, prepare)


def decode() -> list[Row]:
    """Greedy decoding against transformers, our own float32 and llama.cpp; a dual cache with a threshold against one
    token a whole pass, by our sampler and by LLaDA's published loop."""
    return [
        _decode("decode_f32", "float32", TRANSFORMERS, {}),
        _decode("decode_q8_vs_f32", "Q8_0", FLOAT32, {"form": "float32"}),
        _denoise("dual_cache_vs_uncached", TEXT, ONE_BY_ONE, {"form": "uncached"}),
        _denoise("dual_cache_puzzle", PUZZLES, ONE_BY_ONE, {"form": "uncached"}),
        _denoise("dual_cache_vs_llada_loop", TEXT, LLADA, {}, ("float32", "bfloat16")),
        _decode("llama_cpp_q8", "Q8_0", LLAMA_CPP, {}),
    ]
