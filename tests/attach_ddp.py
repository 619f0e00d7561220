"""One of two processes that train an attached model with DistributedDataParallel; imported by test_attach."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import csg_ext

PATHS = ("std", "csg", "both", "std")


def gated_model() -> csg_ext.nn.AttachedModel:
    """The same weights in every process."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return csg_ext.attach(model, "1", example=torch.randn(2, 2, 6, 6))


def data() -> tuple[Tensor, Tensor]:
    """The same batch of 4 in every process."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(4, 2, 6, 6, generator=generator), torch.tensor([0, 3, 1, 1])


def gradients(g: nn.Module, x: Tensor, labels: Tensor, path: str) -> list[Tensor | None]:
    """The gradients of one step, the gate's last."""
    g.zero_grad()
    out = g(x, labels, path=path)
    sum(F.cross_entropy(logits, labels) for logits in (out if path == "both" else (out,))).backward()
    return [None if p.grad is None else p.grad.clone() for p in g.parameters()]


def run(rank: int, folder: str) -> None:
    """Rank's half of the batch, on every path in turn; rank 0 writes the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=150)
    )
    x, labels = (t[2 * rank : 2 * rank + 2] for t in data())
    turns = DistributedDataParallel(gated_model(), find_unused_parameters=True)
    joint = DistributedDataParallel(gated_model())
    found = {
        "turns": [gradients(turns, x, labels, path) for path in PATHS],
        "joint": [gradients(joint, x, labels, "both") for _ in range(3)],
    }
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    # Neither leaves while the other communicates, or with reducers that outlive the group: one aborted at its exit.
    dist.barrier()
    del turns, joint
    dist.destroy_process_group()
