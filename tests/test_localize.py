"""Tests of csg-ext localize: a network whose filters are known, the command on a run, what it refuses."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from csg_ext import cli, localize
from csg_ext.analysis import localization as loc
from csg_ext.data import load_images
from csg_ext.nn import GatedModel
from csg_ext.runs import SOURCE, load_source
from csg_ext.training.config import TrainConfig
from csg_ext.training.network import build_model

# ---- a network whose filters are known


def _squares(labels):
    """16 x 16 images with a 4 x 4 square of the class's colour (red, green, blue) for each label (N, objects)."""
    images = np.zeros((len(labels), 3, 16, 16), np.uint8)
    masks = torch.zeros(*labels.shape, 16, 16, dtype=torch.bool)
    for i, classes in enumerate(labels.tolist()):
        for q, c in enumerate(classes):
            square = (slice(2 + i % 9, 6 + i % 9), slice(1 + 8 * q, 5 + 8 * q))
            images[i, c][square] = 255
            masks[i, q][square] = True
    return images, masks


@pytest.fixture
def planted():
    """Filters red, green, blue and dead; the gate gives blue to green's class: the class of blue has none."""
    model = GatedModel(torch.nn.Conv2d(3, 4, 1, bias=False), 3, 4)
    with torch.no_grad():
        model.backbone.weight.copy_(torch.eye(4, 3)[:, :, None, None])
        model.classifier.weight.fill_(1)
        model.classifier.bias.zero_()
        model.gate.copy_(torch.tensor([[1.0, 0, 0.1, 1], [0, 1, 1, 0.5], [0.2, 0, 0.3, 0]]))
    labels = torch.arange(30)[:, None] % 3
    images, masks = _squares(labels)
    part = localize.Part(images, labels[:, 0], masks[:, 0])
    pairs = torch.tensor([[0, 1], [1, 0]] * 5)
    found, both = _squares(pairs)
    return model, localize.Scenes(part, part, localize.Part(found, pairs, both), 0)


def test_filters_and_gate_of_a_planted_network_find_their_class(planted):
    model, data = planted
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings())
    json.dumps(found, allow_nan=False)
    assert found["filters"]["class"] == [0, 1, 2, -1] and found["filters"]["dead"] == [3]
    assert found["filters"]["gate_class"] == [0, 1, 1, 0]
    assert found["filters"]["without_class"] == 1 and found["classes_without_filter"] == [2]
    assert found["filters"]["gate_class_agreement"] == pytest.approx(2 / 3)
    assert found["filters"]["mean"] == {"iou": 1, "success": 1, "pointing": 1, "energy": pytest.approx(1)}
    # Of the filters that belong to each class by the gate, blue and the dead one never see it.
    assert found["filters"]["mean_on_gate_class"]["iou"] == 0.5
    gate = found["methods"]["gate"]["per_class"]
    for score in ("iou", "box_iou", "pointing", "energy"):
        assert gate[score] == pytest.approx([1, 1, 0])
    assert found["methods"]["cam"]["iou"] == 1  # every filter weighs the same, and there is one object
    assert found["query"]["gate"]["energy"] == pytest.approx(1) and found["query"]["gate"]["picked"] == 1
    assert found["query"]["cam"]["energy"] == 0.5 and found["query"]["cam"]["picked"] == 0.5
    assert found["images_wrong"] == 20  # all logits are equal: the first class


def test_images_that_the_network_gets_wrong_can_be_left_out(planted):
    model, data = planted
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings(only_correct=True))
    assert found["images"] == 10 and found["images_wrong"] == 20
    assert found["methods"]["gate"]["iou"] == 1
    assert found["methods"]["gate"]["per_class"]["iou"] == [1, None, None]
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0, 1]))
        model.classifier.weight[2] = 0
    wrong = localize.Part(data.scored.images, torch.ones(30, dtype=torch.int64), data.scored.masks)
    with pytest.raises(ValueError, match="only_correct leaves no image: the network gets every one wrong"):
        localize.localize(
            model,
            localize.Scenes(wrong, wrong, None, 0),
            ([0.0] * 3, [255.0] * 3),
            localize.Settings(only_correct=True),
        )


def test_filters_of_a_class_without_an_image_are_in_no_mean(planted):
    model, data = planted  # the network gives every image to the first class: none of the others is scored
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings(only_correct=True))["filters"]
    assert found["class"] == [0, 1, 2, -1] and found["dead"] == [3]  # green and blue see their classes' images
    assert found["without_images"] == 2 and found["without_class"] == 1
    assert found["mean"] == {"iou": 1, "success": 1, "pointing": 1, "energy": pytest.approx(1)}
    assert found["per_class"]["filters"] == [1, 1, 1] and found["per_class"]["iou"] == [1, None, None]
    assert found["per_filter"]["iou"] == [1, None, None, 0]
    assert found["mean_on_gate_class"]["iou"] == 0.5  # red and the dead one


def test_without_a_gate_gradients_take_the_filters_that_find_the_class(planted):
    model, data = planted
    with torch.no_grad():
        model.gate.fill_(0.5)
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings())
    reason = "the checkpoint has no trained gate: its entries are all 0.5"
    assert found["methods"]["gate"] == found["query"]["gate"] == {"unavailable": reason}
    assert "gate_class" not in found["filters"] and found["classes_without_filter"] == []


@pytest.mark.parametrize("name", ["above", "top", "success"])
@pytest.mark.parametrize("value", [0, 1, float("nan")])
def test_shares_outside_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\), got {value}"):
        localize.Settings(**{name: value})
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        localize.Settings(chunk=0)


# ---- the command


@pytest.fixture
def masks(digits, tmp_path):
    """Masks of the digits (what is brighter than half) and pairs of two of them side by side, as an .npz."""
    data = load_images(digits)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 137, (2, 12))
    pairs = np.concatenate([data.test_images[first][..., ::2], data.test_images[second][..., ::2]], 3)
    pair_masks = np.stack([pairs[:, 0] > 100] * 2, 1)
    pair_masks[:, 0, :, 4:], pair_masks[:, 1, :, :4] = False, False
    arrays = {
        "test_masks": data.test_images[:, 0] > 120,
        "train_masks": data.train_images[:, 0] > 120,
        "pair_images": pairs,
        "pair_labels": np.stack([data.test_labels[first], data.test_labels[second]], 1),
        "pair_masks": pair_masks,
    }
    arrays["test_masks"][[3, 8]] = False
    file = tmp_path / "masks.npz"
    np.savez(file, **arrays)
    return file, arrays


def _localize(capsys, *arguments):
    status = cli.main(["localize", *map(str, arguments), "--device", "cpu"])
    return status, *capsys.readouterr()


def test_command_scores_both_arms(run, digits, masks, tmp_path, capsys):
    file, arrays = masks
    status, out, err = _localize(capsys, run[0], "--data", digits, "--masks", file, "--output", tmp_path / "out")
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "localization.json").read_text())
    std, csg = report["checkpoints"]
    assert (std["name"], csg["name"]) == ("std", "csg")
    assert report["data"]["empty_masks"] == 2 and std["images"] == csg["images"] == 135
    assert "2 with an empty mask are left out" in out
    assert "std: no map of the gate, as the checkpoint has no trained gate: its entries are all 0.5" in out
    assert "unavailable" in std["methods"]["gate"] and "unavailable" in std["query"]["gate"]
    kept = np.setdiff1d(np.arange(137), [3, 8])
    assert csg["mask_area"] == pytest.approx(arrays["test_masks"][kept].mean())
    assert csg["filters"]["count"] == 64 == len(csg["filters"]["per_filter"]["iou"])
    for arm, methods in ((std, ("cam", "gradient")), (csg, ("cam", "gradient", "gate"))):
        for method in methods:
            found = arm["methods"][method]
            assert found["best_iou"] == max(found["sweep"]["iou"])
            assert 0 <= found["energy"] <= 1 and 0 < arm["query"][method]["energy"] < 1
            assert list(found["average_precision"].values()) == sorted(found["average_precision"].values())[::-1]
        assert len(arm["query"]["cam"]["per_class"]["energy"]) == 3


def test_command_scores_what_the_functions_score(run, digits, masks, tmp_path, capsys):
    from csg_ext.data.batches import normalise
    from csg_ext.runs import checkpoint_files, read_checkpoint, restore

    file, arrays = masks
    assert _localize(capsys, run[0], "--data", digits, "--masks", file, "--output", tmp_path)[0] == 0
    csg = json.loads((tmp_path / "localization.json").read_text())["checkpoints"][1]
    data = load_images(digits)
    model = restore(read_checkpoint(checkpoint_files(run[0])[1]), data).eval()
    kept = torch.from_numpy(np.setdiff1d(np.arange(137), [3, 8]))
    x, labels = normalise(data.test_images[kept], *data.statistics()), torch.from_numpy(data.test_labels)[kept]
    with torch.no_grad():
        maps = model.forward_features(x)
        found = loc.gate_map(maps, model.gate, labels)
    masks = torch.from_numpy(arrays["test_masks"])[kept]
    up = F.interpolate(found[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0].double()
    region = up > 0.2 * up.amax((1, 2), keepdim=True)
    iou = ((region & masks).sum((1, 2)).double() / (region | masks).sum((1, 2))).mean()
    share = ((up * masks).sum((1, 2)) / up.sum((1, 2)).clamp(min=1e-9)).mean()
    assert csg["methods"]["gate"]["iou"] == pytest.approx(float(iou), abs=2e-3)
    assert csg["methods"]["gate"]["energy"] == pytest.approx(float(share), abs=1e-4)
    threshold = loc.activation_thresholds(maps)
    assert csg["filters"]["threshold"] == pytest.approx(threshold.tolist(), abs=1e-5)


def test_pairs_must_be_whole_and_fit(digits, masks):
    data, arrays = load_images(digits), masks[1]
    for change, message in (
        (
            {"classes": np.array(["2", "1", "0"])},
            r"pair_labels count .* order, \['0', '1', '2'\], got \['2', '1', '0'\]",
        ),
        ({"pair_labels": None}, "scenes of two objects need .* got no pair_labels"),
        ({"pair_labels": arrays["pair_labels"] + 1}, r"pair_labels must be \(12, 2\) with classes in \[0, 3\)"),
        ({"pair_images": arrays["pair_images"][:, :, :4]}, r"pair_images must be uint8 \(M, 1, 8, 8\)"),
        ({"pair_masks": arrays["pair_masks"][:, :1]}, r"pair_masks must be \(12, 2, 8, 8\)"),
        ({"pair_masks": arrays["pair_masks"] & False}, "expected scenes of two objects with masks that are not empty"),
    ):
        odd = {key: value for key, value in (arrays | change).items() if value is not None}
        with pytest.raises(ValueError, match=f"masks: {message}"):
            localize.masked_scenes(data, odd)
    arrays["pair_masks"][2, 1] = False
    assert len(localize.masked_scenes(data, arrays).pairs.labels) == 11


def test_command_without_train_masks_chooses_on_images_that_it_does_not_score(run, digits, masks, tmp_path, capsys):
    np.save(tmp_path / "masks.npy", masks[1]["test_masks"].astype(np.uint8) * 255)
    arguments = ("--data", digits, "--masks", tmp_path / "masks.npy", "--output", tmp_path)
    status, out, err = _localize(capsys, run[0] / "csg", *arguments)
    assert status == 0, err
    report = json.loads((tmp_path / "localization.json").read_text())
    assert report["checkpoints"][0]["images"] == 67 and report["data"]["images_that_choose"] == 68
    assert "query" not in report["checkpoints"][0]


def test_command_can_leave_out_what_the_network_gets_wrong(run, digits, masks, tmp_path, capsys):
    arguments = (run[0], "--data", digits, "--masks", masks[0], "--output", tmp_path, "--only-correct")
    assert _localize(capsys, *arguments)[0] == 0
    for arm in json.loads((tmp_path / "localization.json").read_text())["checkpoints"]:
        assert arm["images"] == 135 - arm["images_wrong"]


def test_example_draws_what_the_gate_picks(run, digits, masks, tmp_path, monkeypatch, capsys):
    with np.load(digits) as images:
        np.savez(tmp_path / "scenes.npz", **images, **masks[1])
    picture = tmp_path / "maps.png"
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("sys.argv", ["example", str(run[0] / "csg"), str(tmp_path / "scenes.npz"), str(picture), "2"])
    runpy.run_path("examples/localization.py", run_name="__main__")
    assert "2 scenes; energy on the queried object 0." in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_masks_that_do_not_fit(run, digits, masks, tmp_path, capsys):
    good = masks[1]["test_masks"]
    for array, message in (
        (good[:, :4], r"masks: test_masks must be (137, 8, 8), like the images, got (137, 4, 8)"),
        (good[:9], r"masks: test_masks must be (137, 8, 8), like the images, got (9, 8, 8)"),
        (good.astype(np.float32), "masks: test_masks must be bool, or uint8 with 0 outside the object, got float32"),
        (good.astype(np.uint8) + 1, "masks: test_masks must hold 0 and one other value, got also [1, 2]"),
        (np.zeros_like(good), "masks: expected masks that are not empty in every part, got none"),
    ):
        np.save(tmp_path / "bad.npy", array)
        arguments = (run[0], "--data", digits, "--masks", tmp_path / "bad.npy", "--output", tmp_path / "out")
        status, _, err = _localize(capsys, *arguments)
        assert status == 2 and err == f"csg-ext localize: error: {message}\n"
        assert not (tmp_path / "out").exists()
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    status, _, err = _localize(capsys, run[0], "--data", digits, "--masks", tmp_path / "bad.npz")
    assert status == 2 and "masks: expected a readable NumPy file" in err
    np.save(tmp_path / "objects.npy", good.astype(object))
    (tmp_path / "text.npy").write_text("no array")
    for name, reason in (("objects", "it holds pickled objects, which are never read"), ("text", "it is no .npy")):
        status, _, err = _localize(capsys, run[0], "--data", digits, "--masks", tmp_path / f"{name}.npy")
        assert status == 2 and f"{name}.npy, which fails with: {reason}" in err
    alone = tmp_path / "alone" / "csg" / "model.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run[0] / "csg" / "model.safetensors").read_bytes())
    status, _, err = _localize(capsys, alone)
    assert status == 2 and "holds weights alone" in err
    status, _, err = _localize(capsys, run[0], "--data", digits)
    assert status == 2 and f"masks: expected the array test_masks in {digits}" in err


def _stored_run(folder, source):
    """A run's folder with the weights of an arm before training; its images."""
    data, config = load_source(source), TrainConfig()
    stored = {"config": config.as_dict(), "source": source, "sha256": data.fingerprint()}
    (folder / "std").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(stored | {"statistics": data.statistics()}))
    weights = {name: w.contiguous() for name, w in build_model(config, data).state_dict().items()}
    save_file(weights, folder / "std" / "model.safetensors")
    return data


def test_masks_of_the_images_inside_the_package(tmp_path, capsys):
    data = _stored_run(tmp_path, SOURCE | {"classes": ["Bag", "Trouser"]})
    arguments = (tmp_path / "std", "--output", tmp_path / "out")
    status, _, err = _localize(capsys, *arguments)
    assert status == 2 and err.endswith(
        "error: the masks must be given as --masks FILE, as the set inside the package holds none\n"
    )
    np.save(tmp_path / "masks.npy", data.test_images[:, 0] > 100)
    status, out, err = _localize(capsys, *arguments, "--masks", tmp_path / "masks.npy")
    assert status == 0, err
    assert "28x28, 2 classes" in out
    report = json.loads((tmp_path / "out" / "localization.json").read_text())
    assert report["checkpoints"][0]["images"] == 200  # every second one chooses the filters' classes


def test_without_data_the_run_s_own_images_are_scored(digits, masks, tmp_path, capsys):
    scenes = tmp_path / "scenes.npz"
    with np.load(digits) as images:
        arrays = dict(images)
    np.savez(scenes, **arrays, **masks[1])
    _stored_run(tmp_path / "whole", SOURCE | {"data": str(scenes)})
    held = _stored_run(tmp_path / "held", SOURCE | {"data": str(scenes), "hold_out": 60})
    output = ("--output", tmp_path / "out")
    status, out, err = _localize(capsys, tmp_path / "whole" / "std", *output)
    assert status == 0 and "Localizing on scenes: 135 test images" in out, err
    status, _, err = _localize(capsys, tmp_path / "whole" / "std", "--image-size", "9", *output)
    assert status == 2 and "--image-size applies to --data, which is not given" in err
    status, _, err = _localize(capsys, tmp_path / "held" / "std", *output)
    assert status == 2 and f"as those of {scenes} are not of the images that the run chose by --hold-out" in err
    np.save(tmp_path / "masks.npy", held.test_images[:, 0] > 120)
    status, out, err = _localize(capsys, tmp_path / "held" / "std", "--masks", tmp_path / "masks.npy", *output)
    assert status == 0 and f"(validation: {len(held.test_labels)} of its train images)" in out, err
    arrays["test_images"] = arrays["test_images"][::-1]
    np.savez(scenes, **arrays, **masks[1])
    status, _, err = _localize(capsys, tmp_path / "whole" / "std", *output)
    assert status == 2 and f"expected the images that the run saw, got others from {scenes}" in err
