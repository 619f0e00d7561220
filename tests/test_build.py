"""The build: how torch, CUDA and the sources are found, what is compiled, what it says when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from build_support import backend, native, toolchain  # noqa: E402

NVCC = """#!/bin/sh
case "$*" in
  *dryrun*) echo '#$ _HERE_={home}/bin' >&2 ;;
  *list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
  *version*) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
esac
"""


@pytest.fixture
def fake_torch(tmp_path):
    """Writes the parts of a torch that the build looks at."""

    def write(version="2.13.0", cuda=None, headers=True):
        root = tmp_path / "torch"
        (root / "include").mkdir(parents=True) if headers else root.mkdir()
        text = f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
        (root / "version.py").write_text(text)
        return root

    return write


@pytest.fixture
def fake_nvcc(tmp_path):
    """Writes a toolkit, and beside it a wrapper of its nvcc as some machines have on PATH."""

    def write(version="13.0"):
        home, wrapper = tmp_path / "cuda", tmp_path / "bin" / "nvcc"
        for path in (home / "bin" / "nvcc", wrapper):
            path.parent.mkdir(parents=True)
            path.write_text(NVCC.format(home=home, version=version))
            path.chmod(0o755)
        return home, {"PATH": f"{wrapper.parent}:/usr/bin:/bin"}

    return write


def run_python(python, code, **environ):
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    # What an isolated build sees: nothing that is installed.
    hide = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    code = f"{hide}; sys.path.append({str(ROOT)!r})\n{code}"
    return subprocess.run([python, "-c", code], env=clean | environ, capture_output=True, text=True)


def test_an_isolated_build_finds_the_environments_torch():
    done = run_python(sys.executable, "from build_support.toolchain import *; print(find_torch().root)")
    assert done.stdout.strip() == str(Path(torch.__file__).parent), done.stderr
    assert toolchain.find_torch().version == torch.__version__
    assert toolchain.find_torch().cuda == torch.version.cuda


def test_an_activated_environment_is_searched(tmp_path):
    site = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    assert site / "torch" in toolchain.torch_folders({"VIRTUAL_ENV": str(tmp_path)})
    assert site / "torch" in toolchain.torch_folders({"CONDA_PREFIX": str(tmp_path)})
    assert site / "torch" not in toolchain.torch_folders({})


def test_without_torch_the_build_stops_with_one_sentence(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    done = run_python(
        tmp_path / "bare" / "bin" / "python",
        "from build_support import toolchain\ntry: toolchain.find_torch()\nexcept toolchain.BuildError as e: print(e)",
        HOME=str(tmp_path),
        PYTHONUSERBASE=str(tmp_path),
    )
    assert done.stdout.startswith("no torch was found for") and "pip install torch" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_backend_reports_a_missing_torch(monkeypatch):
    monkeypatch.setattr(toolchain, "torch_folders", lambda: iter(()))
    for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        with pytest.raises(SystemExit, match="^csg-ext: no torch was found"):
            hook()


def test_backend_reports_an_old_setuptools(monkeypatch, tmp_path):
    monkeypatch.setattr(backend.setuptools, "__version__", "65.5.0")
    for hook in (backend.prepare_metadata_for_build_wheel, backend.prepare_metadata_for_build_editable):
        with pytest.raises(SystemExit, match="^csg-ext: setuptools >= 77 is needed, got 65.5.0"):
            hook(str(tmp_path))


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused_before_anything_is_written(monkeypatch, tmp_path, platform):
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(toolchain.BuildError, match=f"^Linux is needed, got {platform}"):
        native.build(tmp_path, tmp_path / "build", "0.1")
    assert not (tmp_path / "build").exists()


def test_a_torch_that_is_too_old_or_has_no_headers(fake_torch, tmp_path):
    with pytest.raises(toolchain.BuildError, match=r"torch >= 2\.10 is needed, got torch 2\.9\.1"):
        toolchain.find_torch([fake_torch("2.9.1")])
    (tmp_path / "torch" / "include").rmdir()
    with pytest.raises(toolchain.BuildError, match="no torch was found"):
        toolchain.find_torch([tmp_path / "torch"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["8.0", "8.6", "9.0", "12.0+PTX"]),  # of the default, what this nvcc knows; PTX of the newest
        ("", ["8.0", "8.6", "9.0", "12.0+PTX"]),
        (" ;", ["8.0", "8.6", "9.0", "12.0+PTX"]),
        ("8.0;9.0a;12.0+PTX", ["8.0", "9.0a", "12.0+PTX"]),
        (" 8.6, 9.0 ; 8.6", ["8.6", "9.0"]),
        ("Ampere Hopper+PTX", ["8.0", "8.6", "9.0+PTX"]),
    ],
)
def test_architecture_list(wanted, expected):
    assert toolchain.cuda_architectures(wanted, ["7.5", "8.0", "8.6", "9.0", "12.0"]) == expected


@pytest.mark.parametrize("wanted", ["80", "sm_80", "8.0+ptx", "8.0;Pascals", "9.0b"])
def test_architecture_list_that_makes_no_sense(wanted):
    with pytest.raises(toolchain.BuildError, match="TORCH_CUDA_ARCH_LIST must hold entries such as"):
        toolchain.cuda_architectures(wanted, ["8.0"])


def test_an_architecture_that_nvcc_does_not_know():
    with pytest.raises(toolchain.BuildError, match=r"that nvcc compiles for \(8\.0 9\.0\), got 5\.0\.$"):
        toolchain.cuda_architectures("9.0a;5.0", ["8.0", "9.0"])


def test_default_architectures_unknown_to_nvcc():
    with pytest.raises(toolchain.BuildError, match="nvcc compiles for none of 8.0"):
        toolchain.cuda_architectures(None, ["5.0"])


def test_gencode_flags():
    assert toolchain.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_a_wrapper_on_path_leads_to_the_toolkit(fake_nvcc):
    home, environ = fake_nvcc()
    expected = toolchain.CudaToolkit(home, "13.0", ("7.5", "8.0", "9.0"))
    assert toolchain.find_cuda(environ) == expected
    assert toolchain.find_cuda({**environ, "CUDA_HOME": str(home)}) == expected
    with pytest.raises(toolchain.BuildError, match="CUDA_HOME must be a folder that holds bin/nvcc, got /nowhere"):
        toolchain.find_cuda({**environ, "CUDA_HOME": "/nowhere"})
    with pytest.raises(toolchain.BuildError, match="CUDA_PATH must be a folder that holds bin/nvcc, got /nowhere"):
        toolchain.find_cuda({**environ, "CUDA_PATH": "/nowhere"})
    (home / "bin" / "nvcc").chmod(0o644)
    with pytest.raises(toolchain.BuildError, match="bin/nvcc does not run .*: is it NVIDIA's nvcc"):
        toolchain.find_cuda({**environ, "CUDA_HOME": str(home)})


def test_when_cuda_kernels_are_built(fake_torch, fake_nvcc, monkeypatch):
    _, environ = fake_nvcc("12.8")
    cpu, cuda12, cuda13 = (toolchain.Torch(Path("torch"), "2.13.0", cuda) for cuda in (None, "12.6", "13.0"))

    def choice(torch, **more):
        toolkit, reason = toolchain.choose_cuda(torch, {**environ, **more})
        assert (toolkit is None) == bool(reason)
        return reason

    assert choice(cuda12) == ""  # another minor version will do
    assert "uses CUDA 13.0 but nvcc is of CUDA 12.8" in choice(cuda13)
    assert "has no CUDA" in choice(cpu)
    assert choice(cpu, CSG_EXT_CUDA="1") == "" and choice(cuda13, CSG_EXT_CUDA="1") == ""
    assert choice(cuda12, CSG_EXT_CUDA="0") == "CSG_EXT_CUDA=0"
    with pytest.raises(toolchain.BuildError, match="CSG_EXT_CUDA must be 0, 1 or unset, got 'yes'"):
        choice(cuda12, CSG_EXT_CUDA="yes")
    monkeypatch.setattr(toolchain, "find_cuda", lambda environ: None)
    assert "no nvcc was found" in choice(cuda12)
    with pytest.raises(toolchain.BuildError, match="CSG_EXT_CUDA=1 needs nvcc"):
        choice(cpu, CSG_EXT_CUDA="1")


def test_jobs():
    assert toolchain.max_jobs({"MAX_JOBS": "3"}) == 3
    assert 1 <= toolchain.max_jobs({}) <= (os.cpu_count() or 1)
    for wrong in ("0", "-1", "many"):
        with pytest.raises(toolchain.BuildError, match="MAX_JOBS must be a positive integer"):
            toolchain.max_jobs({"MAX_JOBS": wrong})


def test_every_source_is_built():
    found = native.sources(ROOT)
    on_disk = {path.relative_to(ROOT) for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")}
    assert set().union(*found.values()) == on_disk
    bindings = set(found["_C"]) & set(found["_cuda"])
    assert bindings == {path for path in on_disk if path.stem == path.parent.name}
    assert any(path.suffix == ".cu" for path in found["_cuda"])


def test_no_compiler():
    with pytest.raises(toolchain.BuildError, match="a C\\+\\+20 compiler is needed and none was found"):
        toolchain.find_compiler({"PATH": "/nowhere"})
    assert toolchain.find_compiler({"CXX": "ccache g++"}) == ["ccache", "g++"]


def test_a_compiler_that_does_not_run(fake_torch):
    host = native.Host.from_environ({"CXX": "/nowhere/g++ -m64"})
    with pytest.raises(toolchain.BuildError, match="CXX must name a C\\+\\+ compiler, got '/nowhere/g\\+\\+ -m64'"):
        native.build_facts("1.0", toolchain.find_torch([fake_torch()]), host, None, "")


def test_options_from_the_environment():
    host = native.Host.from_environ({"CXX": "g++", "CPPFLAGS": "-DA", "CXXFLAGS": "-O2 -std=c++17"})
    assert host.optimise == ("-O3", "-DNDEBUG", "-DA", "-O2", "-std=c++17", "-std=c++20")
    with pytest.raises(toolchain.BuildError, match="LDFLAGS must be words as a shell reads them"):
        native.Host.from_environ({"CXX": "g++", "LDFLAGS": "-Wl,'"})


def test_nvcc_gets_the_compiler_alone(fake_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    torch, toolkit = toolchain.find_torch([fake_torch()]), toolchain.CudaToolkit(tmp_path, "13.0", ("8.0",))
    monkeypatch.setattr(native, "run", lambda *arguments: None)  # no stand-in for torch's library is needed
    library = native.cuda_library(torch, native.Host.from_environ(), toolkit, ["8.0"], [Path("csrc/a.cu")], tmp_path)
    for command in (library.command, library.objects[0].command):
        assert command[command.index("-ccbin") + 1] == "g++"


def test_only_what_changed_is_compiled_again(tmp_path):
    source, header = tmp_path / "a.cpp", tmp_path / "with space.inl"
    source.write_text('#include "with space.inl"\nint f() { return value; }\n')
    header.write_text("constexpr int value = 1;\n")
    command = (*toolchain.find_compiler(), "-std=c++20")
    item = native.Object(source, tmp_path / "out" / "a.o", command)
    assert item.compile(os.environ)
    assert not item.compile(os.environ)
    header.write_text("constexpr int value = 2;\n")
    assert item.compile(os.environ)
    assert not item.compile(os.environ)
    other = native.Object(source, item.output, (*command, "-O1"))
    assert other.compile(os.environ)
    header.write_text("constexpr int value = ;\n")
    with pytest.raises(toolchain.BuildError, match="compiling .*a.cpp failed with exit status 1"):
        other.compile(os.environ)
    header.write_text("constexpr int value = 2;\n")
    assert other.compile(os.environ)  # what failed is never taken for done


def test_two_builds_in_one_folder_wait_for_each_other(tmp_path):
    code = "import sys, pathlib\nfrom build_support import toolchain\n"
    code += "with toolchain.alone(pathlib.Path(sys.argv[1])): print('built')"
    command = [sys.executable, "-c", code, tmp_path]
    with toolchain.alone(tmp_path):
        other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == f"csg-ext: waiting for another build in {tmp_path}.\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "built\n"
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "built\n"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "build").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^csg-ext: the build needs a folder to write to, got .*/build \(File exists"):
        backend.build_wheel(str(tmp_path))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cmake_takes_its_own_list_of_architectures(tmp_path, fake_nvcc):
    home, environ = fake_nvcc()

    def configure(architectures):
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
        command += ["-DCSG_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
        done = subprocess.run(command, env=os.environ | {"CUDA_HOME": str(home)}, capture_output=True, text=True)
        return " ".join(done.stderr.split())

    configure("80-real;90")  # ends where the stand-in for nvcc compiles nothing
    expected = toolchain.gencode_flags(["8.0", "9.0+PTX"])
    assert f'CSG_CUDA_GENCODE "{";".join(expected)}"' in (tmp_path / "build/facts/torch.cmake").read_text()
    assert "must hold entries such as 90, 90-real or 90a-real, got native." in configure("native")


def test_libraries_that_are_left_out_are_removed(tmp_path):
    package, built = tmp_path / "package", tmp_path / "built"
    built.mkdir()
    for name in ("_C.so", "_cuda.so"):
        (built / name).write_text(name)
    native.install({name: built / name for name in ("_C.so", "_cuda.so")}, package)
    assert sorted(path.name for path in package.iterdir()) == ["_C.so", "_cuda.so"]
    (built / "_C.so").write_text("new")
    native.install({"_C.so": built / "_C.so"}, package)
    assert [path.read_text() for path in package.iterdir()] == ["new"]


def test_facts_become_a_header():
    text = native.facts_header({"compiler": 'g++ "x"', "flags": "a\\b"})
    assert '{"compiler", "g++ \\"x\\""}' in text and '{"flags", "a\\\\b"}' in text
