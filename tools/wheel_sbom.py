"""The bill of materials of a wheel (CycloneDX 1.6, where PEP 770 puts it): what it holds beside our own sources."""

from __future__ import annotations

import datetime
import email
import hashlib
import re
import subprocess
import uuid
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def _component(name: str, version: str, licence: str, text: str, kind: ComponentType, **more: object) -> Component:
    known = {"id": licence} if licence in ("Apache-2.0", "BSD-3-Clause", "MIT") else {"name": licence}
    return Component(
        name=name,
        version=version,
        licenses=[DisjunctiveLicense(**known)],
        description=text,
        type=kind,
        bom_ref=f"{name}@{version}",
        **more,
    )


def _pypi(name: str, version: str) -> PackageURL:
    return PackageURL("pypi", name=name, version=version)


def _macro(header: Path, name: str) -> str:
    found = re.search(rf"#define\s+{name}\s+(\w+)", header.read_text())
    if found is None:
        raise SystemExit(f"wheel_sbom: {header.name} does not define {name}")
    return found.group(1)


def components(package: Path, torch: Path, torch_version: str, nvcc: Path | None) -> list[Component]:
    """What others wrote and the wheel holds: headers compiled in, libraries linked statically, images."""
    library = ComponentType.LIBRARY
    common = torch / "include" / "pybind11" / "detail" / "common.h"
    pybind11 = ".".join(_macro(common, f"PYBIND11_VERSION_{part}") for part in ("MAJOR", "MINOR", "MICRO"))
    headers = "headers, compiled in"
    found = [
        _component("torch", torch_version, "BSD-3-Clause", headers, library, purl=_pypi("torch", torch_version)),
        _component("pybind11", pybind11, "BSD-3-Clause", headers, library, purl=_pypi("pybind11", pybind11)),
    ]
    images = package / "data" / "fashion_mnist_14k.npz"
    digest = hashlib.sha256(images.read_bytes()).hexdigest()
    text = f"csg_ext/data/{images.name}, a subset of 14,000 images"
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)]
    found.append(_component("Fashion-MNIST", "2017", "MIT", text, ComponentType.DATA, hashes=hashes))
    if nvcc is not None:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        cuda = re.search(r"V(\d+\.\d+\.\d+)", said).group(1)
        cub = int(_macro(next(nvcc.parents[1].rglob("cub/version.cuh")), "CUB_VERSION"))
        version = f"{cub // 100000}.{cub // 100 % 1000}.{cub % 100}"
        eula = "NVIDIA CUDA Toolkit EULA"
        found += [
            _component("CUDA runtime", cuda, eula, "cudart, linked statically", library),
            _component("CUB", version, "BSD-3-Clause", "headers of CCCL, compiled in", library),
        ]
    return found


def write(content: Path, torch: Path, torch_version: str, nvcc: Path | None, date: str) -> None:
    """Puts .dist-info/sboms/csg-ext.cdx.json into an unpacked wheel.

    content: the folder of the unpacked wheel. torch: the folder whose headers it was compiled with. nvcc: the compiler
    of its CUDA kernels, if any. date: seconds since 1970 that stand for the time of the build.
    """
    (metadata,) = content.glob("*.dist-info/METADATA")
    facts = email.message_from_string(metadata.read_text())
    name, version = facts["Name"], facts["Version"]
    bom = Bom(
        components=components(content / "csg_ext", torch, torch_version, nvcc),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{name}=={version}#{date}{' cuda' if nvcc else ''}"),
    )
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(int(date), datetime.timezone.utc)
    bom.metadata.component = _component(
        name, version, facts["License-Expression"], facts["Summary"], ComponentType.LIBRARY, purl=_pypi(name, version)
    )
    bom.register_dependency(bom.metadata.component, bom.components)
    folder = metadata.parent / "sboms"
    folder.mkdir()
    (folder / f"{name}.cdx.json").write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n")
