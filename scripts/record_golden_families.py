"""Records tests/io/golden/families.npz: what random tiny checkpoints of every published family compute in float32.

    python scripts/record_golden_families.py FAST_DLLM LLADA      (torch, transformers, einops, and two checkouts)

Llama, Mistral and Qwen come from transformers. LLaDA and Dream are the modeling code that their authors publish, as
NVlabs/Fast-dLLM carries it (FAST_DLLM), and LLaDA's own `generate` (LLADA, a checkout of ML-GSAI/LLaDA). Recorded are
the logits of two rows, one at a time; 64 greedy tokens after the first row for the causal families; and for the
diffusion models the canvas that the published loop fills at temperature 0. Weights are drawn from their names as in
record_golden.py, so that tests/io/test_families.py needs no torch.
"""

import importlib.util
import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "io" / "golden" / "families.npz"
_spec = importlib.util.spec_from_file_location("record_golden", Path(__file__).with_name("record_golden.py"))
assert _spec is not None and _spec.loader is not None
base = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(base)

VOCAB, MASK = base.VOCAB, base.VOCAB - 1
LENGTHS = (12, 7)
CONTINUED, CANVAS, STEPS, BLOCK = 64, 16, 8, 8
MARGIN = 1e-3  # least distance of the two best logits, or confidences, in any choice that is recorded

SHAPE = base.SHAPE | {"max_position_embeddings": 128}
LLADA = {
    "model_type": "llada",
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mask_token_id": MASK,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama2": SHAPE | {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama3": SHAPE
    | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": base.LLAMA3, "tie_word_embeddings": True},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": 5, "head_dim": 16, "rope_theta": 1000.0},
    "qwen2": SHAPE | {"model_type": "qwen2", "rope_theta": 1000.0, "tie_word_embeddings": True},
    "qwen2_window": SHAPE
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 300.0},
    "dream": SHAPE | {"model_type": "Dream", "rope_theta": 1000.0, "mask_token_id": MASK, "pad_token_id": 0},
    "llada": LLADA,
}
CAUSAL = [name for name in CONFIGS if name not in ("dream", "llada")]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight `name` in float32. LLaDA's names are turned so that norms and embeddings get their own scale."""
    return base.weight(name.replace("ln_f.", "final_norm.").replace("wte.", "embed."), shape)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published layout."""
    if config["model_type"] != "llada":
        kind = {"Dream": "qwen2", "mistral": "llama"}.get(config["model_type"], config["model_type"])
        return base.shapes(config | {"model_type": kind})
    width, hidden, top = config["d_model"], config["mlp_hidden_size"], "model.transformer."
    keys = width // config["n_heads"] * config["n_kv_heads"]
    found = {f"{top}{name}.weight": (config["embedding_size"], width) for name in ("wte", "ff_out")}
    found[f"{top}ln_f.weight"] = (width,)
    for i in range(config["n_layers"]):
        block = f"{top}blocks.{i}."
        found |= {f"{block}{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
        found |= {f"{block}{name}.weight": (width, width) for name in ("q_proj", "attn_out")}
        found |= {f"{block}{name}.weight": (keys, width) for name in ("k_proj", "v_proj")}
        found |= {f"{block}{name}.weight": (hidden, width) for name in ("ff_proj", "up_proj")}
        found[f"{block}ff_out.weight"] = (width, hidden)
    return found


def rows() -> list[np.ndarray]:
    """Two rows of tokens, int32, of different lengths, without the mask."""
    words = np.random.PCG64(zlib.crc32(b"families")).random_raw(sum(LENGTHS))
    tokens = (words % np.uint64(VOCAB - 1)).astype(np.int32)
    return [tokens[: LENGTHS[0]], tokens[LENGTHS[0] :]]


def masked(row: np.ndarray) -> np.ndarray:
    """The row with every third token masked: what a diffusion model reads."""
    return np.where(np.arange(len(row)) % 3 == 2, MASK, row).astype(np.int32)


def canvas(row: np.ndarray) -> np.ndarray:
    """The row and `CANVAS` masks after it."""
    return np.concatenate([row, np.full(CANVAS, MASK, np.int32)])


def fill(model, described):
    """`model` with the weights of `weight`, in float32."""
    import torch

    model = model.float().eval()
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes(described).items()}
    missing = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if described.get("tie_word_embeddings") else []
    left = [key for key in missing.missing_keys if key not in tied and not key.endswith("inv_freq")]
    if missing.unexpected_keys or left:
        raise SystemExit(f"the layout differs: {missing}")
    return model


def reference(name: str):
    """The transformers model of a causal configuration."""
    import transformers

    config = CONFIGS[name]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    settings |= {"attn_implementation": "eager", "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    described = transformers.AutoConfig.for_model(config["model_type"], **settings)
    return fill(getattr(transformers, CLASSES[config["model_type"]])(described), config)


def logits(model, row: np.ndarray) -> np.ndarray:
    """float32 [length, vocabulary] of one row, in one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(row)[None].long(), use_cache=False).logits[0].float().numpy()


def greedy(model, row: np.ndarray) -> np.ndarray:
    """The likeliest continuation, every token from a whole pass."""
    for _ in range(CONTINUED):
        scores = logits(model, row)[-1]
        best = np.sort(scores)[-2:]
        if best[1] - best[0] < MARGIN:
            raise SystemExit(f"a greedy choice by {best[1] - best[0]:.1e}: another row, please")
        row = np.append(row, scores.argmax().astype(np.int32))
    return row[-CONTINUED:]


def published(checkout: str, folder: str, module: str):
    """A module of the package `model` in one folder of the checkout; both folders call theirs by that name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "model"]:
        del sys.modules[name]
    sys.path.insert(0, str(Path(checkout) / folder))
    try:
        return importlib.import_module(f"model.{module}")
    finally:
        sys.path.pop(0)


def plain_rotations(config, device, **_):
    """The unscaled frequencies, which transformers 4 kept in the table that Dream's code reads."""
    import torch

    dim = config.hidden_size // config.num_attention_heads
    return 1.0 / CONFIGS["dream"]["rope_theta"] ** (torch.arange(0, dim, 2, device=device).float() / dim), 1.0


def record_dream(checkout: str) -> dict[str, np.ndarray]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS.setdefault("default", plain_rotations)
    code = published(checkout, "dream", "modeling_dream")
    settings = {key: value for key, value in CONFIGS["dream"].items() if key != "model_type"}
    model = fill(code.DreamModel(code.DreamConfig(**settings)), CONFIGS["dream"])
    with torch.no_grad():
        found = {
            # The published loop reads the logits of position i - 1 for position i; so does our forward pass.
            f"dream.{i}": np.concatenate([found[:1], found[:-1]])
            for i, row in enumerate(rows())
            for found in [model(torch.from_numpy(masked(row))[None].long(), "full").logits[0].numpy()]
        }
        for algorithm in ("maskgit_plus", "entropy"):
            settings = code.DreamGenerationConfig(
                max_length=len(canvas(rows()[0])), steps=STEPS, temperature=0.0, alg=algorithm, mask_token_id=MASK
            )
            # `diffusion_generate` only prepares this call, in ways that transformers 5 no longer has.
            answer = model._sample(
                torch.from_numpy(rows()[0])[None].long(),
                attention_mask=None,
                generation_config=settings,
                generation_tokens_hook_func=lambda step, x, logits: x,
                generation_logits_hook_func=lambda step, x, logits: logits,
            )
            found[f"dream.{algorithm}"] = answer[0].numpy().astype(np.int16)
    return found


def record_llada(checkout: str, own: str) -> dict[str, np.ndarray]:
    import torch

    code = published(checkout, "llada", "modeling_llada")
    settings = {key: value for key, value in CONFIGS["llada"].items() if key != "model_type"}
    model = fill(code.LLaDAModelLM(code.LLaDAConfig(**settings)), CONFIGS["llada"])
    model.config.use_cache = False  # transformers 5 drops the setting, the code reads it
    loop = importlib.util.spec_from_file_location("generate", Path(own) / "generate.py")
    assert loop is not None and loop.loader is not None
    generate = importlib.util.module_from_spec(loop)
    loop.loader.exec_module(generate)
    found = {f"llada.{i}": logits(model, masked(row)) for i, row in enumerate(rows())}
    prompt = torch.from_numpy(rows()[0])[None].long()
    answer = generate.generate(model, prompt, steps=STEPS, gen_length=CANVAS, block_length=BLOCK, mask_id=MASK)
    return found | {"llada.generate": answer[0].numpy().astype(np.int16)}


def main() -> None:
    import torch
    import transformers

    torch.compile = lambda *_, **__: lambda function: function  # the published attention asks for it
    recorded: dict[str, np.ndarray] = {}
    for name in CAUSAL:
        model = reference(name)
        recorded |= {f"{name}.{i}": logits(model, row) for i, row in enumerate(rows())}
        recorded[f"{name}.greedy"] = greedy(model, rows()[0]).astype(np.int16)
    recorded |= record_dream(sys.argv[1]) | record_llada(sys.argv[1], sys.argv[2])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, versions=np.array(versions), **recorded)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(recorded)} arrays, {versions}")


if __name__ == "__main__":
    main()
