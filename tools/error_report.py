"""Errors of every operator beside those of PyTorch's own form: writes docs/numbers.md.

    python tools/error_report.py

Inputs, exact results (80 bits) and PyTorch's forms are those of tests/error_cases.py, which tests/test_numbers.py holds
to its bound. On the CPU, at the best instruction set of the machine.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

import error_cases  # noqa: E402
from error_cases import LONG, LONGEST, MAGNITUDES, SMALL, STEPS, TYPES, Result, errors, pool_case  # noqa: E402

import csg_ext  # noqa: E402
from csg_ext import info  # noqa: E402

PAGE = ROOT / "docs" / "numbers.md"
GATES = ("fp64", "fp32", "fp16", "bf16")
HEAD = ["| case | result | median ulp | PyTorch | mean | PyTorch | largest | PyTorch |", "|---" * 8 + "|"]


def rows(case: str, results: Iterable[Result]) -> Iterable[str]:
    """Lines of a table."""
    for result in results:
        ours, theirs = errors(result.ours, result), errors(result.theirs, result)
        unit = torch.finfo(result.ours.dtype).eps
        cells = [f"{ours.ulp_median:.2f}", f"{theirs.ulp_median:.2f}"]
        cells += [f"{v / unit:.3f}" for v in (ours.mean, theirs.mean, ours.max, theirs.max)]
        yield f"| {case} | {result.name} | {' | '.join(cells)} |"


def maps() -> Iterable[str]:
    """gated_pool forward and backward."""
    for types in TYPES:
        for layout in ("rows", "channels last"):
            for shape in (SMALL, LONG, LONGEST):
                forward = list(pool_case(types, "positive", shape, layout).results())[:2]
                yield from rows(f"{types}, {layout}, {' x '.join(map(str, shape))}", forward)
        for magnitude in MAGNITUDES:
            yield from rows(f"{types}, rows, {magnitude}", list(pool_case(types, magnitude).results())[:2])


def gradients() -> Iterable[str]:
    """Gradients of gated_pool."""
    options = {"": {}, ", project": {"project": True}, ", weights": {"soft": True}, ", max": {"pool": "max"}}
    for types in TYPES:
        for text, option in options.items():
            case = pool_case(types, "positive", (16, 64, 5, 5), upstream="normal", **option)
            yield from rows(f"{types}{text}", (r for r in case.results() if r.name.startswith("gradient")))
        case = pool_case(types, "normal", (16, 64, 5, 5), upstream="normal")
        yield from rows(types, case.results(second=True))


def gates() -> Iterable[str]:
    """The operators of the gate."""
    for dtype in GATES:
        gate = error_cases.draw("normal", (100, 512), TYPES[dtype][0])
        for method in ("scale", "euclidean"):
            yield from rows(dtype, error_cases.project_case(gate, method))
        for name, options in STEPS.items():
            start = torch.rand(100, 512).to(TYPES[dtype][0])
            grads = [error_cases.draw("normal", (100, 512), TYPES[dtype][0]) for _ in range(3)]
            yield from rows(f"{dtype}, {name}", error_cases.step_case(start, grads, options))
        yield from rows(f"{dtype}, 100 x 512", error_cases.norm_cases(torch.rand(100, 512).to(TYPES[dtype][0])))


def information() -> Iterable[str]:
    """Mutual information: beside scikit-learn, and the bins beside PyTorch's operators."""
    for n, width in ((400, 32), (5000, 2)):
        labels = torch.randint(5, (n,))
        for dtype in GATES:
            features = (torch.randn(n, width) + labels[:, None] * torch.rand(width)).to(TYPES[dtype][0])
            results = [error_cases.mutual_info_case(features, labels, 5, 0)]
            results += [error_cases.binned_case(features, labels, 5, 20)]
            yield from rows(f"{dtype} features, {n} x {width}", results)


def instruction_sets() -> Iterable[str]:
    """Which operators give the same bits at every instruction set of this machine, tried on random input."""
    x, labels = torch.randn(16, 128, 7, 7), torch.randint(5, (16,))
    gate, grad = torch.rand(5, 128), torch.randn(5, 128)
    features, classes = torch.randn(2000, 16), torch.randint(20, (2000,))

    def step(method: str) -> torch.Tensor:
        return csg_ext.gate_step_(gate.clone(), grad, torch.ones_like(gate), momentum=0.9, lr=0.1, method=method)

    calls = {
        "`gated_pool` (mean)": lambda: csg_ext.gated_pool(x, gate, labels),
        '`gated_pool(pool="max")`': lambda: csg_ext.gated_pool(x, gate, labels, pool="max"),
        "`project_gate`": lambda: csg_ext.project_gate(grad),
        "`gate_step_`": lambda: torch.cat([step("scale"), step("euclidean")]),
        '`class_mutual_info(ties="exact")`': lambda: csg_ext.class_mutual_info(features, classes, ties="exact"),
        '`class_mutual_info(ties="noise")`': lambda: csg_ext.class_mutual_info(features, classes, ties="noise"),
        "`approximate_class_mutual_info`": lambda: csg_ext.metrics.approximate_class_mutual_info(features, classes),
    }
    best = torch.ops.csg_ext._cpu_level(-1)
    found: dict[bool, list[str]] = {True: [], False: []}
    for name, call in calls.items():
        results = []
        for level in range(best + 1):
            torch.ops.csg_ext._cpu_level(level)
            results.append(call())
        found[all(torch.equal(results[0], other) for other in results[1:])].append(name)
    torch.ops.csg_ext._cpu_level(best)
    yield f"- **Instruction sets**, {best + 1} tried here: the same bits from {', '.join(found[True]) or 'none'};"
    yield f"  others from {', '.join(found[False]) or 'none'}: a vector's lanes are added apart, and the baseline"
    yield "  has no fused multiply-add."


def main() -> None:
    """Writes the page."""
    torch.manual_seed(0)
    lines = [
        "# Numbers: how large the errors are",
        "",
        "Written by `python tools/error_report.py`; do not edit. Inputs, exact results (80-bit numbers) and PyTorch's",
        "forms are in `tests/error_cases.py`; `tests/test_numbers.py` holds every operator, dtype, layout and CPU",
        "instruction set to its bound: the mean error at most PyTorch's and eps / 4, what one rounding adds to it, the",
        "largest at most PyTorch's and eps. Where the mean is larger, within that bound: sums of a few dozen values in",
        "another order. Mutual information has no such allowance: its mean error is at most that of scikit-learn (of",
        "PyTorch's operators for the bins), because sums of integers, the same in any order, are rounded last.",
        "",
        f"date {datetime.date.today().isoformat()}, {info.processor()}, {info.cpu_kernels()}, "
        f"torch {torch.__version__}, csg_ext {csg_ext.__version__}. Not measured on a GPU.",
        "",
        "Median ulp: the median of the errors in units of the last place of the exact result. Mean and largest: the",
        "error over the sum of the magnitudes of what was added, in units of the dtype's eps (one rounding is at most",
        "0.5). The columns without a name are csg_ext's; PyTorch's are those of the eager form in the same dtype (for",
        "mutual information those of scikit-learn; for the bins those of PyTorch's operators, which CUDA uses).",
        "",
        "Magnitudes of x:",
        "",
        *(f"- {name}: {text}" for name, text in MAGNITUDES.items()),
        "",
    ]
    tables = {
        "gated_pool, forward": maps(),
        "gated_pool, gradients": gradients(),
        "The gate's operators": gates(),
        "Mutual information": information(),
    }
    for title, table in tables.items():
        lines += [f"## {title}", "", *HEAD, *table, ""]
    lines += [
        "## Where equality ends",
        "",
        "- **Threads, runs, chunks**: the same bits (`tests/test_threads.py`, `tests/test_mutual_info.py`).",
        "- **Batches**: a sample's result and gradient of `gated_pool` have the same bits in any batch, the operator",
        "  under `torch.compile` those of eager (`tests/test_gated_pool_transforms.py`). The gate's gradient is a sum",
        "  over the batch.",
        *instruction_sets(),
        "- **Layouts**: contiguous and channels-last maps are added in different orders.",
        "- **CPU and CUDA**: sums in different orders; the kernels of mutual information share their arithmetic.",
        "- **More than 2^31 elements**: offsets have 64 bits. `tests/cpp/test_large.cpp` runs the CPU kernels and",
        "  `tests/test_cuda_on_cpu.py` the first and last blocks of the CUDA kernels on maps and gates of more",
        "  elements, whose memory is reserved but not used; `tests/test_mutual_info_cuda_on_cpu.py` has features and",
        "  noise that far apart. Mutual information takes fewer than 2^30 samples.",
        "- **Sums that overflow** on the way to a result that would not: which ones do depends on the order of the",
        "  sum, in PyTorch, too. `l1_density` and `gate_penalty` of half gates are float32.",
        "",
    ]
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
