"""What the tests share: devices, the CPU's instruction-set levels, seeds, and the collection of GPU-only files."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Idle OpenMP threads that spin take the other core from whatever runs beside the tests; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# matplotlib's list of fonts, made anew: the user's may be that of a matplotlib that is gone.
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp()

import browser_page
import numpy as np
import pytest
import torch
from short_run import SHORT

import csg_ext  # noqa: F401  (loads the operators)

atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)

# A run started in the background may ignore Ctrl-C, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
LEVELS = {0: "baseline", 1: "avx2", 2: "avx512"}

# These files hold only what needs a GPU.
collect_ignore = [] if torch.cuda.is_available() else ["test_on_gpu.py"]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh inputs for every test, the same ones in every run."""
    torch.manual_seed(sum(request.node.name.encode()))


@pytest.fixture
def one_thread():
    """One thread: a second one only costs on networks and images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def available_levels() -> list[int]:
    """The instruction sets that this processor runs."""
    op = torch.ops.csg_ext._cpu_level
    now = op(-1)
    best = op(2)
    op(now)
    return list(range(best + 1))


@pytest.fixture(params=available_levels(), ids=lambda level: LEVELS[level])
def cpu_level(request: pytest.FixtureRequest):
    """Runs the test with each variant of the CPU kernels, chosen explicitly."""
    op = torch.ops.csg_ext._cpu_level
    now = op(-1)
    assert op(request.param) == request.param
    yield request.param
    op(now)


@pytest.fixture(scope="session")
def cuda_on_cpu():
    """The CUDA kernels in their stand-in, tests/cuda_on_cpu: compiled once, where a test asks for them."""
    from stand_in_kernels import Kernels

    return Kernels()


@pytest.fixture
def kernels(cuda_on_cpu, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]):
    """cuda_on_cpu with inputs and a schedule that are the test's own."""
    seed = int.from_bytes(hashlib.sha256(request.node.name.encode()).digest()[:6], "little")
    cuda_on_cpu.at_end = True
    cuda_on_cpu.seed(seed)
    torch.manual_seed(seed)
    with capfd.disabled():  # an undefined operation ends the process: its message must get out
        yield cuda_on_cpu


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Images of three digits, 8 x 8, as an .npz: 400 train and 137 test images."""
    from sklearn.datasets import load_digits

    from csg_ext.data import ImageData

    path = tmp_path_factory.mktemp("data") / "digits.npz"
    data = load_digits()
    keep = data.target < 3
    images, labels = (data.images[keep] * 15.9).astype(np.uint8)[:, None], data.target[keep].astype(np.int64)
    ImageData("digits", images[:400], labels[:400], images[400:], labels[400:], ["0", "1", "2"]).save(path)
    return path


@pytest.fixture(scope="session")
def run(digits, tmp_path_factory):
    """A finished run of csg-ext train, not to be changed: (folder, what it printed, its progress)."""
    from csg_ext import cli

    folder = tmp_path_factory.mktemp("run") / "out"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["train", "--data", str(digits), "--output", str(folder), *SHORT])
    assert status == 0, err.getvalue()
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, a browser_page.BrowserPage."""
    page = browser_page.start()
    yield page
    page.driver.quit()
