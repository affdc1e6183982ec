"""Greedy decoding by llama.cpp, through llama-cpp-python, of the GGUF file that ruvjax has written.

A program of its own: it imports nothing of ruvjax. Its argument is a JSON object (see `rows_decode.py`), its last line
on stdout one JSON object.

    python experiments/bench/peer_llama_cpp.py '{"work": "decode", "folder": ..., "prompt": 64, "generated": 128, ...}'
"""

import itertools
import json
import os
import sys
import time

import llama_cpp


def main():
    job = json.loads(sys.argv[1])
    path = os.path.join(job["folder"], "Q8_0", "model.gguf")
    threads = {"n_threads": job["threads"], "n_threads_batch": job["threads"]}
    model = llama_cpp.Llama(path, n_ctx=job["prompt"] + job["generated"], verbose=False, **threads)
    prompt = [(7919 * i + 13) % model.n_vocab() for i in range(job["prompt"])]

    def work():
        began = time.perf_counter()
        model.reset()  # or it would keep what it has read of the prompt
        told = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
        tokens = list(itertools.islice(told, job["generated"]))
        return time.perf_counter() - began, tokens

    runs = [work() for _ in range(1 + job["warmup"] + job["repeats"])]
    tokens = runs[-1][1]
    report = {
        "seconds": [seconds for seconds, _ in runs[1 + job["warmup"] :]],
        "first": runs[0][0],
        "values": [sum(tokens) / len(tokens)],
        "parameters": 0,
        "device": "cpu",
        "versions": {"llama-cpp-python": llama_cpp.__version__},
        "facts": {"weight_bytes": os.path.getsize(path)},
        "tokens": tokens,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
