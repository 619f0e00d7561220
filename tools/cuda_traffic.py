"""Writes docs/cuda_traffic.md: what the CUDA kernels load and store, counted while tests/cuda_on_cpu runs them.

    python tools/cuda_traffic.py > docs/cuda_traffic.md

Needs a C++ compiler with a thread sanitizer (GCC), torch and numpy; no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from stand_in import COUNTED, Counts, Moved
from stand_in_kernels import CountedKernels
from traffic_cases import Information, pools, steps

HEAD = f"""# What the CUDA kernels move

Written by `tools/cuda_traffic.py`; no GPU ran. The kernels' sources are compiled by a C++ compiler with a call in front
of every load and store, and run by `tests/cuda_on_cpu`, which looks up which buffer each access touches. Flags:
`{" ".join(COUNTED)}`.

- **bytes**: what the accesses move, over the bytes that the buffer has: 1 is each byte once.
- **sectors**: 32-byte sectors that accesses of warps ask for, over the sectors that the buffer has. The lanes of a warp
  make one access of what they reach by the same instruction, for the n-th time since the warp last met at a barrier or
  an exchange. That is what leaves the multiprocessor if no cache helps; caches serve what is asked for twice.
- **16-byte**: the share of the bytes that moves 16 at a time.
- **all**: sectors that accesses to all buffers ask for (x, gate, labels, results), over those that all buffers have.

Each byte counts as often as the source says, after the optimiser: whether nvcc keeps the 16-byte accesses is in
[cuda_resources.md](cuda_resources.md). Sizes are small, and the number of blocks that fills a GPU is lowered with them,
so that tiles are cut as they are for problems 64 times larger. Speed is not measured here.
"""


def ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def shares(counts: Counts) -> list[str]:
    return [
        ratio(counts.bytes, counts.touched_bytes),
        ratio(counts.sectors, counts.touched_sectors),
        f"{100 * counts.wide_bytes / counts.bytes:.0f} %",
    ]


def everything(moved: Moved) -> str:
    counts = moved.all().values()
    return ratio(sum(c.sectors for c in counts), sum(c.touched_sectors for c in counts))


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def pool_rows(kernels: CountedKernels) -> tuple[list[list[str]], list[list[str]]]:
    """Forward, by x, and backward, by grad_x."""
    forward, backward = [], []
    for case in pools():
        ahead, back = case.run(kernels)
        for rows, moved, counts in (
            (forward, ahead, ahead.of("x", "load")),
            (backward, back, back.of("grad_x", "store")),
        ):
            kernel = next(name for name, buffer, _ in moved.counts if buffer in ("x", "grad_x"))
            row = [str(case), f"`{kernel}`", str(moved.launches), str(counts.touched_bytes), *shares(counts)]
            rows.append([*row, everything(moved)])
    return forward, backward


def step_rows(kernels: CountedKernels) -> Iterable[list[str]]:
    for case in steps():
        for moved in case.run(kernels):
            loads, stores = (
                sum(c.bytes for (_, its_way), c in moved.all().items() if its_way == way) for way in ("load", "store")
            )
            kernel = next(iter(moved.counts))[0]
            whole = case.classes * case.channels * case.dtype.itemsize
            yield [
                str(case),
                f"`{kernel}`",
                str(moved.launches),
                f"{loads / whole:.3f}",
                f"{stores / whole:.3f}",
                everything(moved),
            ]


def information_rows(kernels: CountedKernels) -> Iterable[list[str]]:
    """Bytes per sample and feature."""
    for case in (Information(), Information(noise=True)):
        items = case.samples * case.features
        moved = case.run(kernels)
        for kernel in sorted({name for name, _, _ in moved.counts}):
            parts = {
                way: [c for (name, _, its_way), c in moved.counts.items() if (name, its_way) == (kernel, way)]
                for way in ("load", "store")
            }
            row = [str(case), f"`{kernel}`"]
            for counts in parts.values():
                row += [f"{sum(c.bytes for c in counts) / items:.2f}"]
                row += [f"{32 * sum(c.sectors for c in counts) / items:.2f}"]
            yield row


def main() -> None:
    torch.manual_seed(0)
    kernels = CountedKernels()
    kernels.seed(0)
    forward, backward = pool_rows(kernels)
    columns = ["bytes", "sectors", "16-byte", "all"]
    print(HEAD)
    print("## gated_pool, forward: x is read\n")
    print(table(["case", "kernel", "launches", "bytes of x", *columns], forward))
    print("## gated_pool, backward: grad_x is written, x is not handed over\n")
    print("Both gradients: the second launch is `gate_gradient`, which reads grad_out and what was pooled once more.\n")
    print(table(["case", "kernel", "launches", "bytes of grad_x", *columns], backward))
    print("## gate_step with momentum, and column_max\n")
    print("In multiples of the gate's bytes; the least is 3 read and 2 written, for column_max 1 read. Columns of more")
    print("than 1024 classes are read twice, because registers hold no more.\n")
    print(table(["classes x channels", "kernel", "launches", "loaded", "stored", "all"], step_rows(kernels)))
    print("## mutual_info\n")
    print("Bytes per sample and feature, without the radix sorts (CUB's): what instructions ask for, and 32 bytes for")
    print("each sector that accesses of warps ask for. Most of what the searches ask for is in L1: see the head of")
    print("`csrc/mutual_info/mutual_info_cuda.cu`.\n")
    titles = ["case", "kernel", "loaded", "in sectors", "stored", "in sectors"]
    print(table(titles, information_rows(kernels)), end="")


if __name__ == "__main__":
    main()
