"""Records tests/models/golden/mamba.npz: logits and greedy continuations of random tiny Mambas, by transformers.

    python scripts/record_golden_mamba.py          (needs the extra `parity`: torch and transformers)

The weights are not stored: `weight` draws them again from the parameter's name, out of the raw words of PCG64. Each row
is recorded alone and without padding, because transformers is not exact on right-padded rows.
"""

import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden" / "mamba.npz"
VOCAB, LENGTH, SHORT, CONTINUED = 64, 12, 7, 12  # SHORT: tokens of the second row; CONTINUED: tokens generated

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "conv_kernel": 4,
    "expand": 2,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
}
CONFIGS = {
    "mamba": SHAPE | {"model_type": "mamba", "tie_word_embeddings": True},
    "mamba_bias": SHAPE
    | {"model_type": "mamba", "tie_word_embeddings": False, "use_bias": True, "time_step_rank": 3, "conv_kernel": 3},
    "mamba2": SHAPE | {"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "mamba2_groups": SHAPE
    | {"model_type": "mamba2", "num_heads": 8, "head_dim": 4, "n_groups": 2, "chunk_size": 8, "use_bias": True}
    | {"tie_word_embeddings": True, "use_conv_bias": False},
}
ARCHITECTURES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight `name` in float32: uniform, of a scale that lets every part of the network matter."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((words >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0).reshape(shape)  # 24 bits: exact in float32
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        values = 1.0 + 0.5 * uniform
    elif name.endswith("A_log"):
        values = uniform
    elif name.endswith(("dt_proj.bias", "dt_bias")):
        values = uniform - 1.0
    elif name.endswith(".bias"):
        values = 0.5 * uniform
    else:
        values = uniform * np.sqrt(3.0 / (1.0 if "embeddings" in name else shape[-1]))
    return values.astype(np.float32)


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the published layout."""
    width, state, taps = config["hidden_size"], config["state_size"], config["conv_kernel"]
    inner, second = config["expand"] * width, config["model_type"] == "mamba2"
    found = {"backbone.embeddings.weight": (config["vocab_size"], width), "backbone.norm_f.weight": (width,)}
    if not config.get("tie_word_embeddings", not second):
        found["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        mixer = f"backbone.layers.{i}.mixer."
        found[f"backbone.layers.{i}.norm.weight"] = (width,)
        if second:
            heads = config["num_heads"]
            channels = inner + 2 * config["n_groups"] * state
            outer = inner + channels + heads
            found |= {mixer + "A_log": (heads,), mixer + "D": (heads,), mixer + "dt_bias": (heads,)}
            found[mixer + "norm.weight"] = (inner,)
        else:
            rank, channels, outer = config.get("time_step_rank", -(-width // 16)), inner, 2 * inner
            found |= {mixer + "A_log": (inner, state), mixer + "D": (inner,), mixer + "dt_proj.bias": (inner,)}
            found |= {mixer + "x_proj.weight": (rank + 2 * state, inner), mixer + "dt_proj.weight": (inner, rank)}
        found |= {mixer + "in_proj.weight": (outer, width), mixer + "out_proj.weight": (width, inner)}
        found[mixer + "conv1d.weight"] = (channels, 1, taps)
        if config.get("use_conv_bias", True):
            found[mixer + "conv1d.bias"] = (channels,)
        if config.get("use_bias", False):
            found |= {mixer + "in_proj.bias": (outer,), mixer + "out_proj.bias": (width,)}
    return found


def rows() -> list[np.ndarray]:
    """Two rows of tokens, int32, of different lengths."""
    words = np.random.PCG64(zlib.crc32(b"tokens")).random_raw(LENGTH + SHORT)
    tokens = (words % np.uint64(VOCAB)).astype(np.int32)
    return [tokens[:LENGTH], tokens[LENGTH:]]


def reference(name: str):
    """The transformers model of configuration `name` with the weights of `weight`, in float32."""
    import torch
    import transformers

    config = CONFIGS[name]
    settings = {key: value for key, value in config.items() if key != "model_type"}
    settings |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    described = transformers.AutoConfig.for_model(config["model_type"], **settings)
    model = getattr(transformers, ARCHITECTURES[config["model_type"]])(described).float().eval()
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in shapes(config).items()}
    missing = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if "lm_head.weight" not in state else []
    if missing.unexpected_keys or [key for key in missing.missing_keys if key not in tied]:
        raise SystemExit(f"{name}: the layout differs: {missing}")
    return model


def logits(model, row: np.ndarray) -> np.ndarray:
    """float32 [length, vocabulary] of one row, in one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(row)[None].long(), use_cache=False).logits[0].float().numpy()


def greedy(model, row: np.ndarray) -> np.ndarray:
    """The likeliest continuation, every token from a whole pass."""
    for _ in range(CONTINUED):
        row = np.append(row, logits(model, row)[-1].argmax().astype(np.int32))
    return row[-CONTINUED:]


def main() -> None:
    import torch
    import transformers

    recorded: dict[str, np.ndarray] = {}
    for name in CONFIGS:
        model = reference(name)
        for i, row in enumerate(rows()):
            recorded[f"{name}.{i}"] = logits(model, row)
            recorded[f"{name}.{i}.greedy"] = greedy(model, row)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(GOLDEN, versions=np.array(versions), **recorded)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(recorded)} arrays, {versions}")


if __name__ == "__main__":
    main()
