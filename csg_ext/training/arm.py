"""Trains and measures one arm in this process: fit, checkpoint, resume, evaluate."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from csg_ext import metrics
from csg_ext._text import reason
from csg_ext.data.batches import Batches, normalise
from csg_ext.data.images import ImageData
from csg_ext.nn.gate import GatedModel
from csg_ext.training.checkpoint import AtomicCheckpointIO, Interruption, TrainingInterrupted
from csg_ext.training.config import TrainConfig
from csg_ext.training.files import (
    ARRAYS,
    CHECKPOINT,
    METRICS_CSV,
    METRICS_JSON,
    RESULT,
    TENSORBOARD,
    WEIGHTS,
    atomic_file,
    write_text,
)
from csg_ext.training.logs import write_epoch
from csg_ext.training.module import ROW, AlternateTraining
from csg_ext.training.monitor import DivergedError
from csg_ext.training.network import build_model, initial_model
from csg_ext.training.schedule import CSG

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Report = Callable[[dict[str, Any]], None]
_REPORT_SECONDS = 0.2
_PREDICT_PIXELS = 2**20  # of a batch that is measured: large images take much memory in a large network


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run computes in bf16: asked for, or "auto" where that is the faster one.

    Convolutions with AVX-512's bf16 instructions are faster than in fp32 on AMD's processors and slower on Intel's,
    which have tiles (AMX) for it; where those are hidden, fp32 is faster (docs/demo_training.md).
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class _Keeper(Callback):
    """After every step: progress; after every epoch and on interruption: the checkpoint and the metrics files."""

    def __init__(
        self, folder: Path, report: Report, interruption: Interruption, stop_after: int | None, tensorboard: bool
    ) -> None:
        self.folder, self.report, self.interruption, self.stop_after = folder, report, interruption, stop_after
        self.tensorboard = tensorboard
        self.began = False  # a step was taken: what a checkpoint holds was fit for it
        self.writer: SummaryWriter | None = None
        self._last = self._reported = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlternateTraining)
        self._last = time.perf_counter()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = pl_module.step_count + 1  # a resumed run writes again what came after its checkpoint
            self.writer = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=purge)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        assert isinstance(pl_module, AlternateTraining)
        self.began = True
        now = time.perf_counter()
        pl_module.seconds += now - self._last
        self._last = now
        epoch_ended = pl_module.step_count % len(pl_module.batches) == 0
        stop = self.interruption.requested or pl_module.step_count == self.stop_after
        if epoch_ended:
            pl_module.end_epoch()
        if epoch_ended or stop:
            pl_module.finite.check_parameters(pl_module.model, pl_module.step_count, pl_module.schedule.total_steps)
            trainer.save_checkpoint(self.folder / CHECKPOINT)
            write_history(self.folder, pl_module.history)
            if epoch_ended and self.writer is not None:
                gate = pl_module.model.gate.detach() if pl_module.arm == CSG else None
                write_epoch(self.writer, pl_module.history[-1], gate, pl_module.objective)
        if epoch_ended or stop or now - self._reported > _REPORT_SECONDS:
            self._reported = now
            self.report(
                {
                    "step": pl_module.step_count,
                    "steps": pl_module.schedule.total_steps,
                    "epochs": pl_module.config.epochs,
                    "row": pl_module.history[-1] if epoch_ended else None,
                }
            )
        if stop and pl_module.step_count < pl_module.schedule.total_steps:
            raise TrainingInterrupted(f"stopped after step {pl_module.step_count} of {pl_module.schedule.total_steps}")


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """The rows of every epoch as metrics.csv and metrics.json."""
    lines = [",".join(ROW)] + [",".join("" if row[key] is None else str(row[key]) for key in ROW) for row in history]
    write_text(folder / METRICS_CSV, "\n".join(lines) + "\n")
    write_text(folder / METRICS_JSON, json.dumps(history, indent=1) + "\n")


def predict(
    model: GatedModel, images: NDArray[np.uint8], statistics: tuple[list[float], list[float]]
) -> tuple[Any, Any]:
    """Pooled features (N, K) and logits (N, C) of the STD path as numpy arrays, in fp32 on the model's device.

    statistics: what ImageData.statistics() gives for the images that the model was trained on.
    """
    device = model.gate.device
    mean, std = statistics
    height, width = images.shape[2:]
    batch_size = max(1, min(250, _PREDICT_PIXELS // (height * width)))
    model.eval()
    features, logits = [], []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = normalise(images[start : start + batch_size], mean, std, device)
            pooled, scores = model.features_and_logits(batch)
            features.append(pooled.cpu())
            logits.append(scores.cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def evaluate(model: GatedModel, data: ImageData, arm: str) -> tuple[dict[str, float], dict[str, NDArray[Any]]]:
    """Measures a trained model on the test part through its STD path: (numbers, arrays).

    numbers: accuracy, mis, mis_ceiling, mis_bound (nats), dead_filters, metrics.specificity's, weight_own_accuracy
    (own_filter_accuracy by the classifier's weights) and, for the arm "csg", l1_density, class_agreement and
    one_hot_accuracy (own_filter_accuracy by the gate). arrays: mi (K, C), gate (C, K), confusion (C, C), features
    (N, K), labels.
    """
    features, logits = predict(model, data.test_images, data.statistics())
    labels, classes = data.test_labels, len(data.classes)
    mi = metrics.class_mutual_info(features, labels, num_classes=classes)
    dead = metrics.dead_filters(features)
    mi[dead] = 0
    gate = model.gate.detach().cpu().numpy()
    weight, bias = (p.detach().cpu().numpy() for p in (model.classifier.weight, model.classifier.bias))
    ceilings = metrics.class_mutual_info(logits, labels, num_classes=classes).diagonal()
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    numbers = {
        "accuracy": float(np.mean(logits.argmax(1) == labels)),
        "mis": metrics.mutual_information_score(mi),
        "mis_ceiling": float(ceilings.mean()),
        "mis_bound": float(metrics.class_entropy(labels, classes).max()),
        "dead_filters": int(dead.sum()),
        "weight_own_accuracy": metrics.own_filter_accuracy(features, weight, bias, weight, labels),
    } | metrics.specificity(features, labels, mi, weight, ceilings)
    if arm == CSG:
        numbers["l1_density"] = model.csg.density()
        numbers["class_agreement"] = metrics.class_agreement(gate, mi, features, labels)
        numbers["one_hot_accuracy"] = metrics.own_filter_accuracy(features, weight, bias, gate, labels)
    return numbers, {"mi": mi, "gate": gate, "confusion": confusion, "features": features, "labels": labels}


def _batches(config: TrainConfig, data: ImageData, device: torch.device) -> Batches:
    mean, std = data.statistics()
    return Batches(
        data.train_images,
        data.train_labels,
        min(config.batch_size, len(data.train_labels)),
        seed=config.seed,
        mean=mean,
        std=std,
        shift=config.shift,
        flip=config.flip,
        sizes=config.sizes(data.train_images.shape[2]),
        device=device,
    )


def _trainer(config: TrainConfig, device: torch.device, callback: Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=config.epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if uses_bf16(config, device) else "32-true",
        callbacks=[callback],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit_arm(
    arm: str,
    config: TrainConfig,
    data: ImageData,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    report: Report = lambda message: None,
    stop_after: int | None = None,
    tensorboard: bool = False,
) -> AlternateTraining:
    """Trains one arm ("std" or "csg"); the returned module holds the model and the history.

    folder receives last.ckpt (after every epoch and on Ctrl-C), metrics.csv and metrics.json. resume continues from
    last.ckpt where there is one, bit for bit on the CPU with the same number of threads. report gets a dict after
    every few steps. stop_after stops after that step as Ctrl-C does. tensorboard writes every epoch's numbers and the
    gate as an image for TensorBoard, too.

    Raises TrainingInterrupted after Ctrl-C (the state is saved), DivergedError when the loss or a weight is no number,
    OSError when a file cannot be written (the old one survives).
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    place = torch.device(device)
    checkpoint = out / CHECKPOINT
    goes_on = resume and checkpoint.exists()
    model = (build_model if goes_on else initial_model)(config, data)
    module = AlternateTraining(model, _batches(config, data, place), config, arm)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with Interruption() as interruption, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        keeper = _Keeper(out, report, interruption, stop_after, tensorboard)
        trainer = _trainer(config, place, keeper)
        try:
            trainer.fit(module, ckpt_path=checkpoint if goes_on else None, weights_only=True)
        except SystemExit:  # what Lightning makes of a second Ctrl-C
            raise KeyboardInterrupt from None
        except (OSError, DivergedError, TrainingInterrupted, torch.OutOfMemoryError):
            raise
        except Exception as error:  # Lightning and torch raise almost anything for a state of other parts
            if keeper.began or not resume or str(error).startswith(str(checkpoint)):
                raise
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
            message = f"{checkpoint}: expected the state of this run, got one that fails with: {kind}{reason(error)}"
            raise ValueError(message) from error
    write_history(out, module.history)  # again: a run killed between its last checkpoint and this lacks the last row
    module.model.to(place)
    return module


def train_arm(
    arm: str,
    config: TrainConfig,
    data: ImageData,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    report: Report = lambda message: None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """fit_arm, then evaluate on the test part; returns what result.json holds.

    folder receives, besides fit_arm's files, model.safetensors, arrays.npz (what evaluate returns) and result.json.
    """
    out, place = Path(folder), torch.device(device)
    module = fit_arm(arm, config, data, out, resume=resume, device=device, report=report, tensorboard=tensorboard)
    report({"evaluating": True})
    numbers, arrays = evaluate(module.model, data, arm)
    with atomic_file(out / WEIGHTS) as file:
        from safetensors.torch import save

        file.write(save({k: v.contiguous().cpu() for k, v in module.model.state_dict().items()}))
    with atomic_file(out / ARRAYS) as file:
        np.savez(file, allow_pickle=False, **arrays)
    result = {
        "arm": arm,
        **numbers,
        "train_seconds": round(module.seconds, 2),
        "steps": module.step_count,
        "precision": "bf16" if uses_bf16(config, place) else "fp32",
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    write_text(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result
