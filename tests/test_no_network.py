"""No command uses the network: all of them run where internet sockets and look-ups are refused and written down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USE = """
import ctypes, socket, urllib.request
assert not ctypes.CDLL(None).gethostbyname(b"localhost")
for call in (lambda: socket.socket(), lambda: socket.getaddrinfo("localhost", 80),
             lambda: urllib.request.urlopen("http://127.0.0.1:9")):
    try:
        call()
    except OSError:
        continue
    raise SystemExit("the network can be used")
"""
COMMANDS = """
import sys
import csg_ext
from csg_ext import cli
data, out = sys.argv[1:]
for command in (
    ["train", "--data", data, "--output", f"{out}/run", "--epochs", "1", "--batch-size", "200", "--device", "cpu",
     "--threads", "1", "--precision", "fp32", "--low-share", "0"],
    ["evaluate", f"{out}/run", "--output", f"{out}/evaluate", "--device", "cpu"],
    ["mis", f"{out}/run/csg", "--output", f"{out}/mis", "--device", "cpu"],
    ["report", f"{out}/run"],
    ["info"],
):
    assert cli.main(command) == 0, command
"""


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """The environment of processes that have no network; it reaches their children too."""
    library = tmp_path / "no_network.so"
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-o", library, HERE / "no_network.cpp", "-ldl"], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "NO_NETWORK_LOG": str(tmp_path / "log")}


def test_the_guard_refuses_and_writes_down(offline, tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {USE!r}], check=True)"
    for code in (USE, child):
        (tmp_path / "log").unlink(missing_ok=True)
        subprocess.run([sys.executable, "-c", code], env=offline, check=True)
        assert set((tmp_path / "log").read_text().split()) == {"socket", "getaddrinfo", "gethostbyname"}


def test_commands_use_no_network(offline, digits, tmp_path):
    """Importing, training, evaluating, measuring and reporting; children included."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, digits, tmp_path], env=offline, cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "mis" / "mis.json").is_file()
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()
