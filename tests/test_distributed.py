"""Two gloo ranks, started by torchrun: they equal one rank, hold the same gate bits, and survive the loss of a rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER, mode, folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load(folder: Path) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, torch.Tensor]:
    """The weights of one process with the whole batches."""
    net = worker.model()
    worker.steps(net, net, slice(None))
    return worker.whole(net)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun("compare", folder)
    assert done.returncode == 0, done.stderr
    return load(folder)


@pytest.mark.parametrize("kind", ["ddp", "ddp_unused", "fsdp"])
def test_two_ranks_equal_one(one_rank, two_ranks, kind):
    """On every path, with the same global batch; the gate has the same bits on both ranks."""
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
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(GatedTraining(net, worker.SCHEDULE, worker.OBJECTIVE), DataLoader(data, worker.BATCH))
    first, second = (rank[kind] for rank in two_ranks)
    for name, want in worker.whole(net).items():
        torch.testing.assert_close(first[name], want, msg=name)
        assert torch.equal(first[name], second[name]), name


def test_a_lost_rank_ends_the_run_loudly_and_the_next_one_resumes(tmp_path):
    done = torchrun("killed", tmp_path)
    assert done.returncode != 0
    assert re.search(r"Signal 9 \(SIGKILL\) received", done.stderr), done.stderr
    assert not list(tmp_path.glob("*.pt"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 6  # the last multiple of SAVE_EVERY
    resumed = torchrun("train", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    assert torchrun("train", whole).returncode == 0
    for got, want in zip(load(tmp_path), load(whole), strict=True):
        assert got["start"] == 6 and want["start"] == 0
        assert all(torch.equal(got["state"][k], v) for k, v in want["state"].items())
