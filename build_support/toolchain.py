"""What is on this machine to build with: torch, CUDA and its architectures, the C++ compiler, CPUs and memory.

torch is never imported, only its headers and libraries are used, so a build works whatever the interpreter's path is.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
NAMED_ARCHITECTURES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
JOB_BYTES = 1.5 * 2**30  # memory that one compiler process may need


class BuildError(Exception):
    """The build cannot go on; the message is one sentence for the user."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder and what its version.py says."""

    root: Path
    version: str
    cuda: str | None

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: its folder, its version and the architectures that its nvcc compiles for."""

    home: Path
    version: str
    architectures: tuple[str, ...]

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait while another build works in the folder: both would write the same files."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"Linux is needed, got {sys.platform}.")
    import fcntl  # Unix has it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise BuildError(
            f"the build needs a folder to write to, got {folder.absolute()} ({error.strerror}): build a copy."
        ) from None
    with file:  # the lock goes with the process, however it ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"csg-ext: waiting for another build in {folder.resolve()}.", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def torch_folders(environ: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Where torch may be: what this interpreter imports, then the environment that an isolated build hides."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += site.getsitepackages()
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if environ.get(name):
            folders += [f"{environ[name]}/{lib}/{python}/site-packages" for lib in ("lib", "lib64")]
    yield from (Path(folder) / "torch" for folder in folders)


def find_torch(folders: Iterable[Path] | None = None) -> Torch:
    """The first torch that has headers; BuildError when there is none or it is too old."""
    for root in torch_folders() if folders is None else folders:
        version_file = root / "version.py"
        if not version_file.is_file() or not (root / "include").is_dir():
            continue
        facts = _assignments(version_file)
        version = str(facts["__version__"])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
            raise BuildError(f"torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} is needed, got torch {version} in {root.parent}.")
        cuda = facts.get("cuda")
        return Torch(root, version, None if cuda is None else str(cuda))
    raise BuildError(
        f"no torch was found for {sys.executable}: install it first (pip install torch), or activate its environment, "
        "or pass --no-build-isolation."
    )


def _assignments(path: Path) -> dict[str, object]:
    """Constants that a module assigns at its top level, read without running it."""
    found: dict[str, object] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            found[target.id] = value.value
    return found


def find_cuda(environ: Mapping[str, str] = os.environ) -> CudaToolkit | None:
    """The CUDA toolkit of CUDA_HOME or CUDA_PATH, of nvcc on PATH, or of /usr/local/cuda; None when there is none."""
    name = "CUDA_HOME" if environ.get("CUDA_HOME") else "CUDA_PATH"
    given = environ.get(name)
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if given:
        nvcc = Path(given) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise BuildError(f"{name} must be a folder that holds bin/nvcc, got {given}.")
    elif on_path:
        nvcc = Path(on_path)
    else:
        nvcc = Path("/usr/local/cuda/bin/nvcc")
        if not nvcc.is_file():
            return None
    # nvcc on PATH may be a wrapper script: the dry run names the folder that it really works in.
    dry_run = _nvcc(nvcc, "-dryrun", "-E", "-x", "cu", os.devnull).stderr
    top = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
    home = Path(top.group(1)).resolve().parent if top else nvcc.resolve().parent.parent
    release = re.search(r"release (\d+\.\d+)", _nvcc(nvcc, "--version").stdout)
    if release is None:
        raise BuildError(f"{nvcc} --version does not name a release: is it NVIDIA's nvcc?")
    numbers = re.findall(r"compute_(\d+)(\d)\b", _nvcc(nvcc, "--list-gpu-arch").stdout)
    return CudaToolkit(home, release.group(1), tuple(f"{major}.{minor}" for major, minor in numbers))


def _nvcc(nvcc: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{nvcc} does not run ({error.strerror}): is it NVIDIA's nvcc?") from None


def choose_cuda(torch: Torch, environ: Mapping[str, str] = os.environ) -> tuple[CudaToolkit | None, str]:
    """The toolkit to build the CUDA kernels with, or None and the reason why they are left out."""
    wish = environ.get("CSG_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"CSG_EXT_CUDA must be 0, 1 or unset, got {wish!r}.")
    if wish == "0":
        return None, "CSG_EXT_CUDA=0"
    if wish == "" and torch.cuda is None:
        return None, f"torch {torch.version} has no CUDA (CSG_EXT_CUDA=1 builds them all the same)"
    toolkit = find_cuda(environ)
    if toolkit is None:
        if wish == "1":
            raise BuildError("CSG_EXT_CUDA=1 needs nvcc on PATH or CUDA_HOME set to a CUDA toolkit, found neither.")
        return (
            None,
            f"torch {torch.version} has CUDA {torch.cuda} but no nvcc was found: put it on PATH or set CUDA_HOME",
        )
    if wish == "" and torch.cuda is not None and torch.cuda.split(".")[0] != toolkit.version.split(".")[0]:
        return None, f"torch {torch.version} uses CUDA {torch.cuda} but nvcc is of CUDA {toolkit.version}"
    return toolkit, ""


def cuda_architectures(wanted: str | None, supported: Iterable[str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as a list such as ["8.0", "9.0a", "12.0+PTX"]; unset: the default that nvcc knows."""
    supported = tuple(supported)
    wanted = (wanted or "").strip("; ,\t\n")
    if not wanted:
        known = [arch for arch in DEFAULT_ARCHITECTURES if arch in supported]
        if not known:
            raise BuildError(f"nvcc compiles for none of {', '.join(DEFAULT_ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST.")
        return [*known[:-1], f"{known[-1]}+PTX"]
    result: list[str] = []
    for entry in re.split(r"[;,\s]+", wanted):
        name, plus, ptx = entry.partition("+")
        numbers = NAMED_ARCHITECTURES.get(name, name).split(";")
        if not all(re.fullmatch(r"\d+\.\d[af]?", number) for number in numbers) or (plus and ptx != "PTX"):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0, 9.0a, 12.0+PTX or Hopper, got {entry!r}."
            )
        unknown = [number for number in numbers if number.rstrip("af") not in supported]
        if unknown:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must name architectures that nvcc compiles for ({' '.join(supported)}), "
                f"got {unknown[0]}."
            )
        result += numbers[:-1] + [numbers[-1] + plus + ptx]
    return list(dict.fromkeys(result))


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """nvcc's -gencode options of cuda_architectures()."""
    flags = []
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler of CXX, or the first of c++, g++ and clang++ on PATH."""
    if given := words(environ, "CXX"):
        return given
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found:
            return [found]
    raise BuildError("a C++20 compiler is needed and none was found: install one (Debian, Ubuntu: apt install g++).")


def words(environ: Mapping[str, str], name: str) -> list[str]:
    """The words of a variable that holds a command or options."""
    try:
        return shlex.split(environ.get(name, ""))
    except ValueError as error:
        raise BuildError(f"{name} must be words as a shell reads them, got {environ[name]!r} ({error}).") from None


def max_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Compilers to run at once: MAX_JOBS, or the CPUs of this process as far as memory allows."""
    given = environ.get("MAX_JOBS")
    if given:
        if not given.isdigit() or int(given) < 1:
            raise BuildError(f"MAX_JOBS must be a positive integer, got {given!r}.")
        return int(given)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if available:
            jobs = min(jobs, int(int(available.group(1)) * 1024 / JOB_BYTES))
    except OSError:
        pass
    return max(1, jobs)
