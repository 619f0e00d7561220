"""tools/cuda_report.py: what it reads from cuobjdump's output, and what it calls a fault. Needs no CUDA."""

from __future__ import annotations

import collections
from pathlib import Path

import cuda_report
import pytest

RESOURCES = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function pool_rows:
  REG:61 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function fill_rows:
  REG:255 STACK:128 SHARED:0 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : pool_rows
        /*0090*/              @!P0 LDG.E.128.CONSTANT R8, [R2.64] ;   /* 0x0000000402088981 */
        /*00a0*/                   LDG.E.64 R4, [R2.64] ;             /* 0x0000000402047981 */
        /*00b0*/                   STG.E [R4.64], R7 ;                /* 0x0000000704007986 */
\t\tFunction : fill_rows
        /*00b0*/                   STL.64 [R1], R8 ;                  /* 0x0000000801007387 */
        /*00c0*/                   STG.E.128 [R4.64], R8 ;            /* 0x0000000804007986 */
Fatbin ptx code:
================
arch = sm_120
"""


def kernels(**changes: dict[str, int]) -> dict[str, collections.Counter[str]]:
    """A library without faults, but for the changes."""
    good = {
        "pool_tiles<float, avg>": {"LDG": 4},
        "pool_rows<float, avg>": {"LDG": 4},
        "pool_channels<float, avg, 4>": {"LDG": 4},
        "pool_channels<float, avg, 1>": {},
        "fill_rows<float, avg>": {"STG": 2},
        "fill_channels<float, avg, 4>": {"STG": 1},
        "step_columns<float, 4>": {},
    }
    return {name: collections.Counter(REG=32, **counts) for name, counts in (good | changes).items()}


def test_reads_what_cuobjdump_prints() -> None:
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    cuda_report.resources(cuda_report.by_architecture(RESOURCES)["sm_80"], found)
    cuda_report.accesses(cuda_report.by_architecture(CODE)["sm_80"], found)
    assert found["pool_rows"] == {"REG": 61, "STACK": 0, "LOCAL": 0, "LDG": 1}
    assert found["fill_rows"] == {"REG": 255, "STACK": 128, "LOCAL": 0, "STL": 1, "STG": 1}


def test_faults() -> None:
    assert cuda_report.faults({"sm_80": kernels()}) == []
    assert cuda_report.faults({"sm_80": kernels(), "sm_90": kernels(**{"fill_rows<float, avg>": {"LDG": 3}})}) == [
        "fill_rows<float, avg>, sm_90: no STG of 16 bytes"
    ]
    for name in ("pool_tiles<float, avg>", "pool_rows<float, avg>", "pool_channels<float, avg, 4>"):
        assert cuda_report.faults({"sm_80": kernels(**{name: {}})}) == [f"{name}, sm_80: no LDG of 16 bytes"]
    spilled = kernels(**{"step_columns<float, 4>": {"STACK": 128, "LDL": 3, "STL": 4}})
    assert cuda_report.faults({"sm_80": spilled}) == [
        "step_columns<float, 4>, sm_80: 128 bytes of stack, 7 accesses to it"
    ]
    without = {name: counts for name, counts in kernels().items() if not name.startswith("pool_tiles")}
    assert cuda_report.faults({"sm_80": without}) == ["pool_tiles, sm_80: not in the library"]


def test_a_missing_tool_and_a_missing_library_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="cuobjdump-of-nowhere must be on PATH, in CUDA_HOME/bin or installed by pip"):
        cuda_report.find("cuobjdump-of-nowhere")
    monkeypatch.setattr("sys.argv", ["cuda_report.py", str(tmp_path / "none.so")])
    with pytest.raises(SystemExit):
        cuda_report.main()
    assert "library must be a built _cuda.so" in capsys.readouterr().err
