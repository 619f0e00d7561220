"""Gated training on several processes in plain PyTorch, with checkpoints: a run that loses a rank can go on.

torchrun --nproc-per-node 2 examples/train_torchrun.py [steps] [folder]

When a rank dies, torchrun ends the others and exits with an error; the same command continues from the last checkpoint
(torchrun --max-restarts 3 does that by itself).
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csg_ext.data import Batches, load_images
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.optim import ProjectedSGD
from csg_ext.training import DensityWatch, FiniteLoss, Objective, Schedule, load_checkpoint, save_checkpoint


def train(model, batches, schedule, folder, lr=0.05, gate_lr=2.0, every=100):
    """Trains a gated model; every rank takes its share of every batch. Returns the step that it began with."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel, objective = DistributedDataParallel(model), Objective()
    finite = FiniteLoss("the loss", f"try a learning rate below lr={lr} or gate_lr={gate_lr}")
    watch = DensityWatch(model.csg)
    weights_optimizer = torch.optim.SGD(model.weights(), lr=lr, momentum=0.9, weight_decay=5e-4)
    gate_optimizer = ProjectedSGD([model.gate], lr=gate_lr)
    parts = {"model": model, "weights_optimizer": weights_optimizer, "gate_optimizer": gate_optimizer, "watch": watch}
    checkpoint, start = Path(folder) / "last.ckpt", 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)  # weights only: nothing in the file is executed
        start = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(start, schedule.total_steps):
        x, labels = batches[step]
        path = schedule.path(step)
        weights_optimizer.param_groups[0]["lr"] = lr * schedule.lr_factor(step)
        gate_optimizer.param_groups[0]["lr"] = gate_lr * schedule.gate_lr_factor(step)
        weights_optimizer.zero_grad()
        gate_optimizer.zero_grad()
        losses = objective(parallel, x[rank::world], labels[rank::world], path)  # leaves no parameter unused
        finite.observe(losses.total, step, schedule.total_steps)  # before the ranks share a gradient that is none
        losses.total.backward()
        if path != "gate":  # of a schedule with gate_warmup
            weights_optimizer.step()
        if path != "std":  # on the STD path the gate's gradient is zero
            gate_optimizer.step()
        watch.observe(step + 1, schedule.total_steps, moved=path != "std")
        if rank == 0 and ((step + 1) % every == 0 or step + 1 == schedule.total_steps):
            print(f"step {step}  loss {losses.total.item():.3f}  L1-density {model.csg.density():.3f}", flush=True)
            finite.check_parameters(model, step + 1, schedule.total_steps)  # else the last good checkpoint is kept
            save_checkpoint({"step": step + 1} | {k: v.state_dict() for k, v in parts.items()}, checkpoint)
    return start


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/torchrun")
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    data = load_images()  # the Fashion-MNIST subset inside the package
    mean, std = data.statistics()
    batches = Batches(data.train_images, data.train_labels, 64, mean=mean, std=std, shift=2, flip=True, device=device)
    torch.manual_seed(0)
    model = GatedModel(build_backbone("resnet20", data.channels), num_classes=len(data.classes)).to(device)
    if cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    train(model, batches, Schedule("steps", steps, len(batches), period=3, csg_at=(2,), lr_warmup=0), folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
