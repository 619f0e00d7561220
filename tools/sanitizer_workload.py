"""Every CUDA kernel on a few small, odd shapes against the CPU kernels: what gpu_suite.sh runs under the sanitizer.

Inputs are made on the CPU, so that hardly any kernel but ours runs on the GPU.
"""

from __future__ import annotations

import torch

import csg_ext

TYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def gated_pool(x, gate, labels, grads, device, **options):
    """out, pooled and the gradients of x and gate, computed on `device`, on the CPU."""
    x, gate = (t.to(device).detach().requires_grad_() for t in (x, gate))
    outputs = csg_ext.gated_pool(x, gate, labels.to(device), return_pooled=True, **options)
    gradients = torch.autograd.grad(outputs, [x, gate], [g.to(device) for g in grads])
    return [t.detach().cpu() for t in (*outputs, *gradients)]


def check_gated_pool() -> int:
    """All combinations of type, layout, pool and projection on shapes that no vector width divides."""
    runs = 0
    for x_type, gate_type in TYPES:
        for n, k, size in [(1, 1, (1, 1)), (3, 37, (7, 7)), (2, 130, (13, 5)), (2, 8, (112, 112))]:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(n, k, *size).to(x_type).contiguous(memory_format=layout)
                gate = torch.rand(5, k).to(gate_type)
                labels = torch.randint(0, 5, (n,))
                grads = [torch.randn(n, k).to(gate_type) for _ in range(2)]
                for options in ({}, {"pool": "max"}, {"project": True}):
                    results = [gated_pool(x, gate, labels, grads, device, **options) for device in ("cuda", "cpu")]
                    for got, expected in zip(*results, strict=True):
                        limit = TOLERANCE[x_type]
                        torch.testing.assert_close(got, expected, rtol=limit, atol=limit)
                    runs += 1
    return runs


def check_gate_step() -> int:
    """Step and projection of gates with few and many classes."""
    runs = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in [(1, 1), (10, 67), (1000, 33)]:
            for method in ("scale", "euclidean"):
                gate, grad, buffer = (
                    torch.rand(shape).to(dtype),
                    torch.randn(shape).to(dtype),
                    torch.zeros(shape, dtype=dtype),
                )
                results = []
                for device in ("cuda", "cpu"):
                    g, b = gate.to(device, copy=True), buffer.to(device, copy=True)
                    csg_ext.gate_step_(g, grad.to(device), b, lr=0.1, momentum=0.9, weight_decay=1e-4, method=method)
                    csg_ext.project_gate_(g, method)
                    results.append([g.cpu(), b.cpu()])
                limit = TOLERANCE[dtype]
                for got, expected in zip(*results, strict=True):
                    torch.testing.assert_close(got, expected, rtol=limit, atol=limit)
                runs += 1
    return runs


def check_mutual_info() -> int:
    """Both kinds of ties, normal and rectified features, few and many classes, few and many neighbours."""
    runs = 0
    for n, classes, k in [(9, 2, 3), (150, 2, 3), (700, 60, 3), (300, 10, 7), (200, 5, 20)]:
        bits = 40
        psi = (torch.special.digamma(torch.arange(n + 1).double()) * 2.0**bits).nan_to_num(neginf=0).round().long()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            features = torch.cat([torch.randn(n, 9), torch.randn(n, 9).relu()], 1).to(dtype)
            labels = torch.randint(0, classes, (n,))
            for noise in (None, torch.randn(n, 18, dtype=torch.float64)):
                for multiclass in (False, True):
                    results = [
                        torch.ops.csg_ext.class_mutual_info(
                            features.to(device),
                            labels.to(device),
                            classes,
                            k,
                            None if noise is None else noise.to(device),
                            multiclass,
                            psi.to(device),
                            bits,
                        ).cpu()
                        for device in ("cuda", "cpu")
                    ]
                    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
                    runs += 1
    return runs


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"gated_pool: {check_gated_pool()} cases agree with the CPU, forward and backward")
    print(f"gate_step: {check_gate_step()} cases agree with the CPU")
    print(f"mutual_info: {check_mutual_info()} cases agree with the CPU")
    torch.cuda.synchronize()
