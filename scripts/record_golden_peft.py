"""Records tests/io/golden/peft.npz: logits of random tiny models under PEFT adapters, computed by PEFT in float32.

    python scripts/record_golden_peft.py          (needs the extra `parity`: torch, transformers and peft)

Neither weights nor factors are stored: they are drawn again from their names, as scripts/record_golden.py draws them.
adapter_config.json is kept as PEFT wrote it, and the name and shape of every tensor beside it, so that the check in
tests/io/test_peft.py makes the same folders without torch.
"""

import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "io" / "golden" / "peft.npz"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


transformer, mamba = _script("record_golden"), _script("record_golden_mamba")

# The base of each adapter, and the settings of its LoraConfig.
ADAPTERS: dict[str, tuple[str, dict]] = {
    "lora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}),
    "dora": ("qwen3", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}),
    "dora_bias": ("qwen2", {"r": 3, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": r".*\.(q_proj|k_proj|up_proj)",
            "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "layers.1.mlp.up_proj": 7.5},
        },
    ),
    "layers": (
        "llama",
        {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "mamba": ("mamba", {"r": 4, "target_modules": ["in_proj", "x_proj"]}),
    "mamba_dora": ("mamba_bias", {"r": 2, "use_dora": True, "target_modules": ["in_proj", "x_proj"]}),
    "mamba2": ("mamba2", {"r": 4, "lora_alpha": 12, "target_modules": ["in_proj"]}),
}
MIXED = ("lora", "__base__", "patterns")  # the adapter of each row, on one base


def family(base: str):
    return mamba if base.startswith("mamba") else transformer


def tokens(base: str) -> np.ndarray:
    """int32 [rows, length]."""
    return mamba.rows()[0][None] if base.startswith("mamba") else transformer.batch()[0]


def mixed_tokens() -> np.ndarray:
    return np.concatenate([transformer.batch()[0], transformer.batch()[0][:1]])


def factor(name: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A factor of adapter `name` in float32: of a scale that makes the update matter."""
    if "magnitude" in key:
        return transformer.weight(f"{name}:{key}.norm.weight", shape)
    return transformer.weight(f"{name}:{key}", shape)


def plain_key(key: str, adapter: str) -> str:
    """The name under which PEFT saves the tensor that its model calls `key`."""
    return key.replace(f".{adapter}.weight", "" if "magnitude" in key else ".weight")


def adapted(names: tuple[str, ...]):
    """The base of the first of `names`, with all of them in PEFT's model, every factor drawn by `factor`."""
    import peft
    import torch

    base = ADAPTERS[names[0]][0]
    model = family(base).reference(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, name in enumerate(names):
            config = peft.LoraConfig(**ADAPTERS[name][1])
            if i == 0:
                model = peft.get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    state = {
        key: torch.from_numpy(factor(name, plain_key(key, name), tuple(value.shape)))
        for name in names
        for key, value in model.state_dict().items()
        if f".{name}." in key and "lora_" in key
    }
    model.load_state_dict(state, strict=False)
    return model.eval()


def logits(model, ids: np.ndarray, **settings) -> np.ndarray:
    """float32 [rows, length, vocabulary], causal, in one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids).long(), use_cache=False, **settings).logits.float().numpy()


def main() -> None:
    import peft
    import torch
    import transformers
    from safetensors import safe_open

    recorded: dict[str, np.ndarray] = {}
    for name, (base, _) in ADAPTERS.items():
        model = adapted((name,))
        recorded[name] = logits(model, tokens(base))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = Path(folder) / name
            config = json.loads((saved / "adapter_config.json").read_text())
            with safe_open(saved / "adapter_model.safetensors", framework="np") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT writes a set
        recorded[f"{name}.folder"] = np.array(json.dumps({"config": config, "shapes": shapes}, sort_keys=True))
    model = adapted(tuple(name for name in MIXED if name in ADAPTERS))
    recorded["mixed"] = logits(model, mixed_tokens(), adapter_names=list(MIXED))
    versions = f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(GOLDEN, versions=np.array(versions), **recorded)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e3:.0f} kB, {len(recorded)} arrays, {versions}")


if __name__ == "__main__":
    main()
