"""What `csg-ext train` left behind, read back safely: the checkpoints of a run, their settings and their weights.

Nothing in a file is executed: torch files are read with weights_only=True, the others are safetensors and JSON.
"""

from __future__ import annotations

import contextlib
import math
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from csg_ext._text import name_list, reason
from csg_ext.data.images import ImageData, find_images, load_found
from csg_ext.nn.gate import GatedModel
from csg_ext.training.config import TrainConfig
from csg_ext.training.files import ARMS, CHECKPOINT, RUN, WEIGHTS, is_number, read_json, sentence
from csg_ext.training.network import build_model
from csg_ext.training.weights import check_finite, check_state, load_checkpoint

if TYPE_CHECKING:
    from csg_ext.data.index import ImageIndex  # needs Pillow

# Where a run's images come from: the options of csg-ext train under its heading "data", and their defaults.
SOURCE: dict[str, Any] = {
    "data": None,
    "classes": None,
    "imbalance": None,
    "channels": None,
    "image_size": None,
    "test_share": 0.2,
    "split_seed": 0,
    "memory_limit": 4.0,
    "strict": False,
    "hold_out": None,
}
# The JSON that each of them may be.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "data": ((str, NoneType), "a path or null"),
    "classes": ((list, NoneType), "a list of names or null"),
    "imbalance": ((int, float, NoneType), "a number or null"),
    "channels": ((int, NoneType), "an integer or null"),
    "image_size": ((int, NoneType), "an integer or null"),
    "test_share": ((int, float), "a number"),
    "split_seed": ((int,), "an integer"),
    "memory_limit": ((int, float), "a number"),
    "strict": ((bool,), "true or false"),
    "hold_out": ((int, NoneType), "an integer or null"),
}
_PREFIX = "model."  # of the weights in a Lightning checkpoint
_GATE = "csg.gate"


@dataclass
class StoredModel:
    """The weights of one checkpoint, its settings, and what run.json says of its run (None where there is none)."""

    file: Path
    state: dict[str, Tensor]
    config: TrainConfig
    run: dict[str, Any] | None

    @property
    def holds_gate(self) -> bool:
        """Whether the file has a gate, trained or not."""
        return _GATE in self.state

    def why_no_gate(self) -> str:
        """Why there is no trained gate, as a part of a sentence; empty where there is one."""
        if not self.holds_gate:
            return "the checkpoint holds no gate"
        gate = self.state[_GATE]
        constant = gate.numel() and bool((gate == gate.flatten()[0]).all())
        return (
            f"the checkpoint has no trained gate: its entries are all {float(gate.flatten()[0]):g}" if constant else ""
        )


def checkpoint_files(path: str | Path) -> list[Path]:
    """The weights at `path`: both arms' of a run's folder, one of an arm's folder, or the file itself.

    In a folder the weights of a finished arm (model.safetensors) go before its last checkpoint (last.ckpt).
    Raises FileNotFoundError with one sentence.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"expected a checkpoint or a folder that csg-ext train wrote, got {place}: no such file"
        )
    if place.is_file():
        return [place]
    folders = [place / arm for arm in ARMS] if (place / RUN).is_file() else [place]
    found = []
    for folder in folders:
        file = next((folder / name for name in (WEIGHTS, CHECKPOINT) if (folder / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"expected {WEIGHTS} or {CHECKPOINT} in {folder}, got neither")
        found.append(file)
    return found


def chosen_files(paths: list[str]) -> dict[str, Path]:
    """The files to measure, by the names that the report gives them."""
    if len(paths) > 2:
        raise ValueError(f"expected one or two checkpoints, got {len(paths)}")
    found = [checkpoint_files(path) for path in paths]
    if len(found) == 2:
        return {"first": found[0][-1], "second": found[1][-1]}  # of a run, the CSG arm
    if len(found[0]) == 2:
        return dict(zip(ARMS, found[0], strict=True))
    file = found[0][0]
    return {file.parent.name if file.parent.name in ARMS else file.name: file}


def heading(name: str) -> str:
    """What a table calls the network of a name that chosen_files gave."""
    return name.upper() if name in ARMS else name


def read_checkpoint(file: Path) -> StoredModel:
    """The weights in a file that csg-ext train wrote: .safetensors, or any name of a torch file.

    The settings come from run.json beside the arm's folder or, where there is none, from the checkpoint itself.
    Raises OSError or ValueError with one sentence.
    """
    run_file = file.absolute().parent.parent / RUN
    run = read_run(run_file) if run_file.is_file() else None
    if file.suffix == ".safetensors":
        state, config = read_safetensors(file), None
    else:
        state, config = _read_torch(file)
    if run is not None:
        config = run["config"]
    if config is None:
        raise ValueError(f"{file} holds weights alone: expected {RUN} of its run in {run_file.parent}, got none")
    return StoredModel(file, state, stored_config(file if run is None else run_file, config), run)


def restore(stored: StoredModel, data: ImageData) -> GatedModel:
    """The model of a checkpoint, for the channels and classes of `data`; ValueError if its weights do not fit.

    Weights without a gate get the constant one of a new model, which counts as none.
    """
    model = build_model(stored.config, data)
    state = stored.state if stored.holds_gate else stored.state | {_GATE: model.state_dict()[_GATE]}
    what = f"{stored.config.model} for {len(data.classes)} classes and {data.channels} channels"
    try:
        check_state(model, state, what)
        check_finite(state)
    except ValueError as error:
        raise ValueError(f"{stored.file}: {error}") from None
    model.load_state_dict(state)
    return model


def read_safetensors(file: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """The tensors of a file by name; of those that are not in `only`, None. ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as archive:
            return {key: archive.get_tensor(key) if only is None or key in only else None for key in archive.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a readable .safetensors file, got one that fails with: {reason(error)}"
        ) from None


def _read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(weights, settings or None) of a file that torch.save wrote."""
    expected = f"{file}: expected a checkpoint of csg-ext"
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except OSError:
        raise
    except Exception as error:  # a damaged directory can raise almost anything
        raise ValueError(f"{expected}, got a file that is none: {reason(error)}") from None
    if packed:  # torch never compresses; a small file could unfold to any size
        raise ValueError(f"{expected}, got a compressed archive")
    content = load_checkpoint(file)
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got a {type(content).__name__}")
    extra = content.get("csg_ext")
    config = extra.get("config") if isinstance(extra, dict) else None
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{expected}, got {name_list(content)}")
    return {str(name).removeprefix(_PREFIX): tensor for name, tensor in state.items()}, config


def read_run(file: Path) -> dict[str, Any]:
    """What run.json says of a run: config, source (with the keys of SOURCE), sha256 and perhaps statistics, images
    (the classes, in the order of the labels, and the shape that the run saw) and seconds (what it took so far).

    Raises OSError or ValueError with one sentence.
    """
    run = read_json(file, "the settings of a run")
    if (
        not isinstance(run, dict)
        or not isinstance(run.get("config"), dict)
        or not isinstance(source := run.get("source"), dict)
        or not source.keys() <= SOURCE.keys()
        or not isinstance(run.get("sha256"), str)
    ):
        raise ValueError(f"{file}: expected the settings of a run with config, source and sha256, got other JSON")
    if not _is_seen(run.get("images")):
        raise ValueError(f"{file}: images must hold classes and shape, got {run['images']!r:.100}")
    if not is_number(seconds := run.get("seconds", 0)) or not 0 <= seconds < math.inf:
        raise ValueError(f"{file}: seconds must be a number, finite and at least 0, got {seconds!r:.100}")
    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(f"{file}: the source's {error}") from None
    return run | {"source": SOURCE | source}  # an older run knew fewer settings


def check_source(source: dict[str, Any]) -> None:
    """Raises ValueError, with one sentence, for settings with the keys of SOURCE that run.json cannot hold."""
    for key, value in source.items():
        kinds, words = _KINDS[key]
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if key == "classes" and fits and value is not None:
            fits = all(isinstance(name, str) for name in value)
        if isinstance(value, float):
            fits, words = fits and math.isfinite(value), f"{words}, finite"
        if isinstance(value, int) and abs(value) >= 2**63:
            fits, words = False, f"{words} below 2^63"
        if not fits or (isinstance(value, str) and "\0" in value):
            raise ValueError(f"{key} must be {words}, got {value!r:.100}")


def _is_seen(images: Any) -> bool:
    """Whether it is what the command writes of the images that a run saw; None in a run of an earlier version."""
    if images is None:
        return True
    if not isinstance(images, dict) or images.keys() != {"classes", "shape"}:
        return False
    classes, shape = images["classes"], images["shape"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return named and isinstance(shape, list) and [type(n) for n in shape] == [int] * 3 and 0 < min(shape) < 2**31


def stored_config(file: Path, config: Any) -> TrainConfig:
    """The settings that a file holds as plain values; ValueError with one sentence if they are none."""
    try:
        return TrainConfig(**config)
    except (TypeError, ValueError, OverflowError) as error:
        message = f"{file}: expected the settings of a run, got ones that fail with: {reason(error)}"
        raise ValueError(message) from None


def load_source(
    source: dict[str, Any], progress: Callable[[Any], Any] = iter, found: ImageData | ImageIndex[Any] | None = None
) -> ImageData:
    """The images that a run's source names, with the keys of SOURCE; errors as load_images. found: what find_images
    gave for them, where it has been called."""
    if found is None:
        found = find_images(source["data"], strict=source["strict"], progress=progress)
    settings = {key: value for key, value in source.items() if key not in ("data", "split_seed", "hold_out")}
    data = load_found(found, **settings, seed=source["split_seed"], progress=progress)
    return data if source["hold_out"] is None else data.hold_out(source["hold_out"])


@contextlib.contextmanager
def saying_where_to_give_moved_images(remedy: str = "give --data PATH") -> Iterator[None]:
    """Adds to the error that a run's images are not where they were how a command gets their new place."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{sentence(error)}; if the run's images have moved, {remedy}") from error


def tell_skipped(skipped: list[str], rest: str) -> None:
    """Names on the standard error output what was left out of the images, if anything: ten of them, then `rest`."""
    if skipped:
        print(f"Left out of the images: {len(skipped)}", file=sys.stderr)
        for line in [*skipped[:10], *([f"... {rest}"] if len(skipped) > 10 else [])]:
            print(f"  {line}", file=sys.stderr)


def source_images(stored: list[StoredModel], arguments: dict[str, Any]) -> ImageData:
    """The images to measure on: --data, or those of the run, checked to be the same. Says what was left out."""
    if arguments["data"] is not None:
        data = _other_images(stored, arguments["data"], arguments["image_size"])
    else:
        if arguments["image_size"] is not None:
            raise ValueError("--image-size applies to --data, which is not given")
        data = run_images(stored)
    tell_skipped(data.skipped, f"and {len(data.skipped) - 10} more")
    return data


def run_images(stored: list[StoredModel], remedy: str = "give --data PATH") -> ImageData:
    """The images of the run, checked to be the same; `remedy`: what to do where they have moved."""
    run = stored[0].run
    for s in stored:
        if s.run is None:
            raise ValueError(f"{s.file} has no run.json of its run beside it: give the images as --data PATH")
    assert run is not None
    if any(s.run is not None and s.run["sha256"] != run["sha256"] for s in stored):
        raise ValueError(
            "both checkpoints must be measured on the same images, got runs on different ones: give --data"
        )
    with saying_where_to_give_moved_images(remedy):
        data = load_source(run["source"])
    if data.fingerprint() != run["sha256"]:
        raise ValueError(
            f"expected the images that the run saw, got others from {run['source']['data'] or 'the package'}"
        )
    return data


def _other_images(stored: list[StoredModel], path: str, image_size: int | None) -> ImageData:
    """The images of --data, with the classes, in their order, and the shape that the networks were trained on."""
    source = stored[0].run["source"] if stored[0].run else SOURCE
    source = source | {"data": path, "imbalance": None, "hold_out": None}
    seen = [s.run["images"] for s in stored if s.run is not None and s.run.get("images") is not None]
    if not seen:  # a file without its run, or one of an earlier version
        print(
            "The classes that the network was trained on are not known without run.json of its run: they are taken in "
            "the order of --data.",
            flush=True,
        )
        return load_source(source | {"image_size": image_size or source["image_size"]})
    if any(images != seen[0] for images in seen):
        kind = "classes" if seen[0]["classes"] != seen[-1]["classes"] else "shape"
        raise ValueError(
            f"both checkpoints must be of runs on images of the same classes, in the same order, and of one shape, got "
            f"the {kind} {seen[0][kind]} and {seen[-1][kind]}"
        )
    names, shape = seen[0]["classes"], seen[0]["shape"]
    found = find_images(path, strict=source["strict"])
    own = found.classes
    if set(names) <= set(own):
        source["classes"] = names
    elif len(own) == len(names) and own == [str(c) for c in range(len(own))]:
        source["classes"] = None  # numbers are no names: they are the labels themselves
    else:
        raise ValueError(
            f"--data must hold the classes that the network was trained on, {name_list(names)}, got {name_list(own)}"
        )
    source["channels"] = shape[0] if shape[0] in (1, 3) else None
    packed = isinstance(found, ImageData)  # has its size, which is compared below
    source["image_size"] = image_size or (shape[1] if shape[1] == shape[2] and not packed else None)
    data = load_source(source, found=found)
    got = list(data.test_images.shape[1:])
    if got != shape and (image_size is None or got[0] != shape[0]):
        raise ValueError(f"--data must hold images of the shape that the network was trained on, {shape}, got {got}")
    return data


def training_statistics(stored: StoredModel, data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels that a model was trained with: its run's or, where run.json of an earlier
    version has none or there is no run, those of `data`. Raises ValueError if they do not fit."""
    found = (stored.run or {}).get("statistics")
    if found is None:
        return data.statistics()
    shaped = isinstance(found, list) and [len(v) if isinstance(v, list) else 0 for v in found] == [data.channels] * 2
    if not shaped or not all(isinstance(v, float) and math.isfinite(v) for v in found[0] + found[1]):
        raise ValueError(f"{stored.file}: run.json must hold the statistics of {data.channels} channels, got {found!r}")
    return found[0], found[1]
