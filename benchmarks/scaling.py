"""What a run of any size costs in memory and traffic: the tables of docs/scaling.md, computed.

    python benchmarks/scaling.py [--gpus 64] [--classes 21841] [--filters 4096] [--batch 256] [--samples 14000000]

Nothing is measured here. Bytes follow from shapes; times are bytes over the rates given as options, whose defaults are
the makers' figures for an H100 (HBM) and a 400 Gbit/s network card per GPU: lower bounds, not predictions.
"""

from __future__ import annotations

import argparse

GIGA = 1e9


def megabytes(count: float) -> str:
    """Bytes in the unit that reads best."""
    return f"{count / GIGA:,.2f} GB" if count >= GIGA else f"{count / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1e3:,.3f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def gate(a: argparse.Namespace) -> str:
    """Memory and time of the gate on one GPU, replicated and split by columns."""
    replicated = a.classes * a.filters * 4
    split = a.classes * -(-a.filters // a.gpus) * 4
    rows = []
    for name, bytes_of in (("on every GPU", replicated), ("columns split over all GPUs", split)):
        step = 3 * bytes_of  # gate read and written, gradient read; no momentum
        rows.append(
            (name, megabytes(bytes_of), megabytes(2 * bytes_of), megabytes(step), milliseconds(step / a.memory_rate))
        )
    return table(("the gate", "size", "with its gradient", "gate_step moves", "at least"), rows)


def traffic(a: argparse.Namespace) -> str:
    """Bytes that a GPU sends and receives for the gate in one step, by scheme."""
    dense = a.classes * a.filters * 4
    rows_local = a.batch * a.filters * 4
    n = a.gpus
    schemes = (
        ("all-reduce of the dense gradient (DDP, what is built)", 2 * (n - 1) / n * dense),
        ("all-gather of the batch's rows and labels", (n - 1) * rows_local),
        ("columns split: rows by all-to-all, forward and back", 2 * (n - 1) / n * rows_local),
    )
    return table(
        ("scheme", "bytes in and out, per GPU", "at least"),
        [(name, megabytes(count), milliseconds(count / a.network_rate)) for name, count in schemes],
    )


def step(a: argparse.Namespace) -> str:
    """Bytes that the fused operator moves on one GPU in one step (x in a half type, S positions)."""
    x = a.batch * a.filters * a.positions * 2
    small = a.batch * a.filters * 2
    dense = a.classes * a.filters * 4
    parts = (
        ("forward: x read, out and pooled written, rows read", x + 4 * small),
        ("backward: grad_x written", x + 2 * small),
        ("backward: the gate's gradient written (dense)", dense + 2 * small),
        ("gate_step", 3 * dense),
        ("the (N, K, H, W) mask of the released form, written and read", 2 * x),
    )
    return table(
        ("part", "bytes", "at least"),
        [(name, megabytes(count), milliseconds(count / a.memory_rate)) for name, count in parts],
    )


def mutual_information(a: argparse.Namespace) -> str:
    """Memory and exchange of the mutual information of all samples, every GPU with its share of the filters."""
    features = a.samples * a.filters * 4
    share = -(-a.filters // a.gpus)
    rows = (
        ("features, fp32, all GPUs together", megabytes(features)),
        ("features of one GPU's samples (all filters)", megabytes(features / a.gpus)),
        ("features of one GPU's filters (all samples)", megabytes(a.samples * share * 4)),
        ("exchange between the two, per GPU", megabytes(features / a.gpus * (a.gpus - 1) / a.gpus)),
        ("gathering everything on every GPU instead", megabytes(features * (a.gpus - 1) / a.gpus)),
        ("the matrix (K, C), float64", megabytes(a.filters * a.classes * 8)),
        ("values to be sorted per GPU", f"{a.samples * share / GIGA:,.2f} billion"),
    )
    return table(("mutual information", ""), list(rows))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--classes", type=int, default=21841, help="C")
    parser.add_argument("--filters", type=int, default=4096, help="K")
    parser.add_argument("--positions", type=int, default=49, help="S, positions of the feature map")
    parser.add_argument("--batch", type=int, default=256, help="samples per GPU and step")
    parser.add_argument("--samples", type=int, default=14_000_000, help="N")
    parser.add_argument("--memory-rate", type=float, default=3.35e12, help="bytes per second of a GPU's memory")
    parser.add_argument("--network-rate", type=float, default=50e9, help="bytes per second between GPUs, per GPU")
    arguments = parser.parse_args()
    for part in (gate, step, traffic, mutual_information):
        print(part(arguments))


if __name__ == "__main__":
    main()
