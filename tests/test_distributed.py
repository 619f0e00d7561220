"""Two gloo ranks equal one rank and hold the same gate bits; a run that loses a rank fails loudly and resumes."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist

from csg_ext.training import DivergedError

WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = WORKER.parents[1]

# One thread, as in the ranks; the runs are too short to become sparse, which is warned of.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def torchrun(mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, mode, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )


def two_processes(mode: str, folder: Path) -> list[dict]:
    """What both ranks leave; their processes are forked from one that has imported everything."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["distributed_worker", "csg_ext.training.gated", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=worker.run_as, args=(rank, 2, port, mode, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]
    if mode == "example":
        return []
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, torch.Tensor]:
    """The weights of one process with the whole batches."""
    net = worker.model()
    worker.steps(net, net, slice(None))
    return worker.whole(net)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    return two_processes("compare", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["ddp", "ddp_unused", "ddp_compiled", "ddp_one_optimizer", "fsdp1", "fsdp"])
def test_two_ranks_equal_one(one_rank, two_ranks, kind):
    """On every path, with the same global batch; the gate has the same bits on both ranks."""
    if kind == "ddp_one_optimizer":
        net = worker.model()
        worker.one_optimizer(net, net, slice(None))
        one_rank = worker.whole(net)
    first, second = (rank[kind] for rank in two_ranks)
    assert first.keys() == one_rank.keys()
    for name, want in one_rank.items():
        torch.testing.assert_close(first[name], want, msg=name)
        assert torch.equal(first[name], second[name]), name
    gate = first["csg.gate"]
    assert gate.amax(0).eq(1).all() and gate.min() >= 0


@pytest.mark.parametrize("kind", ["lightning_ddp", "lightning_fsdp"])
def test_two_ranks_equal_one_through_lightning(two_ranks, kind):
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from csg_ext.training import GatedTraining

    net = worker.model()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*worker.batches(), strict=True)))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(GatedTraining(net, worker.SCHEDULE, worker.OBJECTIVE), DataLoader(data, worker.BATCH))
    first, second = (rank[kind] for rank in two_ranks)
    for name, want in worker.whole(net).items():
        torch.testing.assert_close(first[name], want, msg=name)
        assert torch.equal(first[name], second[name]), name


def test_a_sharded_gate_is_refused(two_ranks):
    for rank in two_ranks:
        assert "the gate must stay whole on every rank" in rank["sharded_gate"]
        message = "gate_step_: gate must be a plain tensor, whole on every rank, got a DTensor"
        assert rank["sharded_gate_in_a_loop"].startswith(message)


def test_the_example_runs(tmp_path):
    two_processes("example", tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["step"] == 3 and state["model"]["csg.gate"].amax(0).eq(1).all()


def test_a_lost_rank_ends_the_run_loudly_and_the_next_one_resumes(tmp_path):
    done = torchrun("killed", tmp_path)
    assert done.returncode != 0
    assert re.search(r"Signal 9 \(SIGKILL\) received", done.stderr), done.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 6  # the last multiple of SAVE_EVERY
    resumed = two_processes("train", tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    for got, want in zip(resumed, two_processes("train", whole), strict=True):
        assert got["start"] == 6 and want["start"] == 0
        assert all(torch.equal(got["state"][k], v) for k, v in want["state"].items())


@pytest.mark.parametrize("spoiled", ["loss", "gate"])
def test_the_example_stops_at_a_loss_of_nan_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, spoiled):
    """Step 6, counted from 1, has a loss of NaN, or leaves a gate of NaN behind a loss that is finite."""
    data, objective = worker.batches(), worker.train_torchrun.Objective
    if spoiled == "loss":
        data[5][0][0] = torch.nan
    else:
        calls = []

        def losses(model, x, labels, path):
            found = objective()(model, x, labels, path)
            calls.append(path)
            extra = (model.module.gate.sum() * 0).sqrt() if len(calls) == 6 else 0  # adds 0, with a gradient of NaN
            return found._replace(total=found.total + extra)

        monkeypatch.setattr(worker.train_torchrun, "Objective", lambda: losses)
    message = {"loss": "the loss is not finite at step 6 of 9: try", "gate": "csg.gate is NaN or infinite after step 6"}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(DivergedError, match=message[spoiled]):
            worker.train_torchrun.train(worker.model(), data, worker.SCHEDULE, tmp_path, every=worker.SAVE_EVERY)
    finally:
        dist.destroy_process_group()
    good = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert good["step"] == 3 and all(value.isfinite().all() for value in good["model"].values())
