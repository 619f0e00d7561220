"""Tests of pinned memory in the streaming loader. Without a GPU torch's own pinning runs, threads and all, over a
pin_memory that copies the tensor and notes the copy; with one, over the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from csg_ext.data import image_loader


@pytest.fixture
def folder(tmp_path):
    """Two classes of nine train images, one of them damaged."""
    generator = np.random.default_rng()
    for part, count in (("train", 9), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(generator.integers(0, 256, (12, 10, 3), np.uint8))
                image.save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "dog" / "4.png").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def pinned(monkeypatch):
    """is_pinned(tensor), on a machine whose accelerator is real or pretended."""
    if torch.cuda.is_available():
        return torch.Tensor.is_pinned
    copies = {}

    def pin_memory(tensor):
        copy = tensor.clone()  # keeps the strides, as pinning does
        copies[id(copy)] = copy
        return copy

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return lambda tensor: copies.get(id(tensor)) is tensor


def _epochs(folder, **options):
    """Two epochs of the train part, and what was skipped."""
    loader = image_loader(folder, batch_size=5, image_size=8, drop_last=False, **options)
    with pytest.warns(UserWarning, match="an image is left out: dog/4.png"):
        return [batch for _ in range(2) for batch in loader], loader.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_where_there_is_a_gpu(folder, pinned, workers):
    batches, skipped = _epochs(folder, num_workers=workers)
    assert len(batches) == 8 and all(pinned(part) for batch in batches for part in batch)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
    plain, plainly_skipped = _epochs(folder, num_workers=workers, pin_memory=False)
    assert not any(pinned(part) for batch in plain for part in batch)
    assert all(map(torch.equal, (part for batch in batches for part in batch), (p for batch in plain for p in batch)))
    assert skipped == plainly_skipped and len(skipped) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_pass_the_pinning(folder, pinned, workers):
    loader = image_loader(folder, batch_size=5, image_size=8, num_workers=workers, strict=True, drop_last=False)
    with pytest.raises(ValueError, match="^data: with strict every image must decode, got dog/4.png: [^\n]*$"):
        list(loader)
    loader = image_loader(folder, batch_size=5, num_workers=workers, transform=_no_connection)
    with pytest.raises(ConnectionError, match="no server"):
        next(iter(loader))


def _no_connection(image):
    raise ConnectionError("no server")
