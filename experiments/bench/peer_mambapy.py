"""The Mamba of mambapy in torch: loss and gradients by its parallel scan, and its decoding step.

A program of its own: it imports torch and mambapy (the registry's, in the extra `parity`) and nothing of ruvjax. Its
argument is a JSON object (see `rows_mamba.py`), its last line on stdout one JSON object.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, or the most there were since `reset_peak`; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak then counts from the start of the process


def main() -> None:
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    from torch import nn
    from torch.nn import functional as F

    job = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    config = MambaConfig(d_model=job["width"], n_layers=job["layers"], d_state=job["state"], pscan=True)
    # Its language model, from its parts: importing `mambapy.lm` asks for Mamba-2's CUDA kernels.
    parts = {
        "embedding": nn.Embedding(job["vocab_size"], job["width"]),
        "mamba": Mamba(config),
        "norm": RMSNorm(job["width"], config.rms_norm_eps),
        "head": nn.Linear(job["width"], job["vocab_size"], bias=False),
    }
    network = nn.ModuleDict(parts).to(device)
    tokens = torch.randint(0, job["vocab_size"], (job["batch"], job["length"]), device=device)

    def fwdbwd() -> float:
        network.zero_grad(set_to_none=True)
        logits = network["head"](network["norm"](network["mamba"](network["embedding"](tokens))))
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        return loss.item()

    @torch.inference_mode()
    def decode() -> float:
        inputs = torch.zeros(job["batch"], config.d_inner, config.d_conv - 1, device=device)
        caches = [(None, inputs) for _ in range(job["layers"])]
        token, total = torch.zeros(job["batch"], dtype=torch.long, device=device), 0
        for _ in range(job["length"]):
            x, caches = network["mamba"].step(network["embedding"](token), caches)
            token = network["head"](network["norm"](x)).argmax(-1)
            total += int(token.sum())
        return float(total)

    work = {"fwdbwd": fwdbwd, "decode": decode}[job["work"]]
    seconds, values = [], []
    before = resident()
    reset_peak()
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        values.append(work())
        seconds.append(time.perf_counter() - began)
    peak = resident(peak=True)
    report = {
        "seconds": seconds[job["warmup"] :],
        "first": seconds[0],
        "values": values,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "mambapy")},
        "peak_bytes": peak,
        "step_bytes": peak - before,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
