"""Builds the embedded default data set: a seeded, balanced 12k/2k subset of Fashion-MNIST, byte for byte reproducible.

Source: the Debian package dataset-fashion-mnist (`apt-get download dataset-fashion-mnist`), or any folder that holds
the four IDX files of Fashion-MNIST. Train images come from its train split, test images from its test split.

    python tools/make_fashion_subset.py --deb dataset-fashion-mnist_*.deb
    python tools/make_fashion_subset.py --idx /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
PER_CLASS = {"train": 1200, "test": 200}
SEED = 2020
OUTPUT = Path(__file__).resolve().parent.parent / "csg_ext" / "data" / "fashion_mnist_14k.npz"
# sha256 of the decompressed IDX files (those of the Debian package equal the originals of github.com/zalandoresearch).
SOURCE_SHA256 = {
    "train_images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train_labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "test_images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "test_labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

NOTE = """Fashion-MNIST, a subset of 14,000 images (fashion_mnist_14k.npz)

Source:   Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul, Vollgraf, arXiv 1708.07747),
          as packaged by Debian in dataset-fashion-mnist 0.0~git20200523.55506a9-1.
Licence:  MIT (Debian calls it Expat), Copyright 2017 Zalando SE, https://tech.zalando.com
Content:  28 x 28 grey images, uint8, 10 balanced classes. train: {train} images, all from the original train split;
          test: {test} images, all from the original test split. Chosen per class with numpy's
          Generator(PCG64({seed})), then interleaved: every ten consecutive images hold each class once, so any slice
          of a multiple of ten images is balanced too.
Use:      the test part measures; it never chooses anything. Hyperparameters were chosen on the last 2,000 images
          of the train part.
Built by: tools/make_fashion_subset.py

sha256 of the source (decompressed IDX files)
{source}
sha256 of the arrays (train_images, train_labels, test_images, test_labels; C order, concatenated)
  {arrays}
sha256 of fashion_mnist_14k.npz
  {result}

The MIT License
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:
The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.
THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def read_idx(folder: Path) -> dict[str, bytes]:
    """The decompressed bytes of the four IDX files of a folder, by key."""
    raw = {}
    for key, name in FILES.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        raw[key] = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return raw


def read_deb(deb: Path) -> dict[str, bytes]:
    """The four IDX files of the Debian package."""
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["dpkg-deb", "-x", str(deb), tmp], check=True)
        return read_idx(Path(tmp) / "usr/share/datasets/fashion-mnist")


def as_array(raw: bytes) -> np.ndarray:
    """An IDX file of uint8 as an array."""
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def balanced(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of per_class samples of every class, interleaved so that each run of ten holds each class once."""
    rows = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(len(CLASSES))]
    return rng.permuted(np.stack(rows), axis=0).T.reshape(-1)


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed .npz whose bytes depend on the arrays alone (np.savez writes the current time)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getvalue(), compresslevel=9)
    return out.getvalue()


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--deb", type=Path, help="the Debian package dataset-fashion-mnist")
    source.add_argument("--idx", type=Path, help="a folder with the four IDX files, gzipped or not")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    raw = read_deb(args.deb) if args.deb else read_idx(args.idx)
    checksums = {key: hashlib.sha256(value).hexdigest() for key, value in raw.items()}
    if checksums != SOURCE_SHA256:
        raise SystemExit(
            f"these are not the IDX files of Fashion-MNIST: expected sha256 {SOURCE_SHA256}, got {checksums}"
        )

    rng = np.random.Generator(np.random.PCG64(SEED))
    arrays: dict[str, np.ndarray] = {}
    for split, per_class in PER_CLASS.items():
        labels = as_array(raw[f"{split}_labels"])
        chosen = balanced(labels, per_class, rng)
        arrays[f"{split}_images"] = as_array(raw[f"{split}_images"])[chosen]
        arrays[f"{split}_labels"] = labels[chosen]
    content = hashlib.sha256(b"".join(arrays[key].tobytes() for key in FILES)).hexdigest()
    data = npz_bytes(arrays | {"classes": np.array(CLASSES)})
    args.output.write_bytes(data)
    note = NOTE.format(
        train=len(arrays["train_labels"]),
        test=len(arrays["test_labels"]),
        seed=SEED,
        source="\n".join(f"  {FILES[key]:24} {value}" for key, value in checksums.items()),
        arrays=content,
        result=hashlib.sha256(data).hexdigest(),
    )
    args.output.with_suffix(".txt").write_text(note)
    print(f"{args.output}: {len(data) / 1e6:.2f} MB, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
