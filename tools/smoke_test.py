"""Does an installed csg_ext work? gated_pool and class_mutual_info against the reference, on each device there is."""

from __future__ import annotations

import torch

import csg_ext
from csg_ext import reference

for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
    torch.manual_seed(0)
    x = torch.randn(8, 64, 7, 7, dtype=torch.float64, device=device, requires_grad=True)
    gate = torch.rand(10, 64, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.arange(8, device=device)
    results = []
    for function in (csg_ext.gated_pool, reference.gated_pool):
        out = function(x, gate, labels, project=True)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, gate])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    print(f"{csg_ext.__file__}: gated_pool agrees with the reference on {device}, forward and backward")

    features, classes = torch.randn(200, 3, device=device), torch.arange(200, device=device) % 4
    got = csg_ext.class_mutual_info(features, classes, ties="exact")
    torch.testing.assert_close(got, reference.class_mutual_info(features, classes, 4))
    print(f"{csg_ext.__file__}: class_mutual_info agrees with the reference on {device}")
