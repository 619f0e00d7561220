"""Prints how long mutual_info takes on this GPU, and how the time is divided among its kernels, as Markdown.

python tools/gpu_mutual_info.py [--samples 50000] [--features 2048] [--classes 1000] [--neighbors 3]
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics

import torch

import csg_ext  # noqa: F401  (loads the operators)

STAGES = {
    "transpose": "load",
    "scale_columns": "load",
    "pack_columns": "load",
    "RadixSort": "sort",
    "unpack": "unpack",
    "among_own_class": "samples among their class",
    "among_all": "samples among all",
    "one_sample": "samples left over",
    "finish": "finish",
}


def milliseconds(run, repeats: int) -> list[float]:
    """Times of single calls, by events on the stream."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def stages(run) -> dict[str, float]:
    """Milliseconds per stage of one call, as the profiler saw the kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, float] = collections.defaultdict(float)
    for event in profile.key_averages():
        stage = next((s for part, s in STAGES.items() if re.search(rf"{part}", event.key)), "other")
        found[stage] += event.self_device_time_total / 1e3
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of mutual_info on this GPU.")
    for name, value in (("samples", 50_000), ("features", 2048), ("classes", 1000), ("neighbors", 3), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.manual_seed(0)
    bits = 57 - a.samples.bit_length()
    psi = torch.special.digamma(torch.arange(a.samples + 1).double()).nan_to_num(neginf=0)
    psi = (psi * 2.0**bits).round().long().cuda()
    labels = torch.randint(0, a.classes, (a.samples,), device="cuda")
    normal = torch.randn(a.samples, a.features, device="cuda")
    noise = torch.randn(a.samples, a.features, device="cuda", dtype=torch.float64)
    inputs = {
        "normal, ties exact": (normal, None),
        "rectified, ties exact": (normal.relu(), None),
        "rectified bfloat16, ties exact": (normal.relu().bfloat16(), None),
        "normal, ties noise": (normal, noise),
    }
    print(f"mutual_info ({a.samples}, {a.features}, {a.classes}), k = {a.neighbors}, {torch.cuda.get_device_name()}\n")
    print("| features | median (ms) | range (ms) | stages (ms) |\n|---|---|---|---|")
    for name, (features, drawn) in inputs.items():

        def run(features=features, drawn=drawn) -> None:
            torch.ops.csg_ext.class_mutual_info(features, labels, a.classes, a.neighbors, drawn, False, psi, bits)

        run()
        times = milliseconds(run, a.repeats)
        parts = ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages(run).items())
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} | {parts} |")


if __name__ == "__main__":
    main()
