"""csg_ext.info and csg_ext._extension: the facts hold, and each mismatch between build and runtime is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csg_ext import _bind, _extension, info


def test_facts_describe_this_process():
    facts = info.collect()
    assert facts["runs"]["torch"] == torch.__version__
    assert facts["runs"]["cpu_threads"] == torch.get_num_threads()
    assert facts["built"]["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "-std=c++20" in facts["built"]["flags"]
    has_cuda_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("csg_ext::column_max", "CUDA")
    assert (facts["cuda_error"] is None) == has_cuda_kernels
    assert json.loads(json.dumps(facts)) == facts


def test_cpu_features_agree_with_the_kernel():
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))).split())
    aliases = {"neon": "asimd"}
    for name, present in _bind.cpu_features().items():
        assert present == (aliases.get(name, name) in flags), name


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_cpu_level_can_be_lowered(level):
    code = "from csg_ext import info; print(info.collect()['runs']['cpu_kernels'])"
    env = {**os.environ, "CSG_EXT_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    wanted = ["baseline", "avx2"].index(level)
    assert done.stdout.strip() == info._CPU_KERNELS[min(wanted, torch.ops.csg_ext._cpu_level(-1))]


def test_command_line(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "kernels" in text
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), ["8.0", "9.0", "12.0+PTX"], "sm_90"),
        ((8, 9), ["8.0", "8.6", "9.0"], "sm_86"),  # machine code runs on later minor versions
        ((8, 0), ["8.6", "9.0"], None),  # but not on earlier ones
        ((10, 3), ["8.0", "9.0a", "10.0"], "sm_100"),
        ((10, 3), ["10.0a"], None),  # architecture-specific: that one only
        ((10, 3), ["10.0f"], "sm_100f"),
        ((10, 0), ["10.0a"], "sm_100a"),
        ((9, 0), ["8.0", "8.6+PTX"], "compute_86"),
        ((9, 0), ["8.0", "9.0+PTX"], "sm_90"),
        ((12, 1), ["9.0a+PTX"], None),
        ((7, 5), ["8.0+PTX"], None),
    ],
)
def test_kernels_for_a_device(capability, built, expected):
    assert _extension.kernels_for(capability, built) == expected


@pytest.mark.parametrize(
    ("torch_cuda", "build", "words"),
    [
        (None, {"cuda": "13.0"}, "has no CUDA"),
        ("13.0", {"cuda": "", "cuda_left_out": "no nvcc"}, "built without CUDA kernels (no nvcc)"),
        ("12.8", {"cuda": "13.0"}, "built with CUDA 13.0 but torch uses CUDA 12.8"),
    ],
)
def test_why_there_are_no_cuda_kernels(monkeypatch, torch_cuda, build, words):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(_extension, "BUILD", build)
    message = _extension._load_cuda()
    assert words in message and message.count(". ") == 0


def test_a_library_that_does_not_load_is_named(monkeypatch, tmp_path):
    (tmp_path / "_cuda.so").write_text("not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "BUILD", {"cuda": "13.0"})
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    assert "do not load" in _extension._load_cuda() and str(tmp_path) in _extension._load_cuda()


def test_torch_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10, got torch 2\.9\.1"):
        _extension._load_cpu()
