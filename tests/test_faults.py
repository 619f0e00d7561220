"""Killed processes, a lack of memory, two runs in one folder. More kills: tests/kill_runs.py."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import kill_runs
import numpy as np
import pytest
import torch
from PIL import Image

import csg_ext
from csg_ext import cli, reference
from csg_ext.data import image_loader
from csg_ext.data.loader import _received
from csg_ext.training.files import ARMS, CHECKPOINT, run_lock

ARGUMENTS = [*kill_runs.SETTINGS, "--epochs", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kill_runs.small_images(tmp_path_factory.mktemp("data") / "data.npz")


def start(*arguments):
    command = [sys.executable, "-m", "csg_ext", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbs, but two others that want its folder meanwhile."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    first = start("--data", data, "--output", folder, *ARGUMENTS)
    wait_for(lambda: (folder / "run.json").exists())
    for options in (["--overwrite", "--data", data], ["--resume"]):
        second = start("--output", folder, *options)
        said = second.communicate(timeout=120)[1]
        assert second.returncode == 2
        assert said == f"csg-ext train: error: {folder}: used by another run (process {first.pid})\n"
    said = first.communicate(timeout=240)[1]
    assert first.returncode == 0, said
    return folder


def test_two_runs_in_one_folder(whole):
    kill_runs.check_files(whole)
    assert not list(whole.rglob(".*.part"))


def test_killed_at_random_moments():
    # A run inside this process would not be the first to use threads: a fork must be.
    command = [sys.executable, kill_runs.__file__, "--kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"kills": 5' in done.stdout and '"runs": ' in done.stdout


def test_when_the_command_is_killed_its_arms_save_and_stop_and_resuming_waits_for_them(data, whole, tmp_path):
    cut = tmp_path / "cut"
    process = start("--data", data, "--output", cut, *ARGUMENTS)
    wait_for(lambda: any((cut / arm / CHECKPOINT).exists() for arm in ARMS))
    process.kill()
    process.wait()
    assert cli.main(["train", "--resume", "--output", str(cut)]) == 0
    assert kill_runs.outcome(cut) == kill_runs.outcome(whole)


def test_the_lock_waits_for_what_a_killed_run_left_behind(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        file.write("4194305")  # above the largest process number
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="used by another run"), run_lock(tmp_path, patience=0.3):
            pass
        os.set_inheritable(file.fileno(), True)
        holder = subprocess.Popen(["sleep", "1"], close_fds=False)
    with run_lock(tmp_path) as lock:  # the descriptor here is closed: the child alone holds it
        assert holder.wait(0) == 0
        assert os.pread(lock, 32, 0) == str(os.getpid()).encode()
    with run_lock(tmp_path, patience=0):
        pass


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked: make sure that one run alone uses it"), run_lock(tmp_path):
        pass


def test_output_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["train", "--data", str(data), "--output", str(tmp_path / "file" / "run"), *ARGUMENTS]) == 2
    assert capsys.readouterr().err == f"csg-ext train: error: {tmp_path}/file/run: Not a directory\n"


def test_out_of_memory_in_an_operator():
    n, k = 2**22, 2**16  # results of 2^40 bytes
    x, labels = torch.rand(1, 1).expand(n, k), torch.zeros(n, dtype=torch.long)
    with pytest.raises(torch.OutOfMemoryError, match=rf"^gated_pool: out of memory: a tensor of {n} x {k} values of "):
        csg_ext.gated_pool(x, torch.rand(2, k), labels)
    x = torch.rand(1, 1, 1, 1).expand(2**12, 2**10, 2**8, 2**8)  # a copy of 2^40 bytes: the strides fit no layout
    x = x.transpose(0, 1)[:, :, ::3]
    with pytest.raises(torch.OutOfMemoryError, match="^gated_pool: out of memory: a tensor of "):
        csg_ext.gated_pool(x, torch.rand(2, 2**12), torch.zeros(2**10, dtype=torch.long))
    small = torch.rand(4, 3, 5), torch.rand(2, 3), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(csg_ext.gated_pool(*small), reference.gated_pool(*small))


def test_out_of_memory_inside_a_kernel():
    code = """
import resource, sys, torch, csg_ext
torch.set_num_threads(1)
csg_ext.class_mutual_info(torch.rand(50, 2), torch.arange(50) % 2)
features, labels = torch.rand(400_000, 64), torch.arange(400_000) % 5
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
try:
    csg_ext.class_mutual_info(features, labels)
except RuntimeError as error:  # whoever needed the memory, torch or the kernel
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(csg_ext.class_mutual_info(features[:99, :2], labels[:99]).shape)
"""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "memory" in first, done
    assert second == "torch.Size([2, 5])", done


def test_a_loader_whose_worker_dies_says_so(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "val" / label).mkdir(parents=True)
        for number in range(40):
            image = Image.fromarray(np.full((8, 8), number, np.uint8))
            image.save(tmp_path / ("val" if number == 0 else "train") / label / f"{number}.png")
    batches = iter(image_loader(tmp_path, batch_size=2, image_size=8, num_workers=2))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    workers[-1].kill()
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed by signal: Killed|exited unexpectedly)"):
        for _ in batches:
            time.sleep(0.05)


def test_a_connection_that_a_dead_worker_cuts_is_told_from_an_error_of_a_transform(tmp_path):
    class Cut:
        def __init__(self, worker):
            self._workers = [worker]

        def __iter__(self):
            return self

        def __next__(self):
            raise ConnectionResetError

    worker = multiprocessing.get_context("fork").Process()
    worker.start()
    worker.join()
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        next(_received(Cut(worker)))

    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / label / f"{number}.png")
    for workers in (0, 1):
        loader = image_loader(tmp_path, batch_size=2, num_workers=workers, transform=_no_connection)
        with pytest.raises(ConnectionError, match="no server"):
            next(iter(loader))


def _no_connection(image):
    raise ConnectionError("no server")
