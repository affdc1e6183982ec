"""The masked diffusion transformer in plain torch: one training step, and LLaDA's published sampling loop.

A program of its own: it imports torch and nothing of ruvjax. Its argument is a JSON object (see `rows.py`), its
last line on stdout one JSON object with the seconds of every timed step.

    python experiments/bench/peer_torch.py '{"work": "train", "layers": 4, ...}'
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention (bidirectional, rotary) and SwiGLU, without biases."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        y = self.attention_norm(x)
        q, k, v = (m(y).view(batch, length, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, width))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Network(nn.Module):
    """The hidden states of tokens [batch, length]; the head is the embedding, applied by the caller."""

    def __init__(self, vocab_size, layers, width, heads, mlp_width, length):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(layers))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        dim = width // heads
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.final_norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embedding.weight)


def corrupt(tokens, mask_id):
    """Noisy tokens, which of them are masked, and the time of each row; times spread evenly over (0, 1]."""
    batch = tokens.shape[0]
    t = 1e-3 + (1 - 1e-3) * ((torch.rand(1) + torch.arange(batch)) / batch % 1)
    masked = torch.rand(tokens.shape) < t[:, None]
    return torch.where(masked, mask_id, tokens), masked, t


def train_step(network, optimizer, tokens, mask_id, bf16):
    """One step of the continuous-time NELBO, the head run at masked positions only. Returns the loss."""
    noisy, masked, t = corrupt(tokens, mask_id)
    noisy, masked, t = (x.to(tokens.device) for x in (noisy, masked, t))
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        logits = network.logits(network(noisy)[masked])
    weight = (1 / t)[:, None].expand(tokens.shape)[masked]
    loss = (F.cross_entropy(logits.float(), tokens[masked], reduction="none") * weight).sum() / tokens.numel()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def llada_sample(network, prompt, gen_length, steps, block_length, temperature, mask_id, bf16):
    """`gen_length` tokens after a prompt [batch, length]."""
    x = F.pad(prompt, (0, gen_length), value=mask_id)
    return llada_fill(network, x, prompt.shape[1], steps, block_length, temperature, mask_id, bf16)


@torch.inference_mode()
def llada_fill(network, x, start, steps, block_length, temperature, mask_id, bf16):
    """LLaDA's sampling (Nie et al. 2025): whole-sequence passes, tokens drawn by Gumbel noise in float64, and in each
    step the most confident tokens of the current block kept, the others left masked. Blocks count from `start`; what is
    masked in x [batch, length] is filled, in x itself."""
    batch = x.shape[0]
    blocks = (x.shape[1] - start) // block_length
    per_block = steps // blocks
    for block in range(blocks):
        end = start + (block + 1) * block_length
        left = (x[:, end - block_length : end] == mask_id).sum(1)
        for step in range(per_block):
            masked = x == mask_id
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                logits = network.logits(network(x)).float()
            logits[..., mask_id] = -torch.inf  # a trained network never predicts it; this one is random
            noisy = logits
            if temperature > 0:
                uniform = torch.rand(logits.shape, dtype=torch.float64, device=x.device)
                noisy = logits.double() - temperature * torch.log(-torch.log(uniform))
            drawn = noisy.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
            confidence = confidence.masked_fill(~masked, -torch.inf)
            confidence[:, end:] = -torch.inf
            for row in range(batch):
                count = left[row] // per_block + (step < left[row] % per_block)
                kept = confidence[row].topk(int(count)).indices
                x[row, kept] = drawn[row, kept]
    return x


def main():
    job = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    sizes = {key: job[key] for key in ("vocab_size", "layers", "width", "heads", "mlp_width", "length")}
    network = Network(**sizes).to(device)
    bf16, mask_id = job["dtype"] == "bfloat16", job["vocab_size"] - 1
    tokens = torch.randint(0, mask_id, (job["batch"], job["length"]), device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)

    def work():
        if job["work"] == "train":
            return train_step(network, optimizer, tokens, mask_id, bf16)
        generated = job["generated"]
        prompt = tokens[:, : job["length"] - generated]
        settings = (generated, job["steps"], generated, job["temperature"], mask_id, bf16)
        return float((llada_sample(network, prompt, *settings) == mask_id).sum())  # none may be left

    seconds, values = [], []
    for _ in range(job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        values.append(work())
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
