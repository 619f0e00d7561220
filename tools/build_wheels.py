"""Builds manylinux wheels that can be given to other people, and checks them.

    python tools/build_wheels.py OUTDIR [--python PYTHON ...] [--cuda] [--twice]

For each Python (default: the one that runs this) the source distribution is unpacked, compiled against the headers of
the torch that this Python has, given its bill of materials (CycloneDX, in .dist-info/sboms), stripped and tagged by
auditwheel, which fails where a library links against something that not every Linux has (torch excepted), and checked
by check_wheel.py. --cuda: the CUDA kernels for every architecture too (needs nvcc). --twice: each wheel is built a
second time and must be the same, byte by byte. All are built in one folder, always of the same name, because nvcc takes
its path into symbols.

Needs requirements/release.txt. Wheels for other Pythons need their interpreters only, as the sources use torch's stable
ABI: pybind11's module is all that differs. `python tools/compatibility.py --wheels OUTDIR PYTHON:TORCH ...` tests what
comes out under other torches and Pythons.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import check_wheel
import wheel_sbom

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from build_support import toolchain  # noqa: E402

BUILD_TOOLS = ("setuptools==84.2.1", "wheel==0.47.0")  # the archive's bytes depend on them
SCRATCH = Path(tempfile.gettempdir()) / "csg_ext_wheels"
EXCLUDED = ("libtorch_cpu.so", "libtorch_cuda.so")  # part of torch, which is installed already


def run(*command: str | Path, **environment: str) -> None:
    """Run a command; end with what it said when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"build_wheels: {' '.join(map(str, command))} failed with exit status {done.returncode}\n{done.stdout}"
        )


def source_date() -> str:
    """The time that archives carry: SOURCE_DATE_EPOCH, or that of the last commit."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return os.environ["SOURCE_DATE_EPOCH"]
    done = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True)
    if done.returncode:
        sys.exit("build_wheels: SOURCE_DATE_EPOCH must be set where the sources are no git checkout.")
    return done.stdout.strip()


def sdist(folder: Path) -> Path:
    """The source distribution."""
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build(archive: Path, python: str, cuda: bool, work: Path, date: str) -> Path:
    """One wheel, made from the source distribution in the folder `work`."""
    run(python, "-m", "venv", work / "venv")
    own = work / "venv" / "bin" / "python"
    run(own, "-m", "pip", "--disable-pip-version-check", "install", *BUILD_TOOLS)
    with tarfile.open(archive) as tar:
        tar.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    torch = toolchain.find_torch()
    toolkit = toolchain.find_cuda() if cuda else None
    headers = work / "headers"  # what the build finds on its path: this Python's torch, which it never imports
    headers.mkdir()
    (headers / "torch").symlink_to(torch.root)
    environment = {"PYTHONPATH": str(headers), "CSG_EXT_CUDA": str(int(cuda)), "SOURCE_DATE_EPOCH": date}
    pip = (own, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", work / "built", source, **environment)
    (wheel,) = (work / "built").glob("*.whl")

    run(own, "-m", "wheel", "unpack", "--dest", work / "unpacked", wheel)
    (content,) = (work / "unpacked").iterdir()
    wheel_sbom.write(content, torch.root, torch.version, None if toolkit is None else toolkit.nvcc, date)
    (work / "packed").mkdir()
    run(own, "-m", "wheel", "pack", "--dest-dir", work / "packed", content, SOURCE_DATE_EPOCH=date)
    (packed,) = (work / "packed").glob("*.whl")

    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    repair = (sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", work / "wheel", packed)
    excluded = [option for name in EXCLUDED for option in ("--exclude", name)]
    run(*repair, *excluded, SOURCE_DATE_EPOCH=date, PATH=tools)
    (result,) = (work / "wheel").glob("*.whl")
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTDIR")
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON", help="interpreters")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument("--twice", action="store_true", help="build again elsewhere and compare")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    date = source_date()
    try:
        SCRATCH.mkdir()
    except FileExistsError:
        sys.exit(f"build_wheels: {SCRATCH} exists: another build uses it, or remove what is left of one.")
    try:
        archive = sdist(SCRATCH / "sdist")
        for python in arguments.python:
            digests = set()
            for _ in range(1 + arguments.twice):
                wheel = build(archive, python, arguments.cuda, SCRATCH / "build", date)
                check_wheel.check(wheel, cuda=arguments.cuda)
                digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
                kept = shutil.copy(wheel, arguments.output)
                shutil.rmtree(SCRATCH / "build")
            if len(digests) > 1:
                sys.exit(f"build_wheels: {kept} was built twice and differs: {', '.join(sorted(digests))}")
            again = ", the same when built again" if arguments.twice else ""
            print(f"{kept}  {Path(kept).stat().st_size / 1e6:.1f} MB{again}  sha256 {digests.pop()}", flush=True)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
