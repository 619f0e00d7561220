"""Instructions that the CPU kernels take, counted by valgrind (the same in every run), beside the committed counts.

    tools/instruction_counts.py build/cmake/tests/instruction_counts            compare
    tools/instruction_counts.py build/cmake/tests/instruction_counts --update   write the baseline

Exit status 1: a case takes 5 % more instructions than the baseline says, or is not in it. 2: no comparison is possible.
Counts depend on compiler, options, C library and valgrind, so a baseline made with others is refused. AVX-512 is not
counted: valgrind does not run it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BASELINE = Path(__file__).resolve().parent.parent / "benchmarks" / "instruction_counts.json"
LEVELS = ("baseline", "avx2")
LIMIT = 1.05


class NotComparable(Exception):
    """One sentence that says why, and what to do about it."""


def output_of(*command: str | Path, **environ: str) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True, env={**os.environ, **environ}).stdout


def conditions(driver: Path) -> dict[str, str]:
    """What decides the counts beside the sources."""
    if shutil.which("valgrind") is None:
        raise NotComparable("valgrind is needed and was not found: install it (Debian, Ubuntu: apt install valgrind).")
    made = dict(line.split(maxsplit=1) for line in output_of(driver, "--build").splitlines())
    return {**made, "valgrind": output_of("valgrind", "--version").strip().removeprefix("valgrind-")}


def count(driver: Path, level: str) -> dict[str, int]:
    """Instructions of every case at one instruction-set level."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "counts"
        names = output_of(
            "valgrind", "--tool=callgrind", "--toggle-collect=measured", "--dump-after=measured", "--combine-dumps=yes",
            f"--callgrind-out-file={dump}", driver, CSG_EXT_CPU_LEVEL=level, LD_BIND_NOW="1",
        ).splitlines()  # fmt: skip
        counts = [int(number) for number in re.findall(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)]
    if names[0] != level:
        raise NotComparable(f"the processor must run {level}, got {names[0]}: count on one with AVX2.")
    cases, rest = names[1:], counts[len(names) - 1 :]
    if len(counts) < len(cases) or any(rest) or 0 in counts[: len(cases)]:
        raise NotComparable(f"valgrind must write a count for each of the {len(cases)} cases, got {counts}.")
    return {f"{level}: {case}": number for case, number in zip(cases, counts, strict=False)}


def compare(counts: dict[str, int], baseline: dict[str, int]) -> int:
    """Prints every case; returns the exit status."""
    print(f"{'baseline':>10} {'now':>10}  ratio")
    for case, now in counts.items():
        before = baseline.get(case)
        print(f"{before or '-':>10} {now:>10}  " + (f"{now / before:5.3f}  {case}" if before else f"    -  {case}"))
    new, gone = counts.keys() - baseline.keys(), baseline.keys() - counts.keys()
    ratio = {case: counts[case] / baseline[case] for case in counts if case in baseline}
    slower = {case for case in ratio if ratio[case] > LIMIT}
    faster = {case for case in ratio if ratio[case] < 1 / LIMIT}
    print(f"{len(slower)} cases slower by more than 5 %, {len(faster)} faster, {len(ratio)} compared.")
    for case in sorted(slower, key=lambda case: -ratio[case]):
        print(f"SLOWER {ratio[case]:.3f}  {case}")
    if faster or new or gone:
        print(
            f"Update the baseline (make instruction-baseline): {len(faster)} faster, {len(new)} new, {len(gone)} gone."
        )
    return 1 if slower or new or gone else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("driver", type=Path, help="the executable instruction_counts that CMake builds")
    parser.add_argument("--update", action="store_true", help=f"write benchmarks/{BASELINE.name} instead of comparing")
    options = parser.parse_args()
    driver = options.driver.resolve()
    try:
        here = conditions(driver)
        if not options.update:
            stored = json.loads(BASELINE.read_text())
            for key, value in here.items():
                if stored["conditions"][key] != value:
                    raise NotComparable(
                        f"the baseline was counted with {key} {stored['conditions'][key]!r}, here it is {value!r}: run "
                        "`make instruction-baseline` on the commit to compare with first."
                    )
        counts = {case: number for level in LEVELS for case, number in count(driver, level).items()}
    except NotComparable as reason:
        print(f"instruction counts: {reason}", file=sys.stderr)
        return 2
    if not options.update:
        return compare(counts, stored["counts"])
    BASELINE.write_text(json.dumps({"conditions": here, "counts": counts}, indent=1) + "\n")
    print(f"{BASELINE.name}: {len(counts)} counts with {', '.join(f'{k} {v}' for k, v in here.items())}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
