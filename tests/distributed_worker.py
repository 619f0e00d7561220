"""What the ranks of tests/test_distributed.py do; as a script: torchrun ... distributed_worker.py MODE FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_torchrun

from csg_ext.nn import GatedModel
from csg_ext.optim import ProjectedOptimizer, ProjectedSGD
from csg_ext.training import Objective, Schedule, average_gradient

STEPS, BATCH, CLASSES = 9, 8, 3
PATHS = ["std", "csg", "joint"] * 3
OBJECTIVE = Objective(lambda_1=0.7, lambda_2=0.02)
SCHEDULE = Schedule("steps", STEPS, STEPS, period=3, csg_at=(1, 2), lr_warmup=0.0)
KILLED_AT, SAVE_EVERY = 7, 3


def model() -> GatedModel:
    torch.manual_seed(0)
    return GatedModel(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh()), CLASSES, num_filters=8).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 1, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def steps(net: GatedModel, forward: nn.Module, share: slice, reduce_gate: bool = False) -> None:
    """The three paths in turn; `forward` is the model or its wrapper, `share` a rank's part of a batch."""
    weights = torch.optim.SGD(net.weights(), lr=0.1, momentum=0.9)
    gate = ProjectedSGD([net.gate], lr=1.0)
    for (x, labels), path in zip(batches(), PATHS, strict=True):
        weights.zero_grad()
        gate.zero_grad()
        OBJECTIVE(forward, x[share], labels[share], path).total.backward()
        weights.step()
        if path != "std":
            if reduce_gate:
                average_gradient(net.gate.grad)
            gate.step()


def one_optimizer(net: GatedModel, forward: nn.Module, share: slice) -> None:
    """Weights and gate in one optimizer with momentum: under DDP STD steps must take the gate's zeros away."""
    groups = [{"params": net.weights()}, {"params": [net.gate], "lr": 1.0}]
    optimizer = ProjectedOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), [net.gate])
    for (x, labels), path in zip(batches(), PATHS, strict=True):
        optimizer.zero_grad()
        OBJECTIVE(forward, x[share], labels[share], path).total.backward()
        if path == "std":
            net.gate.grad = None
        optimizer.step()


def whole(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.detach() for k, v in net.state_dict().items()}


def plain(share: slice) -> dict[str, Any]:
    """Own loops under DDP (with the search for unused parameters; compiled), under FSDP1 and FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    results = {}
    for name, options in {"ddp": {}, "ddp_unused": {"find_unused_parameters": True}}.items():
        net = model()
        steps(net, DistributedDataParallel(net, **options), share)
        results[name] = whole(net)
    net = model()
    one_optimizer(net, DistributedDataParallel(net), share)
    results["ddp_one_optimizer"] = whole(net)
    net = model()
    steps(net, torch.compile(DistributedDataParallel(net), backend="aot_eager"), share)
    results["ddp_compiled"] = whole(net)
    net = model()
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), "ignored_states": [net.gate]}
    sharded = FullyShardedDataParallel(net, **options)
    steps(net, sharded, share, reduce_gate=True)
    with FullyShardedDataParallel.summon_full_params(sharded):
        results["fsdp1"] = {k: v.clone() for k, v in whole(net).items()}
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params={net.gate})
    steps(net, net, share, reduce_gate=True)
    results["fsdp"] = whole(net)
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        steps(net, net, share)
    except TypeError as error:
        results["sharded_gate_in_a_loop"] = str(error)
    return results


def lightning() -> dict[str, Any]:
    """GatedTraining under DDP and under FSDP2 (ModelParallelStrategy), inside torchrun."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from csg_ext.training import GatedTraining

    warnings.filterwarnings("ignore")

    class Sharded(GatedTraining):
        def configure_model(self) -> None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"], ignored_params={self.model.gate})

    class ShardedGate(GatedTraining):
        def configure_model(self) -> None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    world, results = dist.get_world_size(), {}
    for name, cls, strategy in (
        ("lightning_ddp", GatedTraining, DDPStrategy(process_group_backend="gloo")),
        ("lightning_fsdp", Sharded, ModelParallelStrategy(world, 1, process_group_backend="gloo")),
        ("sharded_gate", ShardedGate, ModelParallelStrategy(world, 1, process_group_backend="gloo")),
    ):
        net = model()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # Lightning's own would shuffle
        )
        sampler = DistributedSampler(data, shuffle=False)
        loader = DataLoader(data, BATCH // world, sampler=sampler)
        if name == "sharded_gate":
            try:
                trainer.fit(cls(net, SCHEDULE, OBJECTIVE), loader)
            except ValueError as error:
                results[name] = str(error)
        else:
            trainer.fit(cls(net, SCHEDULE, OBJECTIVE), loader)
            results[name] = whole(net)
    return results


class KillsRankOne(list):
    """Batches whose seventh never reaches the second rank."""

    def __getitem__(self, step):
        if step == KILLED_AT and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def run(mode: str, folder: Path) -> None:
    """One rank, in the environment that torchrun sets."""
    torch.set_num_threads(1)
    if mode == "example":
        sys.argv = ["train_torchrun.py", "3", str(folder)]
        return train_torchrun.main()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if mode == "compare":
        results = plain(slice(rank, None, world)) | lightning()
        torch.save(results, folder / f"{rank}.pt")
    else:
        data = KillsRankOne(batches()) if mode == "killed" else batches()
        net = model()
        start = train_torchrun.train(net, data, SCHEDULE, folder, every=SAVE_EVERY)
        torch.save({"start": start, "state": whole(net)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_as(rank: int, world: int, port: int, mode: str, folder: Path) -> None:
    """One rank in a process that torchrun has not started: the same, for less time."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    run(mode, folder)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
