"""The same calls and steps as calls.rs and training.rs, in PyTorch: one JSON line each. Needs torch with CUDA."""
import json
import os
import time

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29517")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

ROUNDS, CALLS = 7, 2000
VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 50_257, 512, 768, 12, 12
DEVICE = torch.device("cuda", 0)


def median(calls, call):
    rounds = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) * 1e6 / calls)
    rounds = sorted(rounds[1:])  # the first round warms up
    return rounds[len(rounds) // 2]


def tell(what, microseconds):
    print(json.dumps({"what": what, "us": round(microseconds, 3)}), flush=True)


def calls():
    for size in (4, 4096, 65_536):
        t = torch.zeros(size // 4, device=DEVICE)
        out = torch.zeros(size // 4 * dist.get_world_size(), device=DEVICE)
        tell(f"all_reduce {size} B", median(CALLS, lambda: dist.all_reduce(t)))
        wait = lambda: dist.all_reduce(t, async_op=True).wait()
        tell(f"all_reduce {size} B, async and wait", median(CALLS, wait))
        tell(f"all_gather_into_tensor {size} B", median(CALLS, lambda: dist.all_gather_into_tensor(out, t)))
        tell(f"reduce_scatter_tensor {size} B", median(CALLS, lambda: dist.reduce_scatter_tensor(t, out)))
        tell(f"broadcast {size} B", median(CALLS, lambda: dist.broadcast(t, 0)))


class Bottleneck(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )
        self.short = nn.Sequential()
        if stride != 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        return F.relu(self.short(x) + self.body(x))


def resnet50():
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, width, stride if block == 0 else 1))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        heads = lambda t: t.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2)
        q, k, v = map(heads, self.attention(self.norm1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).contiguous().view(batch, length, WIDTH))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.places)
        return F.linear(self.norm(x), self.tokens.weight)


def steps(name, make, inputs, targets):
    for how in ("alone", "DDP"):
        net = make().to(DEVICE)
        if how == "DDP":
            net = DistributedDataParallel(net, device_ids=[0])
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

        def step():
            optimizer.zero_grad()
            scores = net(inputs)
            F.cross_entropy(scores.reshape(-1, scores.shape[-1]).float(), targets.reshape(-1)).backward()
            optimizer.step()

        tell(f"{name} step, {how}", median(5, step))


def main():
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=DEVICE)
    calls()
    images, labels = torch.randn(32, 3, 224, 224, device=DEVICE), torch.randint(1000, (32,), device=DEVICE)
    steps("ResNet-50", resnet50, images, labels)
    tokens = lambda: torch.randint(VOCABULARY, (4, CONTEXT), device=DEVICE)
    steps("GPT-2 small", Gpt, tokens(), tokens())
    dist.destroy_process_group()


main()
