"""Tests of class_mutual_info's arguments: arrays, devices, chunks that change no bit; bad input; interruption."""

from __future__ import annotations

import threading
import time
import warnings
from _thread import interrupt_main

import numpy as np
import pytest
import torch
from meta_tensors import on_meta
from mutual_info_inputs import sample

import csg_ext
from csg_ext.ops import _mutual_info_arguments, mutual_info

# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["noise", "exact"])
@pytest.mark.parametrize("protocol", ["one-vs-rest", "balanced"])
def test_threads_and_chunks_do_not_change_a_bit(ties, protocol, monkeypatch):
    x, y = sample(500, k=37, c=6)
    options = {"ties": ties, "protocol": protocol, "random_state": 3}
    want = csg_ext.class_mutual_info(x, y, **options)
    for size in (1, 3, 8, 36, 37, 1000):
        assert np.array_equal(csg_ext.class_mutual_info(x, y, chunk_size=size, **options), want)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert np.array_equal(csg_ext.class_mutual_info(x, y, **options), want)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(mutual_info, "_NOISE_VALUES", 10 * len(y))  # the stream is drawn several times
    for size in (4, 7):
        assert np.array_equal(csg_ext.class_mutual_info(x, y, chunk_size=size, **options), want)
    rows = [
        mutual_info._class_mutual_info(
            x, y, begin, end, num_classes=None, n_neighbors=3, normalize=False, device=None, chunk_size=None,
            progress=None, **options,
        )
        for begin, end in ((0, 10), (10, 11), (11, 37))
    ]  # fmt: skip
    assert np.array_equal(np.concatenate(rows), want)


def test_instruction_sets_agree():
    op = torch.ops.csg_ext._cpu_level
    now, best = op(-1), op(2)
    try:
        for ties in ("noise", "exact"):
            x, y = sample(900, k=8, c=9)
            results = []
            for level in range(best + 1):
                op(level)
                results.append(csg_ext.class_mutual_info(x, y, ties=ties))
            assert all(np.array_equal(result, results[0]) for result in results)
    finally:
        op(now)


def test_layouts_and_kinds_of_arrays_do_not_change_a_bit(tmp_path):
    x, y = sample(300, k=9)
    x = x.astype(np.float32)
    want = csg_ext.class_mutual_info(x, y)
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((600, 18), np.float32)
    wide[::2, ::2] = x
    np.save(tmp_path / "x.npy", x)
    fields = np.zeros((300, 9), [("pad", "u1"), ("x", "f4")])  # strides that are no multiple of the item
    fields["x"] = x
    fortran = np.asfortranarray(x)
    fortran.flags.writeable = False
    arrays = {
        "fp64": x.astype(np.float64),
        "read-only": read_only,
        "Fortran order": fortran,
        "strided": wide[::2, ::2],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "other byte order": x.astype(">f4"),
        "structured": fields["x"],
        "long double": x.astype(np.longdouble),
        "objects": x.astype(object),
        "lists": x.tolist(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, array in arrays.items():
            got = csg_ext.class_mutual_info(array, y)
            assert isinstance(got, np.ndarray) and np.array_equal(got, want), name
    for name in ("read-only", "Fortran order", "strided", "memory map"):
        tensor = _mutual_info_arguments._in_place(arrays[name])
        assert tensor is not None and tensor.data_ptr() == arrays[name].ctypes.data, f"{name} is copied"
    assert not read_only.flags.writeable


def test_tensors_of_any_dtype_and_stride(device):
    x, y = sample(300, k=9)
    x = torch.from_numpy(np.round(x * 8) / 8)  # exact in every dtype
    want = csg_ext.class_mutual_info(x, torch.from_numpy(y), ties="exact")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        t = x.to(device, dtype)
        for view in (t, t.T.contiguous().T, torch.stack([t, t], 2)[..., 1], t.clone().requires_grad_()):
            got = csg_ext.class_mutual_info(view, torch.from_numpy(y), ties="exact")
            assert got.device == t.device and got.dtype == torch.float64 and not got.requires_grad
            assert (got.cpu() - want).abs().max() < 1e-12
    counts = (8 * x).to(torch.int32)
    got = csg_ext.class_mutual_info(counts.to(device), torch.from_numpy(y).to(device), ties="exact")
    assert (got.cpu() - want).abs().max() < 1e-12  # times a power of two


def test_labels_of_any_integer_type():
    x, y = sample(200, c=3)
    want = csg_ext.class_mutual_info(x, y)
    for labels in (y.tolist(), y.astype(np.uint8), y.astype(np.int32), torch.from_numpy(y), torch.from_numpy(y).byte()):
        assert np.array_equal(csg_ext.class_mutual_info(x, labels), want)
    assert np.array_equal(csg_ext.class_mutual_info(x, y == 1), csg_ext.class_mutual_info(x, (y == 1).astype(int)))


def test_halves_whose_sum_overflows():
    x = torch.full((40000, 2), 1000.0).half() + torch.arange(40000)[:, None].half() % 64
    y = torch.arange(40000) % 2
    assert csg_ext.class_mutual_info(x, y, ties="exact").isfinite().all()


def test_moved_to_the_device_by_columns(device):
    x, y = sample(300, k=30)
    for ties in ("noise", "exact"):
        want = csg_ext.class_mutual_info(x, y, ties=ties)
        got = csg_ext.class_mutual_info(x, y, ties=ties, device=device, chunk_size=8)
        assert isinstance(got, np.ndarray) and np.abs(got - want).max() < 1e-12
        t = csg_ext.class_mutual_info(torch.from_numpy(x), y, ties=ties, device=device)
        assert t.device.type == "cpu" and np.array_equal(t.numpy(), got)


def test_opcheck(device):
    x, y = (torch.from_numpy(a).to(device) for a in sample(60, 3, 4))
    psi, bits = mutual_info._psi(60, x.device)
    noise = torch.randn(60, 3, dtype=torch.float64, device=device)
    for n, multiclass in ((noise, False), (None, False), (None, True)):
        torch.library.opcheck(torch.ops.csg_ext.class_mutual_info.default, (x, y, 4, 3, n, multiclass, psi, bits))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"features": torch.zeros(3)}, r"features must have the shape \(N, K\), got \(3,\)"),
        ({"features": torch.zeros(20, 3, dtype=torch.int64)}, "features must be float32, .* or bfloat16, got int64"),
        ({"labels": torch.zeros(20)}, r"labels must be int64 of the shape \(N,\) = \(20,\), got float32 of \(20,\)"),
        ({"num_classes": 0}, r"num_classes must be in \[1, 2\^26\), got 0"),
        ({"n_neighbors": 0}, "n_neighbors must be at least 1, got 0"),
        ({"psi": torch.zeros(20, dtype=torch.int64)}, r"psi must be int64 of the shape \(N \+ 1,\)"),
        ({"psi": torch.zeros(42, dtype=torch.int64)[::2]}, r"psi must be int64 of the shape \(N \+ 1,\)"),
        ({"psi_bits": 54}, r"psi_bits must be in \[0, 53\], got 54"),
        ({"psi_bits": -1}, r"psi_bits must be in \[0, 53\], got -1"),
        (
            {"features": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.int64)},
            r"features must have at least one sample, got \(0, 3\)",
        ),
        (
            {"features": torch.zeros(1, 1).expand(2**30, 1), "labels": torch.zeros(1, dtype=torch.int64).expand(2**30)},
            r"features must have fewer than 2\^30 samples, got 1073741824",
        ),
        ({"noise": torch.zeros(20, 3)}, "noise must be float64 of the shape of features"),
        ({"noise": torch.zeros(20, 2, dtype=torch.float64)}, "noise must be float64 of the shape of features"),
    ],
)
def test_the_operator_refuses_the_same_with_and_without_values(changed, message):
    psi, bits = mutual_info._psi(20, torch.device("cpu"))
    arguments = {
        "features": torch.rand(20, 3), "labels": torch.arange(20) % 4, "num_classes": 4, "n_neighbors": 3,
        "noise": None, "multiclass": False, "psi": psi, "psi_bits": bits,
    } | changed  # fmt: skip
    for device in ("cpu", "meta"):
        moved = {k: on_meta(v) if device == "meta" else v for k, v in arguments.items()}
        with pytest.raises(RuntimeError, match=rf"^class_mutual_info: {message}[^\n]*$"):
            torch.ops.csg_ext.class_mutual_info(**moved)


# ---- bad input, progress, interruption -------------------------------------------------------------------------------

X, Y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 4


def holed(value, *places):
    x = X.copy()
    for place in places:
        x[place] = value
    return x


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"features": holed(np.nan, (3, 2), (5, 1))}, ValueError, "features must be finite, got 2 .* column 1"),
        ({"features": holed(np.inf, (3, 2))}, ValueError, "features must be finite, got 1 .* column 2"),
        ({"features": holed(-np.inf, (3, 0)).astype(">f8")}, ValueError, "features must be finite, got 1 .* column 0"),
        ({"features": torch.from_numpy(holed(np.nan, (3, 2))).half()}, ValueError, "features must be finite, got 1 v"),
        ({"features": X[:, 0]}, ValueError, r"features must be \(N, K\), got shape \(20,\)"),
        ({"features": X[:, :0]}, ValueError, r"features must have .* one column, got shape \(20, 0\)"),
        ({"features": X[:0]}, ValueError, r"features must have .* one sample .* got shape \(0, 3\)"),
        ({"features": X.astype(complex)}, TypeError, "features must be numbers, got complex128"),
        ({"features": torch.from_numpy(X).cfloat()}, TypeError, "features must be float32, .* got complex64"),
        ({"features": torch.from_numpy(X).to(torch.float8_e5m2)}, TypeError, "features must be .* got float8_e5m2"),
        ({"features": torch.from_numpy(X).to_sparse()}, TypeError, "features must be a dense tensor, got"),
        ({"features": [["a"] * 3] * 20}, TypeError, "features must be numbers, got <U1"),
        ({"features": X[:3], "labels": Y[:3]}, ValueError, r"features must have .* \+ 1 = 4 samples, got 3"),
        ({"n_neighbors": 20}, ValueError, r"features must have at least n_neighbors \+ 1 = 21 samples, got 20"),
        ({"features": torch.zeros(1, 1).expand(2**30, 1)}, ValueError, r"features must have fewer .* got 1073741824"),
        ({"labels": Y[:19]}, ValueError, r"labels must be \(20,\) like the features' first axis, got shape \(19,\)"),
        ({"labels": Y[:, None]}, ValueError, r"labels must be \(20,\) like .* got shape \(20, 1\)"),
        ({"labels": Y.astype(float)}, ValueError, "labels must be integers, got float64"),
        ({"labels": torch.from_numpy(Y).float()}, ValueError, "labels must be integers, got float32"),
        ({"labels": ["a"] * 20}, ValueError, "labels must be integers, got <U1"),
        ({"labels": Y - 1}, ValueError, "labels must be non-negative, got -1"),
        ({"labels": Y.astype(np.int64) << 60}, ValueError, r"labels must be class indices and num_classes at"),
        ({"num_classes": 2**31}, ValueError, r"labels must be .* at most 2\^24, got 2147483648 classes"),
        ({"labels": torch.from_numpy(Y).to_sparse()}, TypeError, "labels must be a dense tensor, got layout"),
        ({"labels": [[0], [1, 2]]}, ValueError, "labels must be an array, got list: "),
        ({"features": torch.zeros(20, 3, device="meta")}, ValueError, "features must hold values, got a tensor on"),
        ({"device": ["cpu"]}, ValueError, r"device must be the name of a torch device, got \['cpu'\]"),
        ({"labels": Y, "num_classes": 3}, ValueError, r"labels must lie in \[0, 3\), got 3"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 4.0}, TypeError, "num_classes must be an integer, got 4.0"),
        ({"labels": Y * 0 + 2}, ValueError, "labels must hold at least two classes, got class 2 only"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors must be at least 1, got 0"),
        ({"n_neighbors": -3}, ValueError, "n_neighbors must be at least 1, got -3"),
        ({"n_neighbors": 3.0}, TypeError, "n_neighbors must be an integer, got 3.0"),
        ({"n_neighbors": True}, TypeError, "n_neighbors must be an integer, got True"),
        ({"ties": "jitter"}, ValueError, "ties must be 'noise' or 'exact', got 'jitter'"),
        ({"protocol": "one"}, ValueError, "protocol must be 'one-vs-rest' or 'balanced', got 'one'"),
        ({"random_state": None}, TypeError, "random_state must be an integer, got None"),
        ({"random_state": 2**32}, ValueError, r"random_state must be in \[0, 2\^32\), got 4294967296"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"device": "abacus"}, ValueError, "device must be the name of a torch device, got 'abacus'"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = {"features": X, "labels": Y} | changes
    with pytest.raises(error, match=f"^class_mutual_info: {message}"):
        csg_ext.class_mutual_info(arguments.pop("features"), arguments.pop("labels"), **arguments)


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="^class_mutual_info: device 'cuda' needs a GPU that this torch can use, got no"
    ):
        csg_ext.class_mutual_info(X, Y, device="cuda")


def test_bad_labels_of_class_entropy():
    for labels, message in (([0.5], "must be integers"), ([], "at least one sample"), ([-1], "must be non-negative")):
        with pytest.raises(ValueError, match=f"class_entropy: labels .*{message}"):
            csg_ext.class_entropy(np.array(labels, float if labels == [0.5] else int))
    with pytest.raises(ValueError, match="class_entropy: protocol must be"):
        csg_ext.class_entropy([0, 1], protocol="even")


def test_progress():
    calls = []
    x, y = sample(100, k=20)
    csg_ext.class_mutual_info(x, y, chunk_size=8, progress=lambda *call: calls.append(call))
    assert calls == [(8, 20), (16, 20), (20, 20)]


def test_ctrl_c_between_chunks():
    x, y = np.random.default_rng(0).standard_normal((2000, 256)), np.arange(2000) % 10
    done = []

    def progress(columns, total):
        done.append(columns)
        if len(done) == 1:
            threading.Timer(0.02, interrupt_main).start()

    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            csg_ext.class_mutual_info(x, y, chunk_size=8, ties="exact", progress=progress)
            time.sleep(0.001)
    assert 1 <= len(done) < 200 * 32


def test_infinite_variance_is_named():
    x = np.random.default_rng(0).standard_normal((50, 3))
    x[:, 1] *= 1e200
    y = np.arange(50) % 3
    with pytest.raises(ValueError, match="finite variance .* in column 1"):
        csg_ext.class_mutual_info(x, y)
    with pytest.raises(ValueError, match="finite variance .* in column 1"):
        csg_ext.mutual_info_classif(x, y)
    assert np.array_equal(
        csg_ext.class_mutual_info(x, y, ties="exact"), csg_ext.class_mutual_info(x / [1, 2.0**600, 1], y, ties="exact")
    )
