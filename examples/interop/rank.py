"""One rank of PyTorch in a world that it shares with Rust: see main.rs, which does the same step by step.

usage: python rank.py env | tcp://HOST:PORT  [gloo | nccl]   (RANK, WORLD_SIZE, LOCAL_RANK from the environment)
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def check(name, got, expected):
    expected = torch.as_tensor(expected, dtype=got.dtype).reshape(got.shape)
    if not torch.allclose(got.to(torch.float64), expected.to(torch.float64), atol=1e-6):
        raise SystemExit(f"{name} on Python rank {dist.get_rank()}: got {got}, expected {expected}")


def collectives(r, n):
    t = torch.tensor([r + 1.0, 10.0 * r])
    dist.all_reduce(t)
    check("all_reduce", t, [n * (n + 1) / 2, 10.0 * n * (n - 1) / 2])
    t = torch.tensor([r, -r])
    dist.all_reduce(t, dist.ReduceOp.MAX)
    check("all_reduce max", t, [n - 1, 0])
    t = torch.tensor([r + 1.0], dtype=torch.bfloat16)
    dist.all_reduce(t)
    check("all_reduce bf16", t, [n * (n + 1) / 2])
    t = torch.tensor([float(r)])
    dist.all_reduce(t, dist.ReduceOp.AVG)
    check("all_reduce avg", t, [(n - 1) / 2])
    t = torch.tensor([complex(r, 1)])
    dist.all_reduce(t)
    check("all_reduce complex", torch.view_as_real(t), [[n * (n - 1) / 2, n]])
    for root in range(n):
        t = torch.full((3,), float(r))
        dist.broadcast(t, root)
        check("broadcast", t, [root] * 3)
        t = torch.tensor([r + 1])
        dist.reduce(t, root)
        if r == root:
            check("reduce", t, [n * (n + 1) // 2])
        mine = torch.tensor([r, 100 + r])
        outs = [torch.zeros(2, dtype=torch.int64) for _ in range(n)] if r == root else None
        dist.gather(mine, outs, root)
        if r == root:
            check("gather", torch.stack(outs), [[i, 100 + i] for i in range(n)])
        ins = [torch.tensor([10.0 * root + i]) for i in range(n)] if r == root else None
        t = torch.zeros(1)
        dist.scatter(t, ins, root)
        check("scatter", t, [10.0 * root + r])
    outs = [torch.zeros(2) for _ in range(n)]
    dist.all_gather(outs, torch.tensor([float(r), -float(r)]))
    check("all_gather", torch.stack(outs), [[i, -i] for i in range(n)])
    out = torch.zeros(2 * n)
    dist.all_gather_into_tensor(out, torch.tensor([float(r), 7.0]))
    check("all_gather_into_tensor", out, [x for i in range(n) for x in (i, 7)])
    out = torch.zeros(2)
    dist.reduce_scatter_tensor(out, torch.arange(2.0 * n) + r)
    base = n * (n - 1) / 2
    check("reduce_scatter_tensor", out, [n * 2 * r + base, n * (2 * r + 1) + base])
    out = torch.zeros(n)
    dist.all_to_all_single(out, torch.arange(float(n)) + 10 * r)
    check("all_to_all_single", out, [10 * i + r for i in range(n)])
    # Rank s sends t + 1 elements to rank t.
    ins = torch.cat([torch.full((to + 1,), 10.0 * r + to) for to in range(n)])
    out = torch.zeros(n * (r + 1))
    dist.all_to_all_single(out, ins, [r + 1] * n, [to + 1 for to in range(n)])
    check("all_to_all_single uneven", out, [10.0 * s + r for s in range(n) for _ in range(r + 1)])
    outs = [torch.zeros(1) for _ in range(n)]
    dist.all_to_all(outs, [torch.tensor([10.0 * r + to]) for to in range(n)])
    check("all_to_all", torch.cat(outs), [10.0 * s + r for s in range(n)])
    dist.barrier()


def of_nccl(r, n):
    """What PyTorch's Gloo does not have, or, for lists in reduce_scatter, does another way over the wire."""
    t = torch.tensor([r == 0, False])
    dist.all_reduce(t)
    check("all_reduce bool", t, [True, False])
    out = torch.zeros(2)
    dist.reduce_scatter(out, [torch.full((2,), 10.0 * r + to) for to in range(n)])
    check("reduce_scatter", out, [5 * n * (n - 1) + n * r] * 2)
    # More than any buffer on the way.
    t = torch.full((300_000,), float(r), dtype=torch.float64)
    dist.all_reduce(t)
    check("all_reduce of much", t, [n * (n - 1) / 2] * 300_000)
    to, source = (r + 1) % n, (r + n - 1) % n
    got = torch.zeros(300_000, dtype=torch.float64)
    batch((dist.irecv, got, source), (dist.isend, t + r, to))
    check("much sent", got, [n * (n - 1) / 2 + source] * 300_000)


def batch(*ops):
    for work in dist.batch_isend_irecv([dist.P2POp(*op) for op in ops]):
        work.wait()


def messages(r, n):
    """What NCCL has of messages too. There Rust's side of one is always a batch, and a lone send or recv none."""
    to, source = (r + 1) % n, (r + n - 1) % n
    got = torch.zeros(1)
    batch((dist.irecv, got, source), (dist.isend, torch.tensor([r + 0.5]), to))
    check("batch_isend_irecv", got, [source + 0.5])
    if r > 0:
        batch((dist.isend, torch.full((3,), r, dtype=torch.int32), 0))
        return
    for other in range(1, n):
        got = torch.zeros(3, dtype=torch.int32)
        batch((dist.irecv, got, other))
        check("send, recv", got, [other] * 3)


def tagged_messages(r, n):
    to, source = (r + 1) % n, (r + n - 1) % n
    got = torch.zeros(3)
    works = [dist.isend(torch.full((3,), float(r)), to, tag=5), dist.irecv(got, source, tag=5)]
    for work in works:
        work.wait()
    check("isend, irecv", got, [source] * 3)
    if r == 0:
        senders = set()
        for _ in range(n - 1):
            got = torch.zeros(1, dtype=torch.int16)
            sender = dist.recv(got, tag=6)
            check("recv from anybody", got, [sender])
            senders.add(sender)
        assert senders == set(range(1, n)), senders
    else:
        dist.send(torch.tensor([r], dtype=torch.int16), 0, tag=6)


def groups(r, n):
    for ranks in ([0, n - 1], list(range(0, n, 2)), list(range(n))):
        group = dist.new_group(ranks)
        if r in ranks:
            t = torch.tensor([r + 1.0])
            dist.all_reduce(t, group=group)
            check(f"all_reduce in {ranks}", t, [sum(ranks) + len(ranks)])


def train(r, n):
    """A regression, by gradients that all ranks average as one flat tensor."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[r + 1.0, 2.0, i] for i in range(4)], dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for _ in range(50):
        loss = ((x @ w - y) ** 2).mean()
        loss.backward()
        dist.all_reduce(w.grad)
        with torch.no_grad():
            w -= 0.02 / n * w.grad
        w.grad = None
    all = [torch.zeros(3, dtype=torch.float64) for _ in range(n)]
    dist.all_gather(all, w.detach())
    for other in all:
        assert (other - w).abs().max() < 1e-12, (other, w)


def main():
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = sys.argv[2] if len(sys.argv) > 2 else "gloo"
    if backend == "nccl":
        # More ranks than devices share them.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.set_default_device("cuda")
    where = {} if sys.argv[1] == "env" else {"init_method": sys.argv[1], "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=timedelta(seconds=60), **where)
    collectives(rank, size)
    messages(rank, size)
    (of_nccl if backend == "nccl" else tagged_messages)(rank, size)
    groups(rank, size)
    train(rank, size)
    dist.barrier()
    dist.destroy_process_group()
    print(f"Python rank {rank} of {size}: all as expected", flush=True)


main()
