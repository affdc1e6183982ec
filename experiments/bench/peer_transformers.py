"""Greedy decoding by transformers: `generate` of the Llama in a model folder, over its key-value cache.

A program of its own: it imports torch and transformers, and nothing of ruvjax. Its argument is a JSON object (see
`rows_decode.py`), its last line on stdout one JSON object. Of the growing cache and the static one the faster is kept;
nothing is compiled.

    python experiments/bench/peer_transformers.py '{"work": "decode", "folder": ..., "prompt": 64, ...}'
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers


def main():
    job = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    model = transformers.LlamaForCausalLM.from_pretrained(
        os.path.join(job["folder"], "float32"), dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    model = model.to(device).eval()
    prompt = [(7919 * i + 13) % model.config.vocab_size for i in range(job["prompt"])]
    tokens = torch.tensor([prompt], device=device)
    generated = job["generated"]

    def work(cache):
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=generated,
                min_new_tokens=generated,
                cache_implementation=cache,
                disable_compile=True,
                eos_token_id=None,
                pad_token_id=0,
            )
        answer = out[0, len(prompt) :].tolist()
        return time.perf_counter() - began, answer

    first, _ = work(None)
    tried = {cache: min(work(cache)[0] for _ in range(1 + job["warmup"])) for cache in (None, "static")}
    best = min(tried, key=lambda cache: tried[cache])
    runs = [work(best) for _ in range(job["repeats"])]
    answer = runs[-1][1]
    report = {
        "seconds": [seconds for seconds, _ in runs],
        "first": first,
        "values": [sum(answer) / len(answer)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "facts": {
            "cache": best or "dynamic",
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        },
        "tokens": answer,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
