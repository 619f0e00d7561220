"""Tests of the streaming loader: the in-memory reader's pixels, no image lost or doubled, nothing left to chance."""

from __future__ import annotations

import pickle
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from csg_ext.data import ImageData, decode, image_loader, load_images
from csg_ext.data.batches import normalise
from csg_ext.data.loader import IMAGENET_MEAN, IMAGENET_STD, random_crop

RNG = np.random.default_rng()


def _image(mode: str = "RGB", size: tuple[int, int] = (14, 12)) -> Image.Image:
    channels = () if mode == "L" else (3,)
    return Image.fromarray(RNG.integers(0, 256, (size[1], size[0], *channels), np.uint8))


def _folder(root: Path, count: int = 10, mode: str = "RGB") -> Path:
    for part, share in (("train", count), ("val", 4)):
        for name in ("cat", "dog", "emu"):
            (root / part / name).mkdir(parents=True)
            for i in range(share):
                _image(mode).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return _folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five train shards of 20 images whose level is their number, and one of validation."""
    root = tmp_path_factory.mktemp("shards")
    for name, first, count in [(f"train-{s}", 20 * s, 20) for s in range(5)] + [("val-0", 100, 9)]:
        with webdataset.TarWriter(str(root / f"{name}.tar")) as writer:
            for number in range(first, first + count):
                pixels = np.full((8, 8), number, np.uint8)
                writer.write({"__key__": f"{number:04d}", "png": Image.fromarray(pixels), "cls": number % 3})
    return root


def _plain(path: Path, split: str = "train", **options):
    """A loader whose x holds the pixels' levels."""
    defaults = dict(batch_size=8, image_size=8, channels=1, mean=[0], std=[1 / 255], augment=False, num_workers=0)
    return image_loader(path, split, **defaults | options)


def _numbers(loader) -> list[int]:
    """The number of every image of one pass, after a check that labels belong to their images."""
    numbers = []
    for x, y in loader:
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        level = x[:, 0, 0, 0].round().long()
        assert torch.equal(level % 3, y)
        numbers += level.tolist()
    return numbers


# ---- pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_loader_gives_the_pixels_of_the_reader_in_memory(tmp_path, mode, channels):
    _folder(tmp_path, 4, mode)
    data = load_images(tmp_path, image_size=9, channels=channels)
    assert data.channels == channels
    mean, std = ([0.3], [0.2]) if channels == 1 else ([0.3, 0.4, 0.5], [0.2, 0.3, 0.1])
    options = dict(batch_size=5, image_size=9, channels=channels, mean=mean, std=std, num_workers=0)
    x, y = map(torch.cat, zip(*image_loader(tmp_path, "val", **options), strict=True))
    assert torch.equal(x, normalise(data.test_images, mean, std)) and np.array_equal(y, data.test_labels)
    assert x.shape == (12, channels, 9, 9)


def test_grey_and_colour_are_pillows(tmp_path):
    _folder(tmp_path, 4)
    colour, grey = load_images(tmp_path), load_images(tmp_path, channels=1)
    assert np.array_equal(colour.with_channels(1).train_images, grey.train_images)
    assert np.array_equal(grey.with_channels(3).train_images, np.repeat(grey.train_images, 3, axis=1))
    assert colour.with_channels(3).train_images is colour.train_images
    path = tmp_path / "colour.npz"
    colour.save(path)
    assert load_images(path, channels=1).fingerprint() == grey.fingerprint()
    images = RNG.integers(0, 256, (2, 4, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="channels applies to images of 1 or 3 channels, got 4"):
        ImageData("toy", images, np.arange(2), images, np.arange(2), ["a", "b"]).with_channels(1)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        load_images(path, channels=2)


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    levels = RNG.integers(0, 2**16, (5, 6), np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(decode.decode(tmp_path / "a.png", 1)), levels >> 8)
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="expected 8 or 16 bits per channel, got Pillow's mode F"):
        decode.decode(tmp_path / "a.tif", 1)


def _tiff(levels: np.ndarray, bits: int, photometric: int) -> bytes:
    """One strip of little-endian 16-bit samples, or of packed 12-bit ones."""
    raw = levels.astype("<u2").tobytes()
    if bits == 12:
        a, b = levels.reshape(-1, 2).T.astype(np.uint32)
        packed = a << 12 | b
        raw = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], 1).astype(np.uint8).tobytes()
    height, width = levels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(raw)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(raw)) + raw + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits, photometric", [(12, 1), (16, 1), (16, 0)])
def test_grey_tiffs_are_scaled_by_their_bits_and_inverted_where_white_is_zero(tmp_path, bits, photometric):
    levels = RNG.integers(0, 2**bits, (6, 8), np.uint16)
    levels[0, :2] = 0, 2**bits - 1
    (tmp_path / "a.tif").write_bytes(_tiff(levels, bits, photometric))
    light = levels if photometric else 2**bits - 1 - levels
    assert np.array_equal(np.asarray(decode.decode(tmp_path / "a.tif", 1)), light >> (bits - 8))


@pytest.mark.parametrize("highest", [65535, 1023, 255])
def test_grey_pgms_are_scaled_to_eight_bits(tmp_path, highest):
    levels = RNG.integers(0, highest + 1, (6, 8), np.uint16)
    raw = levels.astype(">u2" if highest > 255 else np.uint8).tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 8 6 %d\n" % highest + raw)
    scaled = np.rint(levels / highest * 65535).astype(int) >> 8
    assert np.array_equal(np.asarray(decode.decode(tmp_path / "a.pgm", 1)), scaled)


def test_only_image_formats_are_opened_whatever_the_name(tmp_path):
    """PostScript would make Pillow start Ghostscript."""
    _image().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(Exception, match="cannot identify image file"):
        decode.decode(tmp_path / "a.jpg", 3)


def test_defaults_of_folders_and_packed_sets(folder, tmp_path):
    x, _ = next(iter(image_loader(folder, "val", batch_size=2, num_workers=0)))
    assert x.shape == (2, 3, 224, 224) and x.is_contiguous(memory_format=torch.channels_last)
    with Image.open(folder / "val" / "cat" / "0.png") as image:
        pixels = decode.to_array(decode.fit(image, 224)).copy()
    assert torch.equal(x[:1], normalise(pixels[None], IMAGENET_MEAN, IMAGENET_STD))
    data = load_images(folder)
    data.save(tmp_path / "x.npz")
    x, y = next(iter(image_loader(tmp_path / "x.npz", "test", batch_size=12, num_workers=0)))
    assert torch.equal(x, normalise(data.test_images, *data.statistics())) and np.array_equal(y, data.test_labels)
    x, _ = next(iter(image_loader(folder, "test", batch_size=2, num_workers=0, channels=1)))
    assert x.shape[1] == 1  # train/ with val/ alone: val is the test part


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_packed_sets_are_normalised_by_the_train_images_that_are_used(tmp_path, split, channels):
    """Those of the other classes, those held out and those left out for the imbalance have other levels."""
    images, labels = RNG.integers(0, 256, (120, 1, 3, 3), np.uint8), np.arange(120) % 4
    images[labels < 2] //= 9
    ImageData("toy", images, labels, images[:8], labels[:8], list("abcd")).save(tmp_path / "x.npz")
    chosen = dict(classes=["d", "c"], imbalance=3, channels=channels)
    options = dict(batch_size=4, num_workers=0, drop_last=False, shuffle=False) | chosen
    data = load_images(tmp_path / "x.npz", **chosen)
    loader = image_loader(tmp_path / "x.npz", "test", **options)
    assert (loader.dataset.mean, loader.dataset.std) == data.statistics()
    loader = image_loader(tmp_path / "x.npz", split, val_share=0.5, **options)
    plain = image_loader(tmp_path / "x.npz", val_share=0.5, mean=[0] * channels, std=[1 / 255] * channels, **options)
    levels = torch.cat([x for x, _ in plain]).double() / 255
    assert len(levels) == 15 + 5
    assert np.allclose(loader.dataset.mean, levels.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(loader.dataset.std, levels.std((0, 2, 3), correction=0), atol=1e-6)


# ---- order, workers, ranks


def test_every_pass_is_the_next_epoch_and_shows_every_image_once(shards):
    loader = _plain(shards, drop_last=False)
    assert len(loader) == 13 and loader.classes == ["0", "1", "2"]
    epochs = [_numbers(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    loader.set_epoch(1)
    assert _numbers(loader) == epochs[1] and _numbers(loader) == epochs[2]
    assert _numbers(_plain(shards, drop_last=False, seed=1)) != epochs[0]
    assert _numbers(_plain(shards, "val")) == list(range(100, 109))
    assert len(_numbers(_plain(shards))) == 96  # a train pass leaves the incomplete batch out


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, folder, workers):
    for path in (shards, folder):
        one, many = (
            image_loader(path, batch_size=7, image_size=8, num_workers=n, drop_last=False) for n in (0, workers)
        )
        for _ in range(2):
            for (x, y), (u, v) in zip(one, many, strict=True):
                assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_an_epoch_without_overlap_or_loss(shards, world):
    whole = _numbers(_plain(shards, drop_last=False, batch_size=4 * world))
    parts = [_plain(shards, drop_last=False, batch_size=4, rank=r, world_size=world) for r in range(world)]
    lengths = {len(p) for p in parts}
    numbers = [_numbers(p) for p in parts]
    assert sorted(n for part in numbers for n in part) == list(range(100))
    full = 100 // (4 * world)
    for step in range(full):  # together they see the global batches that one process would
        together = [n for part in numbers for n in part[4 * step : 4 * step + 4]]
        assert together == whole[4 * world * step : 4 * world * (step + 1)]
    assert lengths == ({full + 1} if 100 % (4 * world) >= world else {full, full + (100 % (4 * world) > 0)})
    train = [_plain(shards, batch_size=4, rank=r, world_size=world) for r in range(world)]
    assert {len(p) for p in train} == {full} and {len(_numbers(p)) for p in train} == {4 * full}


def test_ranks_come_from_the_process_group(shards):
    """Of the pass, as trainers initialise it after the loaders are made."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    early = _plain(shards, batch_size=4)
    too_few = _plain(shards, batch_size=40)
    assert len(early) == 25
    torch.distributed.init_process_group("fake", rank=2, world_size=3, store=FakeStore())
    try:
        numbers = _numbers(_plain(shards, batch_size=4))
        assert len(early) == 8 and _numbers(early) == numbers
        with pytest.raises(ValueError, match="^data: 100 images of the train part give rank 2 of 3 no batch of 40$"):
            next(iter(too_few))
    finally:
        torch.distributed.destroy_process_group()
    assert numbers == _numbers(_plain(shards, batch_size=4, rank=2, world_size=3))
    assert len(early) == 25


def test_the_shuffle_buffer_bounds_how_far_an_image_moves(shards):
    loader = _plain(shards, drop_last=False, shuffle_buffer=6)
    numbers = np.array(_numbers(loader))
    ranks = {shard: rank for rank, shard in enumerate(dict.fromkeys((numbers // 20).tolist()))}
    for seed in range(4):
        numbers = np.array(_numbers(_plain(shards, drop_last=False, shuffle_buffer=6, seed=seed)))
        centres = [np.median(np.flatnonzero(numbers // 20 == shard)) for shard in range(5)]
        ranks = np.argsort(np.argsort(centres))
        place = 20 * ranks[numbers // 20] + numbers % 20  # where it lies when the shards are read one by one
        assert 0 < np.abs(place - np.arange(100)).max() < 6
    assert (
        np.abs(
            np.array(_numbers(_plain(shards, drop_last=False, shuffle_buffer=1))) % 20 - np.tile(np.arange(20), 5)
        ).max()
        == 0
    )


def test_the_callers_random_states_survive(folder):
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    transform = _noisy
    for options in ({}, {"transform": transform}, {"num_workers": 1}):
        list(image_loader(folder, batch_size=4, image_size=8, **{"num_workers": 0} | options))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


# ---- augmentation


def _noisy(image: Image.Image) -> torch.Tensor:
    return torch.tensor([image.size[0], random.random()]) + torch.rand(2)


def test_a_transform_takes_the_place_of_everything_and_is_reproducible(folder):
    first = image_loader(folder, batch_size=6, transform=_noisy, num_workers=0)
    second = image_loader(folder, batch_size=6, transform=_noisy, num_workers=2)
    epochs = [torch.cat([x for x, _ in first]) for _ in range(2)]
    assert torch.equal(epochs[0], torch.cat([x for x, _ in second])) and epochs[0].shape == (30, 2)
    assert not torch.equal(epochs[0].sort(0)[0], epochs[1].sort(0)[0])
    assert len(set(epochs[0][:, 1].tolist())) == 30


def test_random_crop_is_a_crop_of_the_published_kind():
    """On an image whose pixels tell their place: the box is read off the corners of the result."""
    height, width = 90, 120
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    image, areas, aspects, mirrored = Image.fromarray(pixels), [], [], 0
    generator = np.random.default_rng(RNG.integers(2**32))
    for _ in range(300):
        crop = np.asarray(random_crop(image, 64, generator)).astype(float)
        assert crop.shape == (64, 64, 3)
        dx, dy = (
            (crop[:, -8:, 0].mean() - crop[:, :8, 0].mean()) / 56,
            (crop[-8:, :, 1].mean() - crop[:8, :, 1].mean()) / 56,
        )
        mirrored += dx < 0
        areas.append(abs(dx) * dy * 64 * 64 / (width * height))
        aspects.append(abs(dx) / dy)
    assert 0.06 < min(areas) < 0.2 and 0.7 < max(areas) < 1.05
    assert 0.72 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.38
    assert 100 < mirrored < 200
    thin = random_crop(_image(size=(200, 3)), 8, generator)  # no box fits: the centre
    assert thin.size == (8, 8)


# ---- damage


@pytest.fixture
def damaged(tmp_path) -> Path:
    _folder(tmp_path, 5)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_left_out_named_once_and_counted(damaged, workers):
    loader = image_loader(damaged, batch_size=5, image_size=8, num_workers=workers)
    with pytest.warns(UserWarning, match="an image is left out: dog/1.png: cannot identify image file") as seen:
        sizes = [sorted(len(y) for _, y in loader) for _ in range(2)]
    told = [w for w in seen if "is left out" in str(w.message)]  # Python 3.12 and newer also warn of forking
    assert sizes == [[4, 5, 5]] * 2 and len(told) == 1 and len(loader.skipped) == 1
    strict = image_loader(damaged, batch_size=5, image_size=8, num_workers=workers, strict=True)
    with pytest.raises(ValueError, match="^data: with strict every image must decode, got dog/1.png: [^\n]*$"):
        list(strict)


def test_a_batch_of_damaged_images_alone_is_an_error(damaged):
    loader = image_loader(damaged, batch_size=1, image_size=8, num_workers=0)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="no image of a batch of 1 decodes, the first failure is"),
    ):
        warnings.simplefilter("ignore")
        list(loader)


def test_decompression_bombs_are_named(damaged, monkeypatch):
    (damaged / "train" / "dog" / "1.png").unlink()
    _image(size=(40, 40)).save(damaged / "train" / "dog" / "2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_images(damaged)
    assert (
        len(data.skipped) == 1 and "train/dog/2.png: Image size (1600 pixels) exceeds limit of 1000" in data.skipped[0]
    )
    with pytest.warns(UserWarning, match="dog/2.png: Image size"):
        list(image_loader(damaged, batch_size=5, image_size=8, num_workers=0))


def test_a_shard_that_changes_after_it_was_indexed(tmp_path, shards):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loader = _plain(tmp_path, drop_last=False, shuffle=False)
    victim = tmp_path / "train-4.tar"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.warns(UserWarning, match="train-4.tar: 00.*.png: expected .* bytes in the shard, got"):
        with pytest.raises(ValueError, match="no image of a batch of 4 decodes"):
            list(loader)


def test_shards_left_out_while_indexing_are_warned_of(tmp_path, shards):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = tmp_path / "train-4.tar"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.warns(UserWarning, match="left out while indexing, first train-4.tar: truncated"):
        loader = _plain(tmp_path, drop_last=False)
    assert 80 < len(_numbers(loader)) < 100 and loader.skipped


# ---- the rest


def test_what_does_not_fit_in_memory_says_how_to_stream_it(folder):
    with pytest.raises(
        ValueError, match="42 images of 3 x 4000 x 4000 take 1.9 GiB .* memory_limit of 1 GiB.*image_loader"
    ):
        load_images(folder, image_size=4000, channels=3, memory_limit=1)
    with pytest.raises(ValueError, match="42 images of 3 x 12 x 14 take 0.0 GiB in memory"):
        load_images(folder, memory_limit=1e-7)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_images(folder, image_size=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "split must be one of train, val, test, got 'dev'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 1}, "rank and world_size must be given together, got 1 and None"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, 2\), the world_size, got 2"),
        ({"batch_size": 99}, "30 images of the train part give rank 0 of 1 no batch of 99"),
        ({"val_share": 1.5}, r"val_share must lie in \(0, 1\), got 1.5"),
        ({"mean": [0.5]}, "mean must have 3 values, one per channel, got 1"),
        ({"std": [0.5, 0.5, 0]}, r"std must be positive, got \[0.5, 0.5, 0\]"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"prefetch_factor": 0}, "prefetch_factor must be at least 1, got 0"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=f"^data: {message}"):
        image_loader(folder, **{"batch_size": 4} | options)
    with pytest.raises(TypeError, match="classes must be a list of class names, got the text 'cat,dog'"):
        image_loader(folder, batch_size=2, classes="cat,dog")


def test_the_data_set_travels_to_spawned_workers(shards):
    loader = _plain(shards)
    again = pickle.loads(pickle.dumps(loader.dataset))
    x, y, failed = again[0, np.arange(5)]
    assert torch.equal(x, loader.dataset[0, np.arange(5)][0]) and y.tolist() == [0, 1, 2, 0, 1] and not failed


def test_lightning_takes_the_loader_as_it_is(folder):
    """A fit of two epochs sees the epochs that plain passes give, in order."""
    import lightning.pytorch as pl

    class Probe(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, index):
            self.seen.append(batch[0].clone())
            return self.weight * batch[0].mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def loader():
        return image_loader(folder, batch_size=8, image_size=8, num_workers=0)

    probe, plain = Probe(), loader()
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(max_epochs=2, accelerator="cpu", **options).fit(probe, loader())
    expected = [x for _ in range(2) for x, _ in plain]
    assert len(probe.seen) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(probe.seen, expected, strict=True))
