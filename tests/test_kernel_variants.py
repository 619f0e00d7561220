"""Every variant of the CPU kernels that size, layout or options select, at every instruction set, against fp64.

The sizes stand beside the thresholds in csrc/gated_pool/*.inl and csrc/gate_step/gate_step_cpu.inl. No test depends on
what the processor would pick: `cpu_level` chooses the instruction set.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from gated_pool_inputs import BF16, F16, F32, F64, LAYOUTS, TYPE_IDS, TYPES, compare, inputs
from test_gate_step import gates, step_and_compare
from tolerances import assert_within

import csg_ext
from csg_ext import reference

ROWS = {
    "7x7: adjacent rows in whole vectors": (2, 70, 7, 7),
    "8x8: adjacent rows in whole vectors": (2, 70, 8, 8),
    "shorter than a vector": (3, 5, 3),
    "one vector and a rest": (3, 37, 17),
    "AVX2 also where there is AVX-512": (2, 20, 255),
    "AVX-512 where there is": (2, 20, 256),
    "sums of 2048 and a rest shorter than a vector": (2, 3, 2049),
    "sums of 2048 and a rest of vectors": (2, 3, 2100),
    "several blocks of 64 channels": (1, 150, 20),
}
CHANNELS_LAST = {
    "fewer channels than a strip": (3, 3, 5),
    "positions in one sum": (2, 40, 128),
    "positions in several sums": (2, 40, 131),
    "strips of all widths and an overlapping one": (2, 509, 3),
    "several blocks of 2048 channels": (2, 2100, 2),
} | {f"{k} channels: whole vectors, copied from registers": (2, k, 3) for k in (2, 4, 8, 16, 32, 64, 128, 256, 512)}


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("layout, shapes", [("rows", ROWS), ("channels_last", CHANNELS_LAST)])
def test_gated_pool_sizes(cpu_level, types, layout, shapes):
    for shape, pool in itertools.product(shapes.values(), ["avg", "max"]):
        x, gate, labels = inputs(shape, types)
        compare(LAYOUTS[layout](x), gate, labels, pool=pool)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_rows_of_one_position(cpu_level, types):
    """Channels apart, so that a single position is a row: shorter than every vector, of fp64 in 16 bytes too."""
    for pool in ("avg", "max"):
        x, gate, labels = inputs((3, 10), types)
        compare(x[:, ::2], gate[:, ::2], labels, pool=pool)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_rows_that_begin_off_a_vector(cpu_level, types):
    """7 x 7 and 8 x 8 rows from an odd element on, contiguous from there."""
    for shape in [(2, 70, 7, 7), (2, 70, 8, 8)]:
        x, gate, labels = inputs(shape, types)
        storage = x.new_zeros(x.numel() + 1)
        storage[1:] = x.flatten()
        compare(storage[1:].view(shape), gate, labels)


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_rows_of_a_map_beyond_the_cache(cpu_level, dtype):
    """What prefetches from memory goes by the map's size: one sample repeated has it without the memory."""
    for positions in (256, 301, 2049):
        one = torch.randn(1, 64, positions).to(dtype)
        samples = 42 * 2**20 // (one.numel() * one.element_size()) + 1
        gate, labels = torch.rand(3, 64).to(dtype), torch.arange(samples) % 3
        out, pooled = csg_ext.gated_pool(one.expand(samples, -1, -1), gate, labels, return_pooled=True)
        row = gate.double()[labels]
        want = one.double().mean(2).expand(samples, -1)
        magnitude = one.double().abs().mean(2).expand(samples, -1)
        assert_within(pooled, want, magnitude, "pooled")
        assert_within(out, row * want, row * magnitude, "out")


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_one_gradient_is_absent(cpu_level, types, layout):
    """Backward from one of the two results, and to one of the two inputs."""
    x, gate, labels = inputs((5, 70, 3, 3), types)
    x, eps = LAYOUTS[layout](x), torch.finfo(types[1]).eps
    for (used, wanted), project in itertools.product([(0, 0), (0, 1), (1, 0)], [False, True]):
        a, g = x.clone().requires_grad_(wanted == 0), gate.clone().requires_grad_(wanted == 1)
        a64, g64 = (t.detach().double().requires_grad_(t.requires_grad) for t in (a, g))
        results = csg_ext.gated_pool(a, g, labels, project=project, return_pooled=True)
        want = reference.gated_pool(a64, g64, labels, project=project, return_pooled=True)
        grad = torch.rand_like(results[used])
        target, target64 = (a, a64) if wanted == 0 else (g, g64)
        (got,) = torch.autograd.grad(results[used], target, grad)
        (expected,) = torch.autograd.grad(want[used], target64, grad.double())
        scale = float(expected.abs().max()) + float((x.double().abs().mean() * grad.double().abs().sum(0)).max())
        assert_within(got, expected, scale * (1 + eps / torch.finfo(F32).eps), f"{used} {wanted} {project}")


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("method", ["scale", "euclidean"])
def test_gate_step_options(cpu_level, dtype, method):
    """Without momentum and decay, with each of them; single elements, vectors, strips of four and all three in one row.

    The fp32 maxima of 4096 columns make a panel, the fp64 maxima of 2048.
    """
    options = [
        dict(lr=0.1),
        dict(lr=0.1, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9, first_step=True),
        dict(lr=0.1, momentum=0.9, dampening=0.5),
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    ]
    for shape, option in itertools.product([(3, 5), (10, 128), (4, 300), (2, 4200)], options):
        gate = gates(shape, dtype)
        step_and_compare(gate.nan_to_num(0.25), torch.randn(*shape).to(dtype), method, option, dtype)
