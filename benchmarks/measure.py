"""How the benchmarks measure: pairs in turns, on the CPU or a GPU, and peak memory.

Two candidates are compared as a pair: the operator with a limit, or with a peer. In every turn both are measured one
after the other, who comes first changes from turn to turn, and the median over the turns of the ratio counts: what
disturbs a shared machine for longer than a turn disturbs both.

On a CPU each is called until its caches are its own (WARM calls, not timed) and then timed over several calls: a peer
that writes a map of x's size leaves nothing of x in the cache, and x of the cache's size comes back only over several
calls. Both sides thus find what their own last call left, as in a loop that does nothing else: the limits are at their
best, too. On a GPU events time each call on the device, with the L2 cache flushed before it.

Where other programs take the processors, both of a pair wait in whole time slices and every ratio tends to 1. A turn in
which this process waited for a processor for more than WAITED of its time is therefore measured again, whatever it gave
(Linux tells; elsewhere every turn counts). A comparison with fewer than half of its turns undisturbed says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from csg_ext import _extension, info

ROOT = Path(__file__).resolve().parent.parent
QUICK = os.environ.get("CSG_BENCH_QUICK") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURNS = 7 if QUICK else 15
FEW = 5  # turns that are enough for a peer that takes more than CLEAR times ours in every one of them
CLEAR = 1.3
WARM = 8  # untimed calls before the timed ones; fewer where they would take longer than SECONDS
SECONDS = 0.004  # that the timed calls of one candidate take in one turn, or two calls
WAITED = 0.02  # share of a turn that its threads may have waited for a processor
GPU_CALLS = 10  # timed calls of one candidate in one turn

Call = Callable[[], object]


def steady_memory() -> None:
    """Keep freed memory in the process, as a caching allocator does.

    glibc returns large blocks to the system at once; every later use then pays for page faults, which cost several
    times the writing itself and hide what the operators do.
    """
    try:
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to do


def synchronized(f: Call) -> Call:
    """f, waiting for the GPU where there is one."""
    if DEVICE == "cpu":
        return f

    def run() -> object:
        result = f()
        torch.cuda.synchronize()
        return result

    return run


def _timed_on_cpu(f: Call) -> float:
    start = time.perf_counter()
    f()
    seconds = time.perf_counter() - start
    for _ in range(min(WARM, max(1, int(SECONDS / seconds))) - 1):
        start = time.perf_counter()
        f()
        seconds = time.perf_counter() - start
    calls = max(2, min(200, int(SECONDS / seconds)))
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def _timed_on_gpu(f: Call) -> float:
    f()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(GPU_CALLS)]
    torch.cuda._sleep(8_000_000)  # some 5 ms, in which the host queues the calls: its gaps are not the device's time
    for start, end in events:
        _flush().zero_()
        start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3


def timed(f: Call) -> float:
    """Seconds per call of f: after calls that fill the caches on a CPU; on a GPU the device's time, L2 cache cold."""
    return _timed_on_cpu(f) if DEVICE == "cpu" else _timed_on_gpu(f)


def timed_once(f: Call) -> float:
    """Seconds of one call of f, for calls that take long and were made before, such as training steps."""
    start = time.perf_counter()
    synchronized(f)()
    return time.perf_counter() - start


def waited() -> float:
    """Seconds that the threads of this process were ready to run but had no processor."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):  # the thread has ended, or the kernel does not count
            total += int(path.read_text().split()[1])
    return total * 1e-9


def _pairs(ours: Call, other: Call, clock: Callable[[Call], float], turns: int) -> Iterator[tuple[float, float, bool]]:
    """Seconds per call of both, turn by turn, and whether the turn was undisturbed; who comes first changes."""
    for attempt in range(4 * turns):
        start, waited_before = time.perf_counter(), waited()
        if attempt % 2:
            other_time, ours_time = clock(other), clock(ours)
        else:
            ours_time, other_time = clock(ours), clock(other)
        yield ours_time, other_time, waited() - waited_before <= WAITED * (time.perf_counter() - start)


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the median, by the percentiles of the medians of bootstrap resamples."""
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def compared(
    ours: Call, other: Call, clock: Callable[[Call], float] = timed, turns: int = TURNS, few: int | None = FEW
) -> dict:
    """other beside ours: medians of the seconds per call and of the ratio other / ours, with the ratio's interval.

    few: turns after which a peer that was clearly slower in each of them needs no more; None: always all turns.
    """
    all_turns, quiet, enough = [], [], False
    for turn in _pairs(ours, other, clock, turns):
        all_turns.append(turn)
        quiet += [turn] if turn[2] else []
        enough = len(quiet) == turns or (len(quiet) == few and min(o / t for t, o, _ in quiet) > CLEAR)
        if enough:
            break
    counted = quiet or all_turns
    ratios = [o / t for t, o, _ in counted]
    return {
        "ours": statistics.median(t for t, _, _ in counted),
        "seconds": statistics.median(o for _, o, _ in counted),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
        "turns": len(counted),
        "disturbed": not enough and 2 * len(quiet) < turns,
    }


def peak_bytes(f: Call) -> int:
    """The most bytes of tensors that one call of f holds at a time, beyond those there before."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def device_name() -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else info.processor()


def results_name() -> str:
    """What the results of this device are called: cpu_amd_epyc, cuda_nvidia_h200."""
    return "_".join([DEVICE, *re.findall("[a-z0-9]+", device_name().lower().replace("(r)", ""))])


def machine() -> dict[str, str]:
    """What was measured on what."""
    commit = os.environ.get("COMMIT", "")[:7]
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = commit or subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name() + ("" if DEVICE == "cuda" else f", {info.cpu_kernels()} kernels"),
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "csg_ext": _extension.BUILD["version"],
        "commit": commit or "unknown",
    }
