"""Times the training step of the official TinyRecursiveModels code, imported from a checkout ("path" of the argument).

A program of its own, like `peer_torch.py`; needs torch, einops and pydantic. Model and loss are the project's own; its
optimiser is a CUDA extension, so torch's AdamW stands in for it, beside its own rule for puzzle vectors.
"""

import json
import sys
import time

import torch


def main():
    job = json.loads(sys.argv[1])
    sys.path.insert(0, job["path"])
    from models.losses import ACTLossHead
    from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1
    from models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mlp, rows = job["mixer"] == "mlp", job["batch"]
    config = {
        "batch_size": rows,
        "seq_len": job["length"],
        "puzzle_emb_ndim": job["width"],
        "num_puzzle_identifiers": 1,
        "vocab_size": job["vocab_size"],
        "H_cycles": job["cycles"],
        "L_cycles": job["updates"],
        "H_layers": 0,
        "L_layers": job["layers"],
        "hidden_size": job["width"],
        "expansion": 4,
        "num_heads": job["heads"],
        "pos_encodings": "none" if mlp else "rope",
        "halt_max_steps": 16,
        "halt_exploration_prob": 0.1,
        "forward_dtype": job["dtype"],
        "mlp_t": mlp,
        "puzzle_emb_len": job["prefix"],
    }
    with torch.device(device):
        network = ACTLossHead(TinyRecursiveReasoningModel_ACTV1(config), "stablemax_cross_entropy")
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1.0)
    puzzles = network.model.puzzle_emb.buffers()
    signs = CastedSparseEmbeddingSignSGD_Distributed(puzzles, world_size=1, lr=1e-4, weight_decay=1.0)
    drawn = torch.randint(1, job["vocab_size"], (2, rows, job["length"]), device=device, dtype=torch.int32)
    numbers = torch.zeros(rows, dtype=torch.int32, device=device)
    batch = {"inputs": drawn[0], "labels": drawn[1], "puzzle_identifiers": numbers}
    with torch.device(device):
        carry = network.initial_carry(batch)
    seconds, values = [], []
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        carry, loss, _, _, _ = network(carry=carry, batch=batch, return_keys=[])
        (loss / rows).backward()
        for rule in (signs, optimizer):
            rule.step()
            rule.zero_grad()
        values.append(loss.item() / rows)
        seconds.append(time.perf_counter() - began)
    report = {
        "seconds": seconds[job["warmup"] :],
        "first": seconds[0],
        "values": values,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
