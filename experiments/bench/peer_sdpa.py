"""torch's scaled_dot_product_attention at the size of the JSON argument; a program of its own, like `peer_torch.py`."""

import json
import sys
import time

import torch
from torch.nn import functional as F


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (job["batch"], job["heads"], job["length"], job["dim"])
    q, k, v = (torch.randn(shape, device=device).to(getattr(torch, job["dtype"])) for _ in range(3))
    seconds, value = [], 0.0
    with torch.inference_mode():
        for _ in range(job["warmup"] + job["repeats"]):
            began = time.perf_counter()
            out = F.scaled_dot_product_attention(q, k, v)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        value = float(out.float().sum())
    report = {
        "seconds": seconds[job["warmup"] :],
        "first": seconds[0],
        "values": [value],
        "parameters": 0,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
