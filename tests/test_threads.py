"""Threads and processes: the same bits from many threads, after fork and in spawned workers, for any number of torch's
threads; other Python threads run meanwhile; Ctrl-C acts within a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import csg_ext
from csg_ext.ops.mutual_info import _psi

ROUNDS = 3


def results(seed: int) -> list[Tensor]:
    """What every operator makes of inputs that the seed draws: large enough to be shared by torch's threads."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 96, 9, 9, generator=draw)
    gate, labels = torch.rand(5, 96, generator=draw), torch.arange(16) % 5
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for pool in ("avg", "max"):
            leaf, g = x.to(memory_format=layout).requires_grad_(), gate.clone().requires_grad_()
            out = csg_ext.gated_pool(leaf, g, labels, pool=pool, project=True)
            found += [out.detach(), *torch.autograd.grad(out.square().sum(), (leaf, g))]
    matrix, velocity = torch.rand(50, 3000, generator=draw), torch.zeros(50, 3000)
    csg_ext.gate_step_(matrix, torch.randn(50, 3000, generator=draw), velocity, lr=0.1, momentum=0.9)
    features, classes = torch.randn(200, 40, generator=draw).relu(), torch.arange(200) % 4
    found += [matrix, velocity, csg_ext.project_gate(matrix - 0.5)]
    found += [csg_ext.class_mutual_info(features, classes, ties=ties) for ties in ("noise", "exact")]
    found.append(csg_ext.metrics.approximate_class_mutual_info(features, classes))
    return found


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Results(Dataset):
    """For workers: whether the operators give there what they give here."""

    def __init__(self, want: list[list[Tensor]]) -> None:
        self.want = want

    def __len__(self) -> int:
        return len(self.want)

    def __getitem__(self, seed: int) -> tuple[int, bool]:
        return os.getpid(), same(results(seed), self.want[seed])


def test_many_threads_get_the_bits_of_one():
    want = [results(seed) for seed in range(2)]
    begin, wrong = threading.Barrier(6), []

    def call(seed: int) -> None:
        try:
            begin.wait()
            wrong.extend(seed for _ in range(ROUNDS) if not same(results(seed), want[seed]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(i % 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_number_of_threads_changes_between_calls():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = results(0)
        for count in (3, 2, 7, 1, 2):
            torch.set_num_threads(count)
            assert same(results(0), want), f"{count} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    """Forked ones after this process's threads have run: the loader gives each worker one thread of torch's."""
    want = [results(seed) for seed in range(4)]
    loader = DataLoader(Results(want), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
    found = list(loader)
    assert all(fine for _, fine in found)
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2


def test_after_fork():
    """In a plain fork too, with one thread: more would wait for the parent's, as in torch's own operators."""
    want = results(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if same(results(0), want) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert same(results(0), want)


# ---- one call of a kernel --------------------------------------------------------------------------------------------


def pool_forward() -> Callable[[], object]:
    x, gate, labels = torch.randn(256, 256, 28, 28), torch.rand(4, 256), torch.arange(256) % 4
    return lambda: torch.ops.csg_ext._gated_pool(x, gate, labels, None, None, 1)


def pool_backward() -> Callable[[], object]:
    grad, gate, index = torch.randn(256, 256), torch.rand(256, 256), torch.empty(0, dtype=torch.int64)
    options = ([28, 28], 0, torch.float32, 0, True, True)
    return lambda: torch.ops.csg_ext.gated_pool_backward(
        grad, None, grad, index, gate, None, None, None, *options
    )  # fmt: skip


def step() -> Callable[[], object]:
    gate, grad = torch.rand(4000, 4000), torch.rand(4000, 4000)
    return lambda: csg_ext.gate_step_(gate, grad, lr=0.1)


def mutual_info() -> Callable[[], object]:
    features, labels = torch.randn(20000, 128), torch.arange(20000) % 10
    psi, bits = _psi(20000, torch.device("cpu"))
    return lambda: torch.ops.csg_ext.class_mutual_info(features, labels, 10, 3, None, False, psi, bits)


def binned() -> Callable[[], object]:
    features, labels = torch.randn(20000, 512), torch.arange(20000) % 10
    return lambda: torch.ops.csg_ext.binned_class_mutual_info(features, labels, 10, 64)


def normal_numbers() -> Callable[[], object]:
    key = torch.arange(1, 625)
    return lambda: torch.ops.csg_ext._standard_normal(key, 624, False, 0.0, 4000, 2000, 0, 2000)


@pytest.mark.parametrize("prepare", [pool_forward, pool_backward, step, mutual_info, binned, normal_numbers])
def test_other_python_threads_run_during_a_kernel(prepare):
    """Another thread's clock: it advances in the middle of the call, where only a released GIL lets it."""
    kernel, ticks, done = prepare(), [], threading.Event()

    def tick() -> None:
        while not done.wait(0.0005):
            ticks.append(time.perf_counter())

    clock = threading.Thread(target=tick)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    clock.start()
    try:
        begin = time.perf_counter()
        kernel()
        end = time.perf_counter()
    finally:
        done.set()
        clock.join()
        torch.set_num_threads(before)
    quarter = (end - begin) / 4
    assert sum(begin + quarter < at < end - quarter for at in ticks) >= 2


@pytest.mark.parametrize("ties", ["noise", "exact"])
def test_interrupt_acts_within_a_second(ties):
    """Ctrl-C while the noise of 150 million values is drawn, and after the first chunk of columns."""
    code = f"""
import signal, torch, csg_ext
signal.signal(signal.SIGINT, signal.default_int_handler)
features, labels = torch.randn(75_000, 1).expand(-1, 2_000), torch.arange(75_000) % 10
ready = lambda *_: print("ready", flush=True)
try:
    if {ties!r} == "noise":
        ready()
    csg_ext.class_mutual_info(features, labels, ties={ties!r}, progress=ready)
    print("finished", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent = time.perf_counter()
        child.send_signal(signal.SIGINT)
        line = child.stdout.readline()
        while line == "ready\n":
            line = child.stdout.readline()
        waited = time.perf_counter() - sent
        child.kill()
    assert line == "interrupted\n" and waited < 1
