"""Fuzz targets for every file that the package reads: variants of real files give a result or one sentence of ours.

`python tests/fuzz_files.py TARGET -max_total_time=60` goes after new lines of the package with atheris (libFuzzer,
whose options it takes); with `--runs N [SEED]` it tries N drawn variants; `--list` names the targets. `--all
-max_total_time=60` follows all targets, one after the other, goes on after a finding, and prints the table of inputs.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
GUIDED = __name__ == "__main__" and not {"--runs", "--list", "--all"} & set(sys.argv)
followed: Any = contextlib.nullcontext()
if GUIDED:
    import atheris

    followed = atheris.instrument_imports(include=["csg_ext"])
with followed:
    import numpy as np
    import torch
    from fuzz_mutate import mutate
    from torch import nn

    from csg_ext.analysis import detectors
    from csg_ext.analysis.masks import read_arrays
    from csg_ext.data import load_images
    from csg_ext.data.images import ImageData
    from csg_ext.mis import read_features
    from csg_ext.report.collect import read_history, read_summary
    from csg_ext.runs import load_source, read_checkpoint, read_run, training_statistics
    from csg_ext.training import load_weights
    from csg_ext.training.compare import read_result
    from csg_ext.training.config import TrainConfig

CORPUS = Path(__file__).parent / "corpus"  # files that once failed, by target
SECONDS = 3  # that reading a file of some kB may take
MEMORY = 2**31  # bytes that it may take


@dataclass
class Target:
    """A file: its name below the folder that is read, variants of it that are whole, what reads it, files beside it."""

    file: str
    seeds: list[bytes]
    read: Callable[[Path], Any]
    beside: dict[str, bytes]


def saved(write: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    content = io.BytesIO()
    write(content, *args, **options)
    return content.getvalue()


def numpy_targets(rng: np.random.Generator) -> dict[str, Target]:
    labels = np.arange(12) % 3
    images = rng.integers(0, 256, (12, 1, 4, 4), np.uint8)
    sets = {"train_images": images, "train_labels": labels, "test_images": images[:6], "test_labels": labels[:6]}
    features = {"features": rng.random((12, 3)), "labels": labels}
    masks = {"test_masks": images[:, 0] > 99, "train_masks": images[:, 0] // 128}
    named = sets | {"classes": np.array(["a", "b", "c"])}

    def archives(arrays: dict[str, Any]) -> list[bytes]:
        return [saved(np.savez, **arrays), saved(np.savez_compressed, **arrays)]

    def arrays(values: np.ndarray) -> list[bytes]:
        return [saved(np.save, values), saved(np.save, np.asfortranarray(values.astype(">f4")))]

    return {
        "images.npz": Target("x.npz", archives(named) + archives(sets), lambda f: load_images(f / "x.npz"), {}),
        "features.npz": Target("x.npz", archives(features), lambda f: read_features(f / "x.npz"), {}),
        "masks.npz": Target("x.npz", archives(masks), lambda f: read_arrays(f / "x.npz"), {}),
        "masks.npy": Target("x.npy", arrays(masks["test_masks"]), lambda f: read_arrays(f / "x.npy"), {}),
        "features.npy": Target(
            "x.npy",
            arrays(features["features"]),
            lambda f: read_features(f / "x.npy", f / "y.npy"),
            {"y.npy": saved(np.save, labels)},
        ),
        "labels.npy": Target(
            "y.npy",
            arrays(labels),
            lambda f: read_features(f / "x.npz", f / "y.npy"),
            {"x.npz": saved(np.savez, **features)},
        ),
        "arrays.npz": Target("std/arrays.npz", archives(features), lambda f: read_features(f / "std"), {}),
    }


def data_set_targets(rng: np.random.Generator) -> dict[str, Target]:
    images, labels = rng.integers(0, 256, (6, 4, 4), np.uint8), (np.arange(6) % 3).astype(np.uint8)

    def idx(array: np.ndarray) -> bytes:
        shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
        return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()

    mnist = {f"{p}-{k}": idx(a) for p in ("train", "t10k") for k, a in (("images-idx3-ubyte", images),)}
    mnist |= {f"{p}-labels-idx1-ubyte": idx(labels) for p in ("train", "t10k")}
    batch = {"data": rng.integers(0, 256, (2, 3072), np.uint8), "labels": [0, 1]}
    batches = [pickle.dumps(batch, protocol) for protocol in (2, 4)]
    meta = [pickle.dumps({"label_names": ["a", "b"]}, protocol) for protocol in (2, 4)]
    cifar = {f"data_batch_{i}": batches[0] for i in range(1, 6)} | {"test_batch": batches[0], "batches.meta": meta[0]}

    def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
        return {key: content for key, content in files.items() if key != name}

    return {
        "idx": Target("train-images-idx3-ubyte", [idx(images)], load_images, without(mnist, "train-images-idx3-ubyte")),
        "idx-labels": Target(
            "t10k-labels-idx1-ubyte", [idx(labels)], load_images, without(mnist, "t10k-labels-idx1-ubyte")
        ),
        "idx.gz": Target(
            "train-images-idx3-ubyte.gz",
            [gzip.compress(idx(images))],
            load_images,
            without(mnist, "train-images-idx3-ubyte"),
        ),
        "cifar": Target("data_batch_3", batches, load_images, without(cifar, "data_batch_3")),
        "cifar-meta": Target("batches.meta", meta, load_images, without(cifar, "batches.meta")),
    }


def image_targets(rng: np.random.Generator) -> dict[str, Target]:
    from PIL import Image

    def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
        shape = (6, 7, 3) if mode == "RGB" else (6, 7)
        return saved(Image.fromarray(rng.integers(0, 256, shape, np.uint8)).convert(mode).save, kind, **options)

    def shard(label: str) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for number in range(4):
                text = json.dumps({"label": number % 2}) if label == "json" else str(number % 2)
                for name, member in (("png", picture("png")), (label, text.encode())):
                    info = tarfile.TarInfo(f"a/{number}.{name}")
                    info.size = len(member)
                    archive.addfile(info, io.BytesIO(member))
        return content.getvalue()

    pictures = [picture(kind) for kind in ("png", "jpeg", "bmp", "gif", "ppm", "tiff", "webp")]
    pictures += [picture("png", "L"), picture("png", "1"), picture("tiff", "L", compression="tiff_lzw")]
    beside = {f"{c}/{n}.png": picture("png") for c in "ab" for n in "01"}
    names = [b'["x", "y"]', b'{"x": 0, "y": 1}']
    return {
        "image": Target("a/x.png", pictures, lambda f: load_images(f, strict=True), beside),
        "shard": Target("train-0.tar", [shard("cls"), shard("json")], load_images, {"test-0.tar": shard("cls")}),
        "classes.json": Target("classes.json", names, load_images, {"train-0.tar": shard("cls")}),
    }


def weight_targets(rng: np.random.Generator) -> dict[str, Target]:
    from safetensors.numpy import save

    model = nn.Linear(3, 2)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    features = {"features": rng.random((8, 3)), "labels": np.arange(8) % 2}
    config = TrainConfig().as_dict()
    source = {"data": None, "classes": None, "test_share": 0.2, "split_seed": 0}
    run = {"config": config, "source": source, "sha256": "0" * 64, "statistics": [[0.3], [0.2]]}
    run["images"] = {"classes": ["a", "b"], "shape": [1, 28, 28]}
    prefixed = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    extra = {"arm": "std", "config": config, "history": [{"epoch": 1}], "sums": torch.zeros(5), "step_count": 3}
    checkpoints = [
        saved(lambda file: torch.save({"state_dict": prefixed, "csg_ext": extra, "epoch": 1}, file)),
        saved(lambda file: torch.save(model.state_dict(), file)),
        saved(lambda file: torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)),
    ]
    fitted = [
        detectors.Forest(
            np.array([0]),
            np.array([1, 0, 0]),
            np.array([2, 0, 0]),
            np.array([1, 0, 0]),
            np.array([0.5, 0, 0]),
            np.array([0.5, 0.1, 0.9]),
            threshold=0.5,
        ),  # fmt: skip
        detectors.Mahalanobis(rng.random((2, 3)), np.eye(3), threshold=1.0),
        detectors.Softmax(threshold=0.1),
    ]
    places = [Path(tempfile.gettempdir()) / f"csg_ext_fuzz_{os.getpid()}_{i}.safetensors" for i in range(len(fitted))]
    for detector, place in zip(fitted, places, strict=True):
        detector.save(place)
    stored = [place.read_bytes() for place in places]
    for place in places:
        place.unlink()
    data = ImageData("x", *(np.zeros((2, 1, 4, 4), np.uint8), np.arange(2)) * 2, ["a", "b"])

    def run_of(folder: Path) -> Any:
        found = read_run(folder / "run.json")
        stored = read_checkpoint(folder / "std" / "model.safetensors")
        with contextlib.suppress(FileNotFoundError):
            load_source(found["source"])
        return training_statistics(stored, data)

    return {
        "features.safetensors": Target(
            "x.safetensors", [save(features)], lambda f: read_features(f / "x.safetensors"), {}
        ),
        "weights.safetensors": Target(
            "x.safetensors", [save(state)], lambda f: load_weights(model, f / "x.safetensors"), {}
        ),
        "model.safetensors": Target(
            "std/model.safetensors",
            [save(state)],
            lambda f: read_checkpoint(f / "std/model.safetensors"),
            {"run.json": json.dumps(run).encode()},
        ),
        "detector": Target("x.safetensors", stored, lambda f: detectors.load_detector(f / "x.safetensors"), {}),
        "checkpoint": Target("x.ckpt", checkpoints[:1], lambda f: read_checkpoint(f / "x.ckpt"), {}),
        "weights": Target("x.pt", checkpoints, lambda f: load_weights(model, f / "x.pt"), {}),
        "run.json": Target(
            "run.json", [json.dumps(run).encode()], run_of, {"std/model.safetensors": save(state), "csg/x": b""}
        ),
    }


def run_targets(rng: np.random.Generator) -> dict[str, Target]:
    arm = {
        "arm": "csg", "accuracy": 0.9, "mis": 0.2, "mis_ceiling": 0.3, "mis_bound": 0.4, "dead_filters": 1,
        "l1_density": 0.5, "class_agreement": 0.6, "one_hot_accuracy": 0.7, "train_seconds": 1.5, "steps": 9,
        "precision": "fp32", "device": "cpu", "threads": 1,
    }  # fmt: skip
    data = {"name": "x", "train": 9, "test": 4, "shape": [1, 4, 4], "classes": ["a", "b"], "sha256": "0", "skipped": []}
    summary = {
        "std": arm, "csg": arm, "gap_closed": None, "seed": 0, "config": TrainConfig().as_dict(), "data": data,
        "seconds": 2.5, "finished": "2026-01-01T00:00:00Z", "machine": "x", "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    row = {
        "epoch": 1, "step": 3, "seconds": 0.1, "lr": 0.1, "gate_lr": 2.0, "loss_std": 1.5, "loss_csg": None,
        "train_accuracy": 0.5, "l1_density": None,
    }  # fmt: skip
    features = saved(np.savez, features=rng.random((4, 2)), labels=np.arange(4) % 2)
    return {
        "summary.json": Target(
            "summary.json", [json.dumps(summary).encode()], lambda f: read_summary(f / "summary.json"), {}
        ),
        "metrics.json": Target(
            "metrics.json", [json.dumps([row, row]).encode()], lambda f: read_history(f / "metrics.json"), {}
        ),
        "result.json": Target(
            "result.json", [json.dumps(arm).encode()], lambda f: read_result(f / "result.json", "csg"), {}
        ),
        "mis-summary.json": Target(
            "summary.json",
            [json.dumps(summary).encode()],
            lambda f: read_features(f / "std"),
            {"std/arrays.npz": features},
        ),
    }


def targets() -> dict[str, Target]:
    rng = np.random.default_rng(7)
    return {
        name: target
        for make in (numpy_targets, data_set_targets, image_targets, weight_targets, run_targets)
        for name, target in make(rng).items()
    }


# ---- what must hold --------------------------------------------------------------------------------------------------

_watched: list[str] | None = None
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "os.mkdir", "os.rename",
    "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.", "ctypes.dlopen",
)  # fmt: skip


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not str(args[0]).endswith(".pyc") and ".pyc." not in str(args[0]):  # of a module imported meanwhile
            _watched.append(f"{event} {args[0]!r} to write")
    elif event.startswith(_FORBIDDEN) and "__pycache__" not in str(args[:1]) and ".pyc" not in str(args[:1]):
        _watched.append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


class Hang(BaseException):
    """Reading took longer than SECONDS."""


@contextlib.contextmanager
def guarded() -> Iterator[list[str]]:
    """Limits of time and memory; yields what else was done that reading a file does not need."""
    global _watched

    def stop(*_: object) -> None:
        raise Hang

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.getsignal(signal.SIGALRM)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    if not GUIDED:  # libFuzzer has a timer of its own
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    done = _watched = []
    try:
        yield done
    finally:
        _watched = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if not GUIDED:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def check(target: Target, folder: Path, content: bytes) -> bool:
    """Reads the target with that content in its folder: True if it gave a result, False for one sentence; asserts."""
    (folder / target.file).write_bytes(content)
    with guarded() as done:
        try:
            target.read(folder)
            read = True
        except (OSError, ValueError) as error:
            assert type(error) in (ValueError, OSError, FileNotFoundError), f"{type(error).__name__}: {error}"
            text = str(error)
            assert 10 < len(text) < 1000 and "\n" not in text, f"no sentence: {text[:2000]!r}"
            assert str(folder) in text or text.startswith(("data: ", "masks: ", "x: ", "CIFAR-10: ")), (
                f"names no file: {text}"
            )
            read = False
    assert not done, f"beside reading the file: {done}"
    return read


def place(target: Target, folder: Path) -> None:
    """Makes the folder with the files beside the target."""
    for name in (*target.beside, target.file):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in target.beside.items():
        (folder / name).write_bytes(content)


def drawn(name: str, target: Target, scratch: Path, runs: int, seed: int) -> dict[bool, int]:
    """Tries seeds, corpus and `runs` variants; how many of these gave a result (True) and how many a sentence."""
    rng, counts, folder = random.Random(seed), {True: 0, False: 0}, scratch / "x"
    place(target, folder)
    for content in target.seeds:
        assert check(target, folder, content), "a whole file gave no result"
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    for file in sorted((CORPUS / name).glob("*")):
        check(target, folder, file.read_bytes())
    for _ in range(runs):
        content = rng.choice(target.seeds)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            content = mutate(content, rng, target.seeds)
        try:
            counts[check(target, folder, content)] += 1
        except BaseException:
            failed = Path(tempfile.gettempdir()) / f"csg_ext_{name}.failed"
            failed.write_bytes(content)
            print(f"the file that failed: {failed}", file=sys.stderr)
            raise
    assert sorted(path for path in scratch.rglob("*") if path.is_file()) == files
    return counts


def guided(target: Target, scratch: Path, options: list[str]) -> None:
    """libFuzzer, which ends this process."""
    folder, corpus = scratch / "x", scratch / "corpus"
    place(target, folder)
    corpus.mkdir()
    for i, content in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(content)

    def custom_mutator(content: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return mutate(content, rng, target.seeds)[:longest]
        return atheris.Mutate(content, longest)

    def one(content: bytes) -> None:
        check(target, folder, content)

    failed = f"-artifact_prefix={tempfile.gettempdir()}/csg_ext_"
    limits = ["-timeout=10", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], str(corpus), failed, *limits, *options], one, custom_mutator=custom_mutator)
    atheris.Fuzz()


def every(names: list[str], options: list[str]) -> None:
    """Follows each target in a process of its own; prints how many inputs it had, ends with 1 after any finding."""
    print("| target | inputs | seconds |\n|---|---|---|", flush=True)
    failed = []
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, name, *options], stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        )
        output = done.stdout.decode(errors="replace")
        counts = re.search(r"^Done (\d+) runs in (\d+) second", output, re.MULTILINE)
        if done.returncode == 0 and counts:
            print(f"| `{name}` | {int(counts[1]):,} | {counts[2]} |", flush=True)
        else:
            print(f"| `{name}` | failed | |", flush=True)
            print("\n".join(output.splitlines()[-60:]), file=sys.stderr, flush=True)
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def main() -> None:
    name, *options = sys.argv[1:]
    known = targets()
    if name == "--all":
        every(list(known), options)
        return
    if name == "--list":
        print("\n".join(known))
        return
    if name not in known:
        sys.exit(f"expected one of {', '.join(known)}, got {name!r}")
    with tempfile.TemporaryDirectory(prefix="csg_ext_fuzz_") as scratch:
        if options[:1] == ["--runs"]:
            begun, seed = time.monotonic(), int(options[2]) if len(options) > 2 else time.time_ns()
            counts = drawn(name, known[name], Path(scratch), int(options[1]), seed)
            print(f"{name}: {counts[True]} gave a result, {counts[False]} a sentence, {time.monotonic() - begun:.0f} s")
        else:
            guided(known[name], Path(scratch), options)


if __name__ == "__main__":
    main()
