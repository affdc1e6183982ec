"""faiss's exact index (IndexFlatIP) at the size of the JSON argument; a program of its own, like `peer_torch.py`."""

import json
import sys
import time

import bank_keys
import faiss
import numpy as np

RECALLED = 64


def main():
    job = json.loads(sys.argv[1])
    faiss.omp_set_num_threads(job["threads"])
    seconds, facts, nearest, first = [], {}, [], 0.0
    for size in (job["count"] // 10, job["count"] // 2, job["count"]):
        for kind in ("clustered", "iid"):
            keys = bank_keys.keys(kind, size, job["dim"])
            asked = bank_keys.queries(kind, keys, RECALLED)
            began = time.perf_counter()
            index = faiss.IndexFlatIP(job["dim"])
            index.add(keys)
            first = time.perf_counter() - began
            seconds = []
            for number in range(job["warmup"] + job["repeats"]):
                began = time.perf_counter()
                index.search(asked[number % RECALLED][None], job["k"])
                seconds.append(time.perf_counter() - began)
            seconds = seconds[job["warmup"] :]
            nearest += index.search(asked, job["k"])[1].ravel().tolist()
            label = f"{size // 1000}k_{kind}"
            facts |= {f"p{p}_ms_{label}": 1e3 * float(np.percentile(seconds, p)) for p in (50, 99)}
    report = {
        "seconds": seconds,
        "first": first,
        "values": [0.0],
        "parameters": 0,
        "device": "cpu",
        "versions": {"faiss": faiss.__version__},
        "facts": facts,
        "tokens": nearest,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
