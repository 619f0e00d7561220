"""The command line: `csg-ext train`, `mis`, `evaluate`, `localize`, `detect`, `report` and `info`."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from csg_ext import __version__
from csg_ext._streams import unread
from csg_ext.training.files import RUN, sentence

_HELP = {
    "model": "resnet20, resnet32, resnet44 or resnet56, or timm/NAME, a convolutional network of the package timm",
    "seed": "seed of the weights, the batches and the augmentation; both arms share it",
    "epochs": "passes over the train images",
    "batch_size": "images per step",
    "lr": "peak learning rate of the weights",
    "momentum": "momentum of the weights' SGD",
    "weight_decay": "weight decay of the weights",
    "lr_warmup": "share of the run over which the weights' learning rate rises",
    "gate_lr": "learning rate of the gate",
    "lambda_1": "weight of the CSG path's loss",
    "lambda_2": "weight of the gate's sparsity penalty",
    "budget": "the gate's L1 norm beyond which the penalty acts; K, the number of filters, when not given",
    "penalty": "l1, l2 or smooth_l1",
    "projection": "scale (divide by the column's largest entry and clip) or euclidean (the nearest feasible gate)",
    "gate_init": "half (0.5 everywhere) or one-hot (filter k for class k modulo C; fixed with --gate-lr 0)",
    "schedule": "joint (both paths in every step), steps or epochs (the paths by turns; by epochs in the paper)",
    "period": "length of one alternation: default 60 steps with --schedule steps, 3 epochs with --schedule epochs",
    "csg_share": "share of a period, at its end, that takes the CSG path; for --schedule steps or epochs",
    "warmup": "first share of the run that takes the STD path alone",
    "final_std": "last share of the run that takes the STD path alone",
    "shift": "random shift of train images, pixels",
    "flip": "mirror train images at random (default: do)",
    "low_scale": "scale of the images during the first epochs, which saves time",
    "low_share": "share of the epochs at that scale",
    "precision": "auto, bf16 or fp32",
    "csg_at": "positions in a period, from 0 on, that take the CSG path, such as 1 or 0 2, instead of --csg-share",
    "gate_warmup": "share of the run, after --warmup, that trains the gate alone",
    "lambda_1_ramp": "share of the run, after --warmup, over which lambda_1 rises",
    "lambda_2_ramp": "share of the run, after --warmup, over which lambda_2 rises",
    "lr_decay": "cosine, multistep (a tenth from 40, 60 and 80 %% on) or constant",
    "csg_lr": "peak learning rate of the weights on CSG steps, for --schedule steps or epochs; lr when not given",
    "csg_lr_warmup": "as --lr-warmup, for the weights on CSG steps; that one when not given",
    "csg_lr_decay": "as --lr-decay, for the weights on CSG steps; that one when not given",
    "label_smoothing": "label smoothing of both paths",
    "mixup": "alpha of mixup, 0 for none",
    "cutmix": "alpha of cutmix, 0 for none",
    "clip_norm": "largest norm of the weights' gradient; any when not given",
    "gate_clip_norm": "largest norm of the gate's gradient; any when not given",
    "weights": "first weights of the backbone, such as pretrained ones: a state dict of the network in .safetensors or "
    "a torch file, or what csg-ext train wrote",
}
_OUTPUT, _MIS_OUTPUT, _EVALUATE_OUTPUT = "runs/train", "runs/mis", "runs/evaluate"
_LOCALIZE_OUTPUT, _DETECT_OUTPUT = "runs/localize", "runs/detect"
_AS_FOR_EVALUATE = "as for csg-ext evaluate: the folder of a run is both its arms"
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _names(text: str) -> list[str]:
    """The parts of a comma-separated list; quotes keep a comma inside a name."""
    return next(csv.reader([text], skipinitialspace=True), [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="csg-ext", description="Class-specific gates for convolutional networks.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_train, _add_mis, _add_evaluate, _add_localize, _add_detect, _add_report, _add_info):
        add(commands)
    return parser


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="auto", metavar="NAME", help="auto (a GPU where there is one), cpu, cuda or cuda:INDEX"
    )


def _add_output(command: argparse.ArgumentParser, default: str, what: str = "results") -> None:
    command.add_argument("--output", metavar="DIR", default=default, help=f"folder of the {what} (default {default})")


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, metavar="N", default=0, help="seed of all that is drawn (default 0)")


def _add_images(command: argparse.ArgumentParser, done: str) -> None:
    """The images of a command that measures checkpoints; done: what happens to the test part."""
    command.add_argument(
        "--data", metavar="PATH", help=f"images as for csg-ext train, its test part is {done} (default: the run's own)"
    )
    command.add_argument(
        "--image-size", type=int, metavar="N", help="side that images of folders or shards in --data get"
    )


def _add_checkpoints(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help=text)


def _add_train(commands: _Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train STD and CSG under one budget and compare them",
        description="Trains a network twice under the same budget and seed, without (STD) and with (CSG) a "
        "class-specific gate, and compares accuracy and mutual information between filters and classes. Writes into "
        "--output: the table, the pictures of csg_ext.plots (gate, mutual information, where both agree, filters per "
        "class, similarity of kernels, training, a filter's top images, an image's filters, confusions) as PNG, and "
        "report.html with all of it. Ctrl-C saves the state.",
    )
    _add_output(train, _OUTPUT)
    train.add_argument(
        "--resume", action="store_true", help="continue the run in --output; with --data where its images moved"
    )
    train.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    _add_device(train)
    train.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads per arm (default: half of the CPUs, at most 4)"
    )
    train.add_argument("--tensorboard", action="store_true", help="write logs for TensorBoard, the gate as an image")
    _add_data(train)
    _add_settings(train)


def _add_data(train: argparse.ArgumentParser) -> None:
    """The keys of csg_ext.runs.SOURCE; what is not given is left out."""
    data = train.add_argument_group("data (default: a 12k/2k subset of Fashion-MNIST inside the package)")
    data.add_argument(
        "--data",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="image folder, WebDataset shards, torchvision's folder of CIFAR-10/100 or an MNIST, IDX files, or .npz",
    )
    data.add_argument(
        "--classes",
        type=_names,
        metavar="A,B,...",
        default=argparse.SUPPRESS,
        help="the classes to use, labelled in this order",
    )
    data.add_argument(
        "--imbalance",
        type=float,
        metavar="RATIO",
        default=argparse.SUPPRESS,
        help="make the train part long-tailed: its largest class RATIO times its smallest, in the classes' order",
    )
    data.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        default=argparse.SUPPRESS,
        help="use the images in grey (1) or in colour (3); by default as they are",
    )
    data.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="side to which images of folders or shards are scaled and cropped (default: their own, where all have one "
        "size up to 64x64, else 32)",
    )
    data.add_argument(
        "--test-share",
        type=float,
        metavar="SHARE",
        default=argparse.SUPPRESS,
        help="what is held out of every class where the data has no test part (default 0.2)",
    )
    data.add_argument(
        "--split-seed",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="seed of that split and of the imbalance (default 0, whatever --seed is)",
    )
    data.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        default=argparse.SUPPRESS,
        help="what decoded images of folders or shards may take (default 4)",
    )
    data.add_argument(
        "--strict", action="store_true", default=argparse.SUPPRESS, help="a damaged image or shard is an error"
    )
    data.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="measure on N images of the train part instead of the test part, to choose settings",
    )


def _add_settings(train: argparse.ArgumentParser) -> None:
    """The fields of TrainConfig; what is not given is left out."""
    from csg_ext.training.config import TrainConfig

    settings = train.add_argument_group("settings of the run")
    for field in dataclasses.fields(TrainConfig):
        name, text = "--" + field.name.replace("_", "-"), _HELP[field.name]
        if isinstance(field.default, bool):
            settings.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        if field.default is not None:
            text += f" (default {field.default:{'.4g' if isinstance(field.default, float) else ''}})"
        several = field.name == "csg_at"
        known = {"int": int, "float": float, "str": str, "tuple[int, ...]": int}
        kind = known[str(field.type).removesuffix(" | None")]
        settings.add_argument(
            name,
            type=kind,
            nargs="+" if several else None,
            metavar="FILE" if field.name == "weights" else kind.__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )


def _add_mis(commands: _Commands) -> None:
    mis = commands.add_parser(
        "mis",
        help="mutual information of stored features with their classes",
        description="Measures the mutual information of every feature with every class (nats, k-nearest-neighbour "
        "estimate), prints the score and which classes the features speak for, and writes mutual_information.npz, "
        "mutual_information.png and mis.json into --output.",
    )
    mis.add_argument(
        "file",
        metavar="FILE",
        help=".npz or .safetensors with features (N, K) and labels (N,), .npy with features, or a folder or checkpoint "
        "that csg-ext train wrote",
    )
    mis.add_argument(
        "--labels",
        metavar="FILE.npy",
        help="labels, integers from 0 on, in place of the file's; needed with an .npy of features",
    )
    mis.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the largest label + 1)")
    mis.add_argument("--n-neighbors", type=int, metavar="N", default=3, help="neighbours of the estimate (default 3)")
    mis.add_argument(
        "--ties",
        choices=("noise", "exact"),
        default="noise",
        help="equal values: noise, as scikit-learn, or counted exactly (default noise)",
    )
    mis.add_argument(
        "--protocol",
        choices=("one-vs-rest", "balanced"),
        default="one-vs-rest",
        help="each class against all other samples, or against as many (default one-vs-rest)",
    )
    mis.add_argument("--seed", type=int, metavar="N", default=0, help="seed of the noise and the draws (default 0)")
    mis.add_argument(
        "--normalize", action="store_true", help="write and draw the matrix divided by each class's entropy"
    )
    _add_device(mis)
    _add_output(mis, _MIS_OUTPUT)


def _add_evaluate(commands: _Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure one checkpoint, or two side by side",
        description="Measures the accuracy, the class specificity and the calibration of a trained network on its "
        "test images, or of two networks with the difference (second - first) and its 95 % confidence interval. Prints "
        "a table; writes evaluation.json and pictures into --output.",
    )
    _add_checkpoints(
        evaluate,
        "one or two of: a checkpoint file, the folder of an arm, or the folder of a run that csg-ext train wrote; "
        "a run given alone is both its arms, beside another its CSG arm",
    )
    _add_images(evaluate, "measured")
    _add_seed(evaluate)
    _add_device(evaluate)
    _add_output(evaluate, _EVALUATE_OUTPUT)


def _add_localize(commands: _Commands) -> None:
    localize = commands.add_parser(
        "localize",
        help="where a network's filters see each class, scored against masks",
        description="Scores maps that need no detector (CAM, GradMap, the gate's own map, every filter alone) against "
        "masks of the objects, and which of two objects in view a map picks. Prints a table; writes localization.json "
        "into --output.",
    )
    _add_checkpoints(localize, _AS_FOR_EVALUATE)
    _add_images(localize, "scored")
    localize.add_argument(
        "--masks",
        metavar="FILE",
        help=".npy with the masks (N, H, W) of the N test images, or .npz with test_masks (default: --data's own)",
    )
    localize.add_argument(
        "--above",
        type=float,
        metavar="SHARE",
        default=0.2,
        help="a map's pixels above this share of its maximum are the object (default 0.2)",
    )
    localize.add_argument(
        "--top",
        type=float,
        metavar="SHARE",
        default=0.3,
        help="the share of a filter's activations, the largest ones, that are the object (default 0.3)",
    )
    localize.add_argument(
        "--success", type=float, metavar="IOU", default=0.3, help="IoU above which an object is found (default 0.3)"
    )
    localize.add_argument("--only-correct", action="store_true", help="leave out images that the network gets wrong")
    localize.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        default=2**18,
        help="values worked on at once, which bounds the memory (default 262144)",
    )
    _add_device(localize)
    _add_output(localize, _LOCALIZE_OUTPUT, "result")


def _add_detect(commands: _Commands) -> None:
    detect = commands.add_parser(
        "detect",
        help="how well attacked images are found by what a network's filters do",
        description="Attacks a trained network (FGSM, PGD, DeepFool, and PGD that knows the score) and measures how "
        "well detectors on its pooled features and its gate find the attacked images. Prints a table; writes "
        "detection.json and the fitted detectors into --output.",
    )
    _add_checkpoints(detect, _AS_FOR_EVALUATE)
    _add_images(detect, "attacked")
    detect.add_argument(
        "--images",
        type=int,
        metavar="N",
        default=300,
        help="test images attacked, train images that fit, train images that set thresholds (default 300 each)",
    )
    detect.add_argument(
        "--epsilons",
        type=float,
        nargs="+",
        metavar="E",
        default=[2, 4, 8, 16],
        help="strengths of FGSM and PGD in units of 1/255 (default 2 4 8 16)",
    )
    detect.add_argument(
        "--train-attack",
        choices=("fgsm", "pgd"),
        default="pgd",
        help="attack that detectors are fitted on (default pgd)",
    )
    detect.add_argument(
        "--train-epsilon",
        type=float,
        metavar="E",
        default=8,
        help="its strength, and that of the adaptive attack (default 8)",
    )
    detect.add_argument(
        "--weights",
        type=float,
        nargs="*",
        metavar="W",
        default=[1, 10, 100],
        help="weights of the score in the adaptive attack (default 1 10 100; none: no such attack)",
    )
    detect.add_argument(
        "--steps",
        type=int,
        metavar="N",
        default=10,
        help="steps of PGD, at most of DeepFool; the adaptive attack takes twice as many (default 10)",
    )
    _add_seed(detect)
    _add_device(detect)
    _add_output(detect, _DETECT_OUTPUT)


def _add_report(commands: _Commands) -> None:
    report = commands.add_parser(
        "report",
        help="one HTML page about finished runs",
        description="Writes report.html, one file that needs no network: what was trained, the table CSG against STD, "
        "all pictures, and the gate and mutual information to explore with the filters' top images and maps.",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run that csg-ext train finished")
    report.add_argument("--output", metavar="DIR", help="folder of the page (default: that of a single run)")


def _add_info(commands: _Commands) -> None:
    info = commands.add_parser(
        "info", help="what was built and what runs here", description="Prints what was built and what runs here."
    )
    info.add_argument("--json", action="store_true", help="print the facts as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 after a failure, 2 for bad input, 130 after Ctrl-C."""
    with unread() as streams:
        arguments = vars(_parser().parse_args(argv))
        for stream in streams:
            if arguments["command"] != "info":
                stream.remark = (
                    f"csg-ext {arguments['command']}: the output is read no further; the files are written all the same"
                )
        return _run(arguments)


def _run(arguments: dict[str, Any]) -> int:
    command = arguments.pop("command")
    for name in ("data", "output"):
        if arguments.get(name) == "":  # of a variable that is not set: it would mean the current folder
            print(f"csg-ext {command}: error: --{name} must be a path, got an empty one", file=sys.stderr)
            return 2
    if command == "info":
        from csg_ext import info

        return info.main(["--json"] if arguments["json"] else [])

    output = arguments.get("output") or ""  # train.main takes it out

    def run() -> int:  # the import may lack a package, too
        status: int = import_module(f"csg_ext.{command}").main(arguments)
        return status

    def saved() -> str:
        if command != "train":
            return "; nothing is written"
        if not (Path(output) / RUN).exists():
            return " before the run began"
        return f"; the state is saved. Continue with: csg-ext train --resume --output {shlex.quote(str(output))}"

    return _guarded(command, run, saved, "train,analysis" if command == "detect" else "train")


def _guarded(command: str, run: Callable[[], int], interrupted: Callable[[], str], extra: str) -> int:
    """The exit status of a command whose errors are printed as one sentence; `extra` brings the packages it needs."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        return run()
    except KeyboardInterrupt:
        print(f"Interrupted{interrupted()}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"csg-ext {command}: error: it needs {error.name}, which is missing: pip install 'csg-ext[{extra}]'",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"csg-ext {command}: error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, (OSError, ValueError)) else 1
    finally:
        signal.signal(signal.SIGTERM, previous)
