"""What only a GPU can show: streams, devices, graphs, synchronisation, labels that nobody checked. See conftest.py."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mutual_info_inputs import LABELS, make_features, make_labels, psi_table
from torch import nn

import csg_ext
from csg_ext import reference
from csg_ext.data import image_loader


def inputs(shape=(32, 96, 7, 7), classes=10, dtype=torch.float32, device="cuda"):
    x = torch.randn(*shape, device=device).to(dtype)
    return x, torch.rand(classes, shape[1], device=device), torch.randint(0, classes, shape[:1], device=device)


def test_nothing_waits_for_the_gpu():
    x, gate, labels = inputs()
    x.requires_grad_()
    gate.requires_grad_()
    buffer = torch.zeros_like(gate)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pool in ("avg", "max"):
            out = csg_ext.gated_pool(x, gate, labels, pool=pool, project=True)
            out.sum().backward()
        weights = torch.nn.functional.softmax(torch.randn(32, 10, device="cuda"), 1)
        csg_ext.gated_pool(x, gate, weights).sum().backward()
        csg_ext.gate_step_(gate, gate.grad, buffer, lr=0.1, momentum=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_labels_outside_the_gate_are_nan_or_validated():
    x, gate, labels = inputs()
    labels[3], labels[5] = 10, -1
    x.requires_grad_()
    gate.requires_grad_()
    out, pooled = csg_ext.gated_pool(x, gate, labels, return_pooled=True)
    bad = torch.zeros(32, dtype=torch.bool, device="cuda")
    bad[3] = bad[5] = True
    assert out[bad].isnan().all() and not out[~bad].isnan().any() and not pooled.isnan().any()
    grad_x, grad_gate = torch.autograd.grad(out[~bad].sum(), (x, gate))
    assert not grad_gate.isnan().any()
    with pytest.raises(ValueError, match=r"gated_pool: labels\[3\] = 10 is outside \[0, 10\)"):
        csg_ext.gated_pool(x, gate, labels, validate=True)


def test_side_stream():
    x, gate, labels = inputs((64, 512, 14, 14))
    want = reference.gated_pool(x, gate, labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = csg_ext.gated_pool(x + 0, gate, labels)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(got, want)


def test_every_device():
    for index in range(torch.cuda.device_count()):
        x, gate, labels = inputs(device=f"cuda:{index}")
        got = csg_ext.gated_pool(x, gate, labels)
        assert got.device.index == index
        torch.testing.assert_close(got, reference.gated_pool(x, gate, labels))
    with pytest.raises(ValueError, match=r"gated_pool: (gate|labels) must be on the device of .*cuda:0, got cpu"):
        csg_ext.gated_pool(*inputs()[:1], torch.rand(10, 96), inputs()[2])


def test_cuda_graph():
    x, gate, labels = inputs()
    x.requires_grad_()
    gate.requires_grad_()

    def step():
        return torch.autograd.grad(csg_ext.gated_pool(x, gate, labels, project=True).square().sum(), (x, gate))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_same_bits_every_time():
    for dtype in (torch.float32, torch.bfloat16):
        x, gate, labels = inputs((128, 512, 7, 7), dtype=dtype)
        x.requires_grad_()
        gate.requires_grad_()
        runs = []
        for _ in range(3):
            out = csg_ext.gated_pool(x, gate, labels)
            runs.append((out, *torch.autograd.grad(out.float().square().sum(), (x, gate))))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_more_than_two_billion_elements():
    free = torch.cuda.mem_get_info()[0]
    assert free > 12 * 2**30, "this test needs 12 GiB of GPU memory"
    x = torch.zeros(2**21 + 1, 2, 512, dtype=torch.float16, device="cuda")  # 2^31 + 1024 elements
    x[-1] = 3
    gate = torch.tensor([[1.0, 0.5]], device="cuda", requires_grad=True)
    labels = torch.zeros(len(x), dtype=torch.int64, device="cuda")
    out = csg_ext.gated_pool(x, gate, labels)
    torch.testing.assert_close(out[-1], torch.tensor([3.0, 1.5], device="cuda"))
    assert out[:-1].abs().max() == 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(csg_ext.gated_pool(x, gate, labels)[-1].sum(), x)
    torch.testing.assert_close(grad[-1, :, -1].float().cpu(), torch.tensor([1 / 512, 0.5 / 512]))
    assert grad[:-1].abs().max() == 0


def mutual_info(features, labels, classes, k, noise=None, multiclass=False):
    bits = psi_table(len(labels))
    return torch.ops.csg_ext.class_mutual_info(
        features, labels, classes, k, noise, multiclass, bits[0].to(features.device), bits[1]
    )


@pytest.mark.parametrize("noise", [False, True], ids=["exact", "noise"])
@pytest.mark.parametrize("kind", LABELS)
def test_mutual_info_is_that_of_the_cpu(kind, noise):
    rng = np.random.default_rng(sum(kind.encode()) + noise)
    for n in (2, 30, 300, 3000, 30_000):
        for k in (3, 7, 12, 20):
            features = make_features(rng, n, 21)
            labels, classes = make_labels(rng, n, kind)
            classes = min(classes, 2000)
            labels = labels % classes
            drawn = torch.from_numpy(rng.standard_normal(features.shape)) if noise else None
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for multiclass in (False, True):
                    arguments = features.to(dtype), labels, classes, k, drawn, multiclass
                    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
                    got, again, want = mutual_info(*on_gpu), mutual_info(*on_gpu), mutual_info(*arguments)
                    assert torch.equal(got, again)
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)


def test_mutual_info_in_several_chunks():
    features, labels = torch.randn(50_000, 300, device="cuda").relu(), torch.randint(0, 1000, (50_000,), device="cuda")
    got = mutual_info(features, labels, 1000, 3)
    torch.testing.assert_close(got.cpu(), mutual_info(features.cpu(), labels.cpu(), 1000, 3), rtol=1e-12, atol=1e-12)
    assert torch.equal(got[7:8], mutual_info(features[:, 7:8], labels, 1000, 3))


def test_mutual_info_names_a_label_outside():
    labels = torch.zeros(100, dtype=torch.int64, device="cuda")
    labels[40:50] = 7
    with pytest.raises(RuntimeError, match=r"class_mutual_info: labels\[40\] = 7 is outside \[0, 5\)"):
        mutual_info(torch.randn(100, 3, device="cuda"), labels, 5, 3)


def test_an_attached_model_is_that_of_the_cpu():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 5),
    ).double()
    x, labels, gate = torch.randn(6, 3, 9, 7).double(), torch.randint(0, 5, (6,)), torch.rand(5, 16).double()
    found = []
    for device in ("cpu", "cuda"):
        g = csg_ext.attach(copy.deepcopy(model).to(device), example=x.to(device))
        g.gate.data.copy_(gate)
        std, csg = g(x.to(device), labels.to(device), path="both")
        loss = nn.functional.cross_entropy(std + csg, labels.to(device))
        found.append([t.detach().cpu() for t in (std, csg, *torch.autograd.grad(loss, list(g.parameters())))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu)


def test_the_loader_pins_its_batches():
    loader = image_loader(None, "test", batch_size=500, num_workers=2)
    for x, labels in loader:
        assert x.is_pinned() and labels.is_pinned()
        copy = x.to("cuda", non_blocking=True)
        assert torch.equal(copy.cpu(), x)
    assert not next(iter(image_loader(None, "test", batch_size=500, num_workers=0, pin_memory=False)))[0].is_pinned()
