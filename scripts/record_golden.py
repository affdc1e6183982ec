"""Records tests/models/golden/logits.npz: logits of random tiny models, computed by transformers in float32.

    python scripts/record_golden.py          (needs the extra `parity`: torch and transformers)

The weights are not stored. `weight` draws them again from the parameter's name, out of the raw words of PCG64, a stream
that numpy promises never to change; so the check in tests/models/test_parity.py needs neither torch nor a download.
"""

import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden" / "logits.npz"
VOCAB, LENGTH, PADDED = 64, 12, 5  # PADDED: how many positions of the second row are padding

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Two spellings of the rotary settings are in circulation: `rope_theta` and `rope_scaling` beside each other, and both
# inside `rope_parameters`. The configurations below hold some of each.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
CONFIGS = {
    "llama": SHAPE | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama_linear": SHAPE
    | {"model_type": "llama", "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": SHAPE | {"model_type": "qwen2", "rope_theta": 1000.0, "num_key_value_heads": 1},
    "qwen2_yarn": SHAPE | {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": SHAPE
    | {"model_type": "qwen3", "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}, "head_dim": 16}
    | {"tie_word_embeddings": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight `name` in float32: uniform, of a scale that lets every part of the network matter."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((words >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0).reshape(shape)  # 24 bits: exact in float32
    if name.endswith("norm.weight"):
        values = 1.0 + 0.5 * uniform
    elif name.endswith(".bias"):
        values = 0.5 * uniform
    else:
        values = uniform * np.sqrt(3.0 / (1.0 if "embed" in name else shape[-1]))
    return values.astype(np.float32)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published layout."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    dim = config.get("head_dim", width // config["num_attention_heads"])
    out, key_out = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    found = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found[f"{layer}.input_layernorm.weight"] = found[f"{layer}.post_attention_layernorm.weight"] = (width,)
        for name, size in (("q", out), ("k", key_out), ("v", key_out)):
            found[f"{layer}.self_attn.{name}_proj.weight"] = (size, width)
            if config["model_type"] == "qwen2":
                found[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        found[f"{layer}.self_attn.o_proj.weight"] = (width, out)
        if config["model_type"] == "qwen3":
            found[f"{layer}.self_attn.q_norm.weight"] = found[f"{layer}.self_attn.k_norm.weight"] = (dim,)
        found[f"{layer}.mlp.gate_proj.weight"] = found[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
        found[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
    return found


def batch() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Tokens int32 [2, length], and the 0/1 attention masks under which logits are recorded."""
    words = np.random.PCG64(zlib.crc32(b"tokens")).random_raw(2 * LENGTH)
    tokens = (words % np.uint64(VOCAB)).astype(np.int32).reshape(2, LENGTH)
    full, left, right = (np.ones((2, LENGTH), np.int32) for _ in range(3))
    left[1, :PADDED] = 0
    right[1, LENGTH - PADDED :] = 0
    return tokens, {"causal": full, "left": left, "right": right}


def reference(name: str):
    """The transformers model of configuration `name` with the weights of `weight`, in float32."""
    import torch
    import transformers

    config = CONFIGS[name]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    settings |= {"attn_implementation": "eager", "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    described = transformers.AutoConfig.for_model(config["model_type"], **settings)
    model = getattr(transformers, ARCHITECTURES[config["model_type"]])(described).float().eval()
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes(config).items()}
    missing = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config["tie_word_embeddings"] else []
    if missing.unexpected_keys or [key for key in missing.missing_keys if key not in tied]:
        raise SystemExit(f"{name}: the layout differs: {missing}")
    return model


def positions(mask: np.ndarray) -> np.ndarray:
    """Positions that count from the first token that is not padding; padding itself stands at 0."""
    return np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32 [2, length, vocabulary] of the reference, causal; rows of padding are set to zero."""
    import torch

    with torch.no_grad():
        answer = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions(mask)).long(),
        )
    return answer.logits.float().numpy() * mask[:, :, None].astype(np.float32)


def main() -> None:
    import torch
    import transformers

    tokens, masks = batch()
    recorded: dict[str, np.ndarray] = {}
    for name in CONFIGS:
        model = reference(name)
        for kind, mask in masks.items():
            recorded[f"{name}.{kind}"] = logits(model, tokens, mask)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(GOLDEN, tokens=tokens, versions=np.array(versions), **recorded)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(recorded)} sets of logits, {versions}")


if __name__ == "__main__":
    main()
