"""Times the training step of tiny-diffusion (nathan-barry), imported from a checkout: `"path"` of the JSON argument.

A program of its own, like `peer_torch.py`. The step is the project's own; only the sizes of its configuration are set.
"""

import json
import sys
import time

import torch


def main():
    job = json.loads(sys.argv[1])
    sys.path.insert(0, job["path"])
    from model import DiffusionConfig, DiffusionTransformer
    from training import MaskedDiffusionSchedule, train_step

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DiffusionConfig(
        sequence_len=job["length"],
        vocab_size=job["vocab_size"],
        n_layer=job["layers"],
        n_head=job["heads"],
        n_embd=job["width"],
    )
    network = DiffusionTransformer(config).to(device)
    network.init_weights()
    network.train()
    schedule = MaskedDiffusionSchedule(config.diffusion_steps, config.mask_token_id, config.context_len)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0.01)
    # Its step views the batch flat, so the batch has to be contiguous.
    shape = (job["batch"], job["length"])
    tokens = torch.randint(1, job["vocab_size"], shape, device=device).contiguous()
    seconds, values = [], []
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        values.append(train_step(network, tokens, schedule, optimizer))
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
