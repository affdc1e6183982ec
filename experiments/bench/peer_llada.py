"""LLaDA's published loop in plain torch over weights that ruvjax has trained: the same rows, filled a token a pass.

A program of its own: it imports torch and nothing of ruvjax. Its argument is a JSON object (see `rows_decode.py`), its
last line on stdout one JSON object.

    python experiments/bench/peer_llada.py '{"work": "sample", "folder": ..., "block": 32, "masked": 16, ...}'
"""

import json
import os
import sys
import time

import numpy as np
import torch
from peer_torch import Network, llada_fill
from safetensors.torch import load_file

NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def read(folder, length):
    """The network of a model folder, and its mask token."""
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    held = load_file(os.path.join(folder, "model.safetensors"))
    layers = 1 + max(int(name.split(".")[2]) for name in held if ".layers." in name)
    vocab_size, width = held["model.embed_tokens.weight"].shape
    mlp_width = held["model.layers.0.mlp.up_proj.weight"].shape[0]
    network = Network(vocab_size, layers, width, config["transformer"]["heads"], mlp_width, length)
    state = {"embedding.weight": held["model.embed_tokens.weight"], "final_norm.weight": held["model.norm.weight"]}
    for i in range(layers):
        for stored, ours in NAMES.items():
            state[f"blocks.{i}.{ours}.weight"] = held[f"model.layers.{i}.{stored}.weight"]
    missing = network.load_state_dict(state, strict=False).missing_keys
    if set(missing) - {"cos", "sin"}:
        raise SystemExit(f"{folder} lacks {missing}")
    return network.eval(), config["mask_token_id"]


def main():
    job = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    network, mask_id = read(os.path.join(job["folder"], "run", "model"), job["length"])
    network = network.to(device)
    canvas = np.load(os.path.join(job["folder"], "canvas.npz"))
    masked, text = (torch.from_numpy(canvas[name]).long().to(device) for name in ("masked", "text"))
    steps = job["length"] // job["block"] * job["masked"]
    settings = (0, steps, job["block"], 0.0, mask_id, job["dtype"] == "bfloat16")

    def work(rows):
        began = time.perf_counter()
        tokens = torch.cat([llada_fill(network, row[None].clone(), *settings) for row in rows]).cpu()
        return time.perf_counter() - began, tokens

    first, _ = work(masked[:1])
    runs = [work(masked) for _ in range(job["warmup"] + job["repeats"])][job["warmup"] :]
    tokens = runs[-1][1].to(device)
    free = masked == mask_id
    report = {
        "seconds": [seconds for seconds, _ in runs],
        "first": first,
        "values": [float((tokens == mask_id).sum())],  # none may be left
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
        "facts": {
            "accuracy": float((tokens == text)[free].float().mean()),
            "passes_per_token": steps / (free.sum().item() / len(masked)),
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
