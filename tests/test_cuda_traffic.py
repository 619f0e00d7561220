"""What the CUDA kernels move, counted by the build of tests/cuda_on_cpu that counts: every byte once, in whole sectors
and 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch
from stand_in import Counts, Moved
from stand_in_kernels import CountedKernels
from traffic_cases import DTYPES, SIZES, Information, Pool, Step, run_pool

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
LAYOUT = pytest.mark.parametrize("layout", ["rows", "channels last"])
POOL = pytest.mark.parametrize("pool", ["avg", "max"])


@pytest.fixture(scope="module")
def kernels() -> CountedKernels:
    return CountedKernels()


def once(counts: Counts, size: int, edges: float = 0.0) -> None:
    """`size` bytes move, each once; sectors that two accesses touch are at most the share `edges`."""
    assert (counts.bytes, counts.touched_bytes) == (size, size)
    assert counts.sectors <= counts.touched_sectors * (1 + edges)


def check_pool(
    moved: tuple[Moved, Moved], shape: tuple[int, int, int], x_bytes: int, gate_bytes: int, edges: float, wide: float
) -> None:
    """The one large tensor moves once, at least the share `wide` of it by accesses of 16 bytes; nothing is stored twice
    and nothing but the results is stored."""
    forward, backward = moved
    (n, k, s), pooled = shape, shape[0] * shape[1] * gate_bytes
    assert forward.launches == 1
    assert backward.launches <= 2
    for moves, large, way in ((forward, "x", "load"), (backward, "grad_x", "store")):
        counts = moves.of(large, way)
        once(counts, n * k * s * x_bytes, edges)
        assert counts.wide_bytes >= wide * counts.bytes
    # Forward: an entry of the gate for each sample and channel, and the results.
    assert forward.of("gate", "load").bytes == pooled
    index = {"index": n * k * 8} if ("index", "store") in forward.all() else {}
    stored = {name: counts for (name, way), counts in forward.all().items() if way == "store"}
    assert {name: c.bytes for name, c in stored.items()} == {"out": pooled, "pooled": pooled, **index}
    assert {name: c.touched_bytes for name, c in stored.items()} == {"out": pooled, "pooled": pooled, **index}
    # Backward: x is not even handed over, and no gradient is read back.
    stored = {name for name, way in backward.all() if way == "store"}
    loaded = {name for name, way in backward.all() if way == "load"}
    assert stored == {"grad_x", "grad_gate"} and loaded.isdisjoint(stored)
    grad_gate = backward.of("grad_gate", "store")
    assert grad_gate.bytes == grad_gate.touched_bytes


@DTYPE
@LAYOUT
@POOL
def test_pool_moves_the_least(kernels: CountedKernels, dtype: torch.dtype, layout: str, pool: str) -> None:
    """Every type: 7 x 7 maps, whose rows are not aligned, without a byte or a sector too much."""
    case = Pool("7 x 7", layout, dtype, pool=pool)
    forward, backward = case.run(kernels)
    check_pool((forward, backward), SIZES["7 x 7"], dtype.itemsize, dtype.itemsize, edges=0, wide=1)
    # Every sector that is asked for, of x, gate, labels and results, against those that must be.
    asked = sum(counts.sectors for counts in forward.all().values())
    least = sum(counts.touched_sectors for counts in forward.all().values())
    assert asked <= 1.1 * least


@LAYOUT
@pytest.mark.parametrize("size", [size for size in SIZES if size != "7 x 7"])
def test_every_size(kernels: CountedKernels, size: str, layout: str) -> None:
    for dtype, pool in ((torch.float32, "max"), (torch.bfloat16, "avg")):
        moved = Pool(size, layout, dtype, pool=pool).run(kernels)
        check_pool(moved, SIZES[size], dtype.itemsize, dtype.itemsize, edges=0, wide=1)


@LAYOUT
@pytest.mark.parametrize("option", [{"project": True}, {"soft": True}, {"gate_type": torch.float32}], ids=str)
def test_every_option(kernels: CountedKernels, layout: str, option: dict[str, object]) -> None:
    """A projected gate, one row per sample, and an fp32 gate beside bf16 features."""
    case = Pool("7 x 7", layout, torch.bfloat16, **option)
    gate_bytes = 4 if "gate_type" in option else 2
    check_pool(case.run(kernels), SIZES["7 x 7"], x_bytes=2, gate_bytes=gate_bytes, edges=0, wide=1)


@DTYPE
def test_unaligned_maps(kernels: CountedKernels, dtype: torch.dtype) -> None:
    """Nothing is read or written twice where 16-byte accesses do not fit, and sectors are shared at edges only."""
    n, k, s = 6, 61, 51
    of_rows = torch.randn(n, k + 3, s).to(dtype)[:, 2 : k + 2]  # each sample a stretch that begins anywhere
    cut = torch.randn(n, k, s + 3).to(dtype)[..., 2 : s + 2]  # each row one
    channels = torch.randn(n, s, k).to(dtype).transpose(1, 2)
    for x, edges, wide in ((of_rows, 0.06, 0.95), (cut, 1.5, 0.5), (channels, 1, 0)):
        forward, backward = run_pool(kernels, x)
        check_pool((forward, backward), (n, k, s), dtype.itemsize, dtype.itemsize, edges, wide)


@DTYPE
@pytest.mark.parametrize("classes", [1, 10, 100, 1000])
def test_gate_step_moves_the_least(kernels: CountedKernels, dtype: torch.dtype, classes: int) -> None:
    step, column_max = Step(classes, 32, dtype).run(kernels)
    size = classes * 32 * dtype.itemsize
    assert step.launches == column_max.launches == 1
    ways = {("gate", "load"), ("grad", "load"), ("buffer", "load"), ("gate", "store"), ("buffer", "store")}
    assert step.all().keys() == ways
    for key in ways:
        once(step.of(*key), size)
    once(column_max.of("gate", "load"), size)


def test_gate_step_of_more_classes_than_registers_hold(kernels: CountedKernels) -> None:
    """The update is computed twice instead of being stored in between."""
    step, column_max = Step(1100, 16).run(kernels)
    size = 1100 * 16 * 4
    assert step.launches == 1
    for key, counts in step.all().items():
        assert counts.bytes == (2 if key[1] == "load" else 1) * size
        assert counts.sectors * 32 == counts.bytes
    once(column_max.of("gate", "load"), size)


def test_gate_step_touches_only_what_it_needs(kernels: CountedKernels) -> None:
    gate, grad = torch.rand(10, 16), torch.randn(10, 16)
    kernels.step(gate, grad, lr=0.1)
    assert kernels.moved[-1].all().keys() == {("gate", "load"), ("grad", "load"), ("gate", "store")}
    kernels.step(gate, grad, grad, lr=0.1, momentum=0.9, first_step=True)
    assert ("buffer", "load") not in kernels.moved[-1].all()
    kernels.step(gate, None)
    assert kernels.moved[-1].all().keys() == {("gate", "load"), ("gate", "store")}


def test_mutual_info_stages(kernels: CountedKernels) -> None:
    """The passes over all samples and features move what the head of mutual_info_cuda.cu says."""
    case = Information()
    moved, items = case.run(kernels), case.samples * case.features
    transpose, unpack = "transpose<float, StoreWord>", "unpack<word64, float>"
    once(moved.counts[transpose, "features", "load"], 4 * items)
    once(moved.counts[transpose, "work", "store"], 8 * items)
    once(moved.counts[unpack, "work", "store"], 16 * items)
    # A word of each sample, and where its class begins: classes are few.
    loaded = moved.counts[unpack, "work", "load"]
    assert (loaded.bytes, loaded.touched_bytes) == ((8 + 4) * items, 8 * items + 4 * case.classes)
