"""Records tests/models/golden/trm.npz: what the official TRM code computes in float32 on fixed weights and boards.

    python scripts/record_golden_trm.py CHECKOUT     (torch, einops, pydantic; CHECKOUT of TinyRecursiveModels)

Three training steps: forward, loss, gradients, halting and refilling, Adam-atan2 and the sign rule for puzzle vectors.
Weights and boards are not stored: `weight` and `boards` draw them again from names, out of the raw words of PCG64, so
the check in tests/models/test_trm.py needs no torch. Of each tensor the file keeps its sum, norm and a few entries.
"""

import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "golden" / "trm.npz"
VOCAB, CELLS, BATCH, PREFIX, WIDTH, HEADS, PUZZLES = 7, 12, 3, 4, 16, 2, 5
LAYERS, CYCLES, UPDATES, MAX_STEPS, STEPS = 2, 2, 3, 2, 3
LR, B1, B2, DECAY, SIGN_LR = 1e-2, 0.9, 0.95, 0.1, 5e-3
MIXERS = ("mlp", "attention")
NOT_DECAYED = ("inner.q_head.weight", "inner.q_head.bias")  # a vector and a bias in our model


def words(name: str, count: int) -> np.ndarray:
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight `name` in float32: uniform in +-1 (24 bits, exact), over the root of the last axis for matrices."""
    uniform = (words(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0
    if name.endswith("puzzle_emb.weights") or name.endswith("embedding_weight"):
        scale = 1 / np.sqrt(WIDTH)
    elif name.endswith("_init") or name.endswith(".bias"):
        scale = 1.0
    else:
        scale = np.sqrt(3.0 / shape[-1])
    return (uniform.reshape(shape) * scale).astype(np.float32)


def boards(step: int) -> dict[str, np.ndarray]:
    """The incoming batch of one step; the first two cells of each board have no label."""
    cells = (words(f"boards {step}", 2 * BATCH * CELLS) >> np.uint64(33)).astype(np.int64) % (VOCAB - 1) + 1
    inputs, labels = cells.reshape(2, BATCH, CELLS).astype(np.int32)
    labels[:, :2] = 0
    puzzle = (words(f"puzzles {step}", BATCH) >> np.uint64(33)).astype(np.int64) % PUZZLES
    return {"inputs": inputs, "labels": labels, "puzzle": puzzle.astype(np.int32)}


def digest(array: np.ndarray) -> np.ndarray:
    """Sum, norm and up to 14 entries at even distances, in float64."""
    flat = np.asarray(array, np.float64).reshape(-1)
    picked = flat[np.linspace(0, flat.size - 1, min(14, flat.size)).astype(int)]
    return np.concatenate([[flat.sum(), np.sqrt((flat**2).sum())], picked])


def run(mixer: str) -> dict[str, np.ndarray]:
    import torch
    from models.losses import ACTLossHead
    from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1
    from models.sparse_embedding import CastedSparseEmbeddingSignSGD_Distributed

    network = TinyRecursiveReasoningModel_ACTV1(
        {
            "batch_size": BATCH, "seq_len": CELLS, "puzzle_emb_ndim": WIDTH, "num_puzzle_identifiers": PUZZLES,
            "vocab_size": VOCAB, "H_cycles": CYCLES, "L_cycles": UPDATES, "H_layers": 0, "L_layers": LAYERS,
            "hidden_size": WIDTH, "expansion": 4, "num_heads": HEADS, "halt_max_steps": MAX_STEPS,
            "pos_encodings": "none" if mixer == "mlp" else "rope", "halt_exploration_prob": 0.0,
            "forward_dtype": "float32", "mlp_t": mixer == "mlp", "puzzle_emb_len": PREFIX,
        }
    )  # fmt: skip
    state = network.state_dict()
    network.load_state_dict({name: torch.from_numpy(weight(name, tuple(x.shape))) for name, x in state.items()})
    network.train()
    head = ACTLossHead(network, "stablemax_cross_entropy")
    parameters = dict(network.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    signs = CastedSparseEmbeddingSignSGD_Distributed(
        network.puzzle_emb.buffers(), world_size=1, lr=SIGN_LR, weight_decay=DECAY
    )
    found: dict[str, np.ndarray] = {}
    carry = None
    for step in range(STEPS):
        drawn = boards(step)
        labels = torch.from_numpy(drawn["labels"]).clone()
        labels[labels == 0] = -100
        batch = {
            "inputs": torch.from_numpy(drawn["inputs"]),
            "labels": labels,
            "puzzle_identifiers": torch.from_numpy(drawn["puzzle"]),
        }
        carry = head.initial_carry(batch) if carry is None else carry
        keys = ["logits", "q_halt_logits"]
        carry, loss, _, outputs, _ = head(carry=carry, batch=batch, return_keys=keys)
        (loss / BATCH).backward()
        found |= {
            f"{step}/loss": np.array(loss.item() / BATCH),
            f"{step}/logits": outputs["logits"].numpy(),
            f"{step}/halt": outputs["q_halt_logits"].numpy(),
            f"{step}/halted": carry.halted.numpy(),
            f"{step}/answer": digest(carry.inner_carry.z_H.numpy()),
            f"{step}/scratch": digest(carry.inner_carry.z_L.numpy()),
        }
        with torch.no_grad():
            for name, p in parameters.items():
                found[f"{step}/gradient/{name}"] = digest(p.grad.numpy())
                first, second = moments[name]
                if name not in NOT_DECAYED:
                    p.mul_(1 - LR * DECAY)
                first.lerp_(p.grad, 1 - B1)
                second.lerp_(p.grad * p.grad, 1 - B2)
                root = second.sqrt() / (1 - B2 ** (step + 1)) ** 0.5
                p.sub_(LR / (1 - B1 ** (step + 1)) * torch.atan2(first, root))
                p.grad = None
        signs.step()
        network.puzzle_emb.local_weights.grad = None
    after = {name: x.numpy() for name, x in network.state_dict().items()}
    return found | {f"after/{name}": digest(x) for name, x in after.items()}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    arrays = {f"{mixer}/{key}": value for mixer in MIXERS for key, value in run(mixer).items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
