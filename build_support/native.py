"""Compiles csrc/ into the three libraries of csg_ext: what is built, with which flags, against which torch and CUDA.

  _C.so      operator schemas and CPU kernels    csrc/ext.cpp, csrc/*/*.cpp             torch's stable ABI
  _cuda.so   CUDA kernels                        csrc/*/*.cu, csrc/<op>/<op>.cpp again  torch's stable ABI
  _bind.*    build facts, a Python module        csrc/bind.cpp                          pybind11, no torch

Each object keeps its command and its dependencies beside it and is compiled again when either has changed.

Environment: CSG_EXT_CUDA=0|1 (default: when torch and the machine have CUDA), TORCH_CUDA_ARCH_LIST, CUDA_HOME,
MAX_JOBS, CSG_EXT_WERROR=1, CXX, CPPFLAGS, CXXFLAGS, LDFLAGS.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support.toolchain import (
    MIN_TORCH,
    BuildError,
    CudaToolkit,
    Torch,
    alone,
    choose_cuda,
    cuda_architectures,
    find_compiler,
    find_cuda,
    find_torch,
    gencode_flags,
    max_jobs,
    words,
)

TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"  # TORCH_TARGET_VERSION: oldest torch to run with


@dataclass(frozen=True)
class Object:
    """One source to compile; `command` lacks the source, the output and the dependency file."""

    source: Path
    output: Path
    command: tuple[str, ...]

    def compile(self, env: Mapping[str, str]) -> bool:
        """Compile unless the output is newer than all that it was made from and came from the same command."""
        depfile, commandfile = self.output.with_suffix(".d"), self.output.with_suffix(".cmd")
        line = [*self.command, "-MD", "-MF", str(depfile), "-c", str(self.source), "-o", str(self.output)]
        if _unchanged(self.output, commandfile, line, depfile):
            return False
        _make(line, self.output, commandfile, env, f"compiling {self.source}")
        return True


@dataclass(frozen=True)
class Library:
    """One shared library and how it is linked: command, objects, then `libraries`."""

    output: Path
    objects: tuple[Object, ...]
    command: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    def link(self, env: Mapping[str, str]) -> bool:
        """Link unless the library is newer than its objects and came from the same command."""
        commandfile = self.output.with_suffix(".cmd")
        objects = [str(item.output) for item in self.objects]
        line = [*self.command, "-o", str(self.output), *objects, *self.libraries]
        if _unchanged(self.output, commandfile, line, inputs=objects):
            return False
        _make(line, self.output, commandfile, env, f"linking {self.output.name}")
        return True


def _unchanged(
    output: Path, commandfile: Path, line: list[str], depfile: Path | None = None, inputs: Iterable[str] = ()
) -> bool:
    try:
        if commandfile.read_text() != shlex.join(line):
            return False
        if depfile is not None:
            listed = depfile.read_text().replace("\\\n", " ").partition(": ")[2].strip()
            inputs = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", listed)]
        made = output.stat().st_mtime_ns
        return all(os.stat(name).st_mtime_ns <= made for name in inputs)
    except OSError:
        return False


def _make(line: list[str], output: Path, commandfile: Path, env: Mapping[str, str], what: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    commandfile.unlink(missing_ok=True)
    started = time.time_ns()
    run(line, env, what)
    os.utime(output, ns=(started, started))  # a file edited meanwhile counts as newer
    commandfile.write_text(shlex.join(line))


def run(command: list[str], env: Mapping[str, str], what: str) -> None:
    """Run a tool; print what it says, and raise with the command when it fails."""
    try:
        done = subprocess.run(command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{what} failed: {command[0]} does not run ({error.strerror}).") from None
    if done.stdout.strip():
        say(done.stdout.rstrip())
    if done.returncode != 0:
        raise BuildError(f"{what} failed with exit status {done.returncode}: {shlex.join(command)}")


def say(text: str) -> None:
    """Print at once: pip shows it with -v, and all of it when the build fails."""
    print(f"csg-ext: {text}" if "\n" not in text else text, flush=True)


@dataclass(frozen=True)
class Host:
    """The C++ compiler and its options."""

    compiler: tuple[str, ...]
    optimise: tuple[str, ...]  # with what CPPFLAGS and CXXFLAGS add
    hide: tuple[str, ...]
    warn: tuple[str, ...]
    link_extra: tuple[str, ...]

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Host:
        strict = ["-Werror"] if environ.get("CSG_EXT_WERROR", "0") != "0" else []
        extra = words(environ, "CPPFLAGS") + words(environ, "CXXFLAGS")
        return cls(
            compiler=tuple(find_compiler(environ)),
            optimise=("-O3", "-DNDEBUG", *extra, "-std=c++20"),  # last: some environments' CXXFLAGS name an older one
            hide=("-fPIC", "-fvisibility=hidden"),
            warn=("-Wall", "-Wextra", *strict),
            link_extra=tuple(words(environ, "LDFLAGS")),
        )

    @property
    def compile(self) -> tuple[str, ...]:
        return (*self.compiler, *self.optimise, *self.hide, "-fvisibility-inlines-hidden", *self.warn)

    @property
    def link(self) -> tuple[str, ...]:
        return (*self.compiler, "-shared", *self.optimise, *self.link_extra)


def sources(root: Path) -> dict[str, list[Path]]:
    """The sources of each library, relative to the project's root."""
    csrc = root / "csrc"
    operators = sorted(csrc.glob("*/*.cpp"))
    bindings = [path for path in operators if path.stem == path.parent.name]  # compiled for the CPU and again for CUDA
    found = {
        "_C": [csrc / "ext.cpp", *operators],
        "_cuda": [*sorted(csrc.glob("*/*.cu")), *bindings],
        "_bind": [csrc / "bind.cpp"],
    }
    return {name: [path.relative_to(root) for path in paths] for name, paths in found.items()}


def _object(source: Path, folder: Path, command: Iterable[str]) -> Object:
    return Object(source, folder / ("_".join(source.parts[1:]) + ".o"), tuple(command))


def _stable_abi(torch: Torch) -> list[str]:
    # torch's checks carry their headers' paths: those of the machine that built are nobody's business.
    return [
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        "-isystem",
        str(torch.include),
        f"-ffile-prefix-map={torch.root}=torch",
    ]


def cpu_library(torch: Torch, host: Host, paths: Iterable[Path], build_dir: Path) -> Library:
    """_C.so: operator schemas and CPU kernels."""
    command = [*host.compile, *_stable_abi(torch)]
    return Library(
        build_dir / "_C.so",
        tuple(_object(path, build_dir / "_C", command) for path in paths),
        host.link,
        ("-Wl,--no-as-needed", f"-L{torch.lib}", "-ltorch_cpu"),
    )


def bind_library(torch: Torch, host: Host, paths: Iterable[Path], build_dir: Path) -> Library:
    """_bind: a Python module. pybind11's headers are those that torch ships: a build requirement would lie in a folder
    that pip deletes afterwards, and every build would compile anew."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise BuildError(
            f"{include} lacks Python.h: install Python's headers (Debian, Ubuntu: apt install python3-dev)."
        )
    command = [*host.compile, "-isystem", str(torch.include), "-isystem", include, "-I", str(build_dir / "facts")]
    return Library(
        build_dir / f"_bind{sysconfig.get_config_var('EXT_SUFFIX')}",
        tuple(_object(path, build_dir / "_bind", command) for path in paths),
        host.link,
    )


def cuda_library(
    torch: Torch, host: Host, toolkit: CudaToolkit, architectures: Iterable[str], paths: Iterable[Path], build_dir: Path
) -> Library:
    """_cuda.so: CUDA kernels, and the bindings compiled for CUDA.

    The CUDA runtime is linked statically: nothing to find at load time, and any minor version of torch's CUDA will do.
    """
    define = ["-DUSE_CUDA", "-DCSG_CUDA"]
    nvcc = [str(toolkit.nvcc)]
    if "CXX" in os.environ:
        # nvcc takes a compiler without the launcher before it and the options behind it.
        nvcc += ["-ccbin", [word for word in host.compiler if not word.startswith("-")][-1]]
    strict = ["-Werror", "all-warnings"] if "-Werror" in host.warn else []
    device = [*nvcc, "-std=c++20", "-O3", "-DNDEBUG", *gencode_flags(architectures), *define, *strict]
    device.append(f"-Xcompiler={','.join([*host.hide, *host.warn])}")
    binding = [*host.compile, *_stable_abi(torch), *define, "-isystem", str(toolkit.home / "include")]
    stub = _stand_in_for_torch_cuda(torch, host, build_dir)

    def command(path: Path) -> list[str]:
        # Without a seed nvcc takes its process number into the names of symbols: no two builds would be the same.
        return [*device, f"-frandom-seed={path.name}"] if path.suffix == ".cu" else binding

    return Library(
        build_dir / "_cuda.so",
        tuple(_object(path, build_dir / "_cuda", command(path)) for path in paths),
        # No device link: there is nothing to link, and it would leave its command in the library.
        (*nvcc, "-shared", "-nodlink", "-cudart", "static", "-Xlinker=--exclude-libs,ALL"),
        ("-Xlinker=--no-as-needed", f"-L{torch.lib}", *stub, "-ltorch_cuda", "-ltorch_cpu"),
    )


def _stand_in_for_torch_cuda(torch: Torch, host: Host, build_dir: Path) -> list[str]:
    """Where torch has no CUDA, an empty library to link with: at run time a torch with CUDA has the real one."""
    if (torch.lib / "libtorch_cuda.so").exists():
        return []
    stub = build_dir / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(parents=True, exist_ok=True)
    command = [*host.compiler, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", str(stub)]
    run(command, os.environ, "making a stand-in for libtorch_cuda.so")
    return [f"-L{stub.parent}"]


def build(root: Path, build_dir: Path, version: str) -> dict[str, Path]:
    """Build what can be built and return {file name inside csg_ext: library}. Runs with `root` as current folder."""
    with alone(build_dir):
        return _build(root, build_dir, version)


def _build(root: Path, build_dir: Path, version: str) -> dict[str, Path]:
    started = time.time()
    torch = find_torch()
    host = Host.from_environ()
    toolkit, reason = choose_cuda(torch)
    facts = build_facts(version, torch, host, toolkit, reason)
    write_if_changed(build_dir / "facts" / "build_facts.h", facts_header(facts))
    paths = sources(root)
    jobs = max_jobs()
    environ = dict(os.environ)
    libraries = [cpu_library(torch, host, paths["_C"], build_dir), bind_library(torch, host, paths["_bind"], build_dir)]
    if toolkit is None:
        say(f"building CPU kernels for torch {torch.version}; no CUDA kernels: {reason}.")
    else:
        architectures = facts["cuda_architectures"].split()
        say(
            f"building CPU and CUDA kernels for torch {torch.version}, nvcc {toolkit.version}, "
            f"{facts['cuda_architectures']}."
        )
        libraries.append(cuda_library(torch, host, toolkit, architectures, paths["_cuda"], build_dir))
        # nvcc compiles the architectures of one file side by side where CPUs would be idle.
        files = sum(path.suffix == ".cu" for path in paths["_cuda"])
        threads = max(1, min(len(architectures), jobs // max(1, files)))
        environ["NVCC_APPEND_FLAGS"] = f"{environ.get('NVCC_APPEND_FLAGS', '')} --threads {threads}".strip()

    todo = [item for library in libraries for item in library.objects]
    todo.sort(key=lambda item: (item.source.suffix != ".cu", "_cpu" not in item.source.stem))  # the slow ones first
    pool = ThreadPoolExecutor(jobs)
    try:
        compiled = sum(pool.map(lambda item: item.compile(environ), todo))
        linked = sum(pool.map(lambda library: library.link(environ), libraries))
    finally:
        pool.shutdown(cancel_futures=True)
    say(f"compiled {compiled} of {len(todo)} files, linked {linked} libraries in {time.time() - started:.0f} s.")
    return {library.output.name: library.output for library in libraries}


def build_facts(version: str, torch: Torch, host: Host, toolkit: CudaToolkit | None, reason: str) -> dict[str, str]:
    """What csg_ext._bind.build_info() will return; `reason` says why there is no toolkit."""
    try:
        compiler = subprocess.run([*host.compiler, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        command = shlex.join(host.compiler)
        raise BuildError(f"CXX must name a C++ compiler, got {command!r} ({error.strerror}).") from None
    facts = {
        "version": version,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.version,
        "torch_minimum": ".".join(map(str, MIN_TORCH)),
        "torch_cuda": torch.cuda or "",
        "cuda": "",
        "cuda_architectures": "",
        "cuda_left_out": reason,
        "compiler": compiler.partition("\n")[0].strip(),
        "flags": shlex.join(host.optimise),
    }
    if toolkit is not None:
        architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), toolkit.architectures)
        facts |= {"cuda": toolkit.version, "cuda_architectures": " ".join(architectures)}
    return facts


def facts_header(facts: Mapping[str, str]) -> str:
    """The facts as a C++ header: CSG_BUILD_FACTS initialises an array of pairs."""
    rows = "".join(f"  {{{json.dumps(key)}, {json.dumps(value)}}}, \\\n" for key, value in facts.items())
    return f"// What this build is made of (generated).\n#pragma once\n#define CSG_BUILD_FACTS \\\n{rows}\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, but leave its time alone when it holds that text already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def install(built: Mapping[str, Path], package: Path) -> None:
    """Copy the libraries into the package folder and remove those of an earlier build that this one leaves out."""
    package.mkdir(parents=True, exist_ok=True)
    if "_cuda.so" not in built:
        (package / "_cuda.so").unlink(missing_ok=True)
    for name, library in built.items():
        target = package / name
        if target.is_file() and target.stat().st_mtime_ns == library.stat().st_mtime_ns:
            continue
        # A new file, moved into place: a process that has the old one loaded keeps it.
        fresh = target.with_name(f".{name}.new")
        shutil.copy2(library, fresh)
        os.replace(fresh, target)


def write_cmake_settings(folder: Path, version: str, cuda: bool) -> None:
    """Write folder/torch.cmake and folder/build_facts.h, which CMakeLists.txt reads."""
    torch = find_torch()
    toolkit = find_cuda() if cuda else None
    facts = build_facts(version, torch, Host.from_environ(), toolkit, "CSG_CUDA=OFF")
    settings = {
        "CSG_TORCH_INCLUDE": str(torch.include),
        "CSG_TORCH_LIB": str(torch.lib),
        "CSG_TORCH_TARGET_VERSION": TARGET_VERSION,
        "CSG_CUDA_HOME": "" if toolkit is None else str(toolkit.home),
        "CSG_CUDA_GENCODE": ";".join(gencode_flags(facts["cuda_architectures"].split())),
    }
    lines = ["# Written by build_support.native."] + [f'set({key} "{value}")' for key, value in settings.items()]
    write_if_changed(folder / "torch.cmake", "\n".join(lines) + "\n")
    write_if_changed(folder / "build_facts.h", facts_header(facts))


if __name__ == "__main__":  # CMakeLists.txt calls it: FOLDER VERSION [cuda], with CXX set
    try:
        write_cmake_settings(Path(sys.argv[1]), sys.argv[2], cuda="cuda" in sys.argv[3:])
    except BuildError as error:
        sys.exit(f"csg-ext: {error}")
