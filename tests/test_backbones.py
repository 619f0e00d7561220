"""Backbones by name, their first weights from files, and csg-ext train with a network of timm."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_zoo import timm
from safetensors.torch import load_file, save_file
from short_run import SHORT

from csg_ext import cli, metrics
from csg_ext.data import ImageData
from csg_ext.nn import GatedModel, TimmBackbone, build_backbone
from csg_ext.nn.backbones import check_maps
from csg_ext.training.arm import predict
from csg_ext.training.config import TrainConfig
from csg_ext.training.network import build_model, check_network, initial_model
from csg_ext.training.weights import load_backbone

SMALL = "resnet10t"


@pytest.mark.parametrize(
    "name, channels", [("resnet10t", 1), ("mobilenetv3_small_050", 3), ("convnext_atto", 3), ("densenet121", 1)]
)
def test_a_network_of_timm_gives_the_map_before_its_pooling(name, channels):
    backbone = build_backbone(f"timm/{name}", channels).eval()
    x = torch.randn(2, channels, 64, 48)
    maps = backbone(x)
    assert maps.dim() == 4 and maps.shape[1] == backbone.num_filters
    model = GatedModel(backbone, 3)
    assert model(x).shape == (2, 3) and model(x, torch.tensor([0, 2])).shape == (2, 3)
    assert not any("classifier" in k or k.startswith("net.fc") for k in backbone.state_dict())
    check_maps(backbone, name, [(channels, 64, 48), (channels, 96, 96)])
    assert not backbone.training


@pytest.mark.parametrize(
    "name",
    ["vgg", "timm/", "timm/hf-hub:a", "timm/hf_hub:a/b", "timm/local-dir:x", "timm/../a", "timm/a b", "timm/a\n"],
)
def test_names_that_are_none(name):
    for build in (build_backbone, lambda name: TrainConfig(model=name)):
        with pytest.raises(
            ValueError, match="must be one of resnet20, resnet32, resnet44, resnet56 or timm/NAME, got '"
        ):
            build(name)


def test_a_model_that_timm_does_not_have_and_timm_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="timm has no model 'resnt18', but resnet18 and .*"):
        build_backbone("timm/resnt18")
    with pytest.raises(ValueError, match="timm has no model 'zzzzzz'$"):
        build_backbone("timm/zzzzzz")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm/resnet18 needs the package timm, which is not installed: pip install"):
        build_backbone("timm/resnet18")


def test_networks_without_a_map_and_images_too_small():
    def check(name, side):
        check_maps(build_backbone(name), name, [(3, side, side)])

    with pytest.raises(
        ValueError, match=r"a last map \(N, 192, H, W\), got timm/vit_tiny_patch16_224, which gives \(1, 197"
    ):
        check("timm/vit_tiny_patch16_224", 224)
    with pytest.raises(ValueError, match=r"a last map \(N, 768, H, W\), got timm/swin.*, which gives \(1, 7, 7, 768\)"):
        check("timm/swin_tiny_patch4_window7_224", 224)
    with pytest.raises(ValueError, match="images of 64 x 64 pixels, got timm/swin.*, which fails with: Input height"):
        check("timm/swin_tiny_patch4_window7_224", 64)


def test_filters_that_no_convolution_makes_have_no_kernels():
    assert metrics.kernel_similarity(build_backbone("timm/densenet121"), 1024) is None
    backbone = build_backbone("resnet20", 1)
    expected = metrics.filter_similarity(metrics.last_convolution(backbone, 64).weight.detach())
    assert np.array_equal(metrics.kernel_similarity(backbone, 64), expected)


@pytest.mark.parametrize(
    ("name", "width", "conv"),
    [("resnet10t", 512, "layer4.0.conv2"), ("seresnet18", 512, "layer4.1.conv2"), ("resnet50", 2048, "layer4.2.conv3")],
)
def test_kernels_are_those_before_the_sum_and_the_excitation(name, width, conv):
    backbone = build_backbone(f"timm/{name}")
    assert metrics.last_convolution(backbone, width) is backbone.net.get_submodule(conv)


def test_a_run_whose_filters_have_no_kernels_is_measured_and_drawn_without(run, tmp_path, monkeypatch):
    whole = tmp_path / "with"
    assert cli.main(["evaluate", str(run[0]), "--output", str(whole)]) == 0
    monkeypatch.setattr(metrics, "kernel_similarity", lambda model, num_filters: None)
    assert cli.main(["evaluate", str(run[0]), "--output", str(tmp_path / "without")]) == 0
    a, b = (json.loads((tmp_path / f / "evaluation.json").read_text())["checkpoints"][1] for f in ("with", "without"))
    left_out = a["measures"].keys() - b["measures"].keys()
    assert left_out == {f"block_score{part}_{by}" for part in ("", "_p_value") for by in ("gate", "mi")}
    assert all(b["measures"][name] == a["measures"][name] for name in b["measures"])
    assert {f.name for f in whole.iterdir()} - {f.name for f in (tmp_path / "without").iterdir()} == {
        "filter_similarity_std.png",
        "filter_similarity_csg.png",
    }
    assert cli.main(["report", str(run[0]), "--output", str(tmp_path / "page")]) == 0
    assert "Similarity of the kernels" not in (tmp_path / "page" / "report.html").read_text()


# ---- first weights


def _save(state, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", [SMALL, "mobilenetv3_small_050"])
@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "nested.pth", "old.pth"])
def test_weights_of_the_whole_network(tmp_path, name, file):
    whole = timm.create_model(name, num_classes=5).eval()
    for part in whole.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    state = whole.state_dict()
    if file == "nested.pth":
        state = {"state_dict": state, "epoch": 3}
    if file == "old.pth":
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    backbone = build_backbone(f"timm/{name}", 3).eval()
    load_backbone(backbone, _save(state, tmp_path / file), name)
    x = torch.randn(2, 3, 64, 64)
    whole.reset_classifier(0, "")
    assert torch.equal(backbone(x), whole(x))


def test_grey_images_get_the_answer_that_they_get_in_three_channels(tmp_path):
    whole = timm.create_model("resnet18").eval()
    backbone = build_backbone("timm/resnet18", 1).eval()
    load_backbone(backbone, _save(whole.state_dict(), tmp_path / "w.safetensors"), "timm/resnet18")
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(backbone(x), whole.forward_features(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_weights_that_do_not_fit(tmp_path):
    backbone = build_backbone(f"timm/{SMALL}", 3)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}

    def load(state, file="w.pth"):
        load_backbone(backbone, _save(state, tmp_path / file), f"timm/{SMALL}")

    good = timm.create_model(SMALL).state_dict()
    with pytest.raises(ValueError, match=r"w.pth: expected the weights of timm/resnet10t, got others: .* are missing"):
        load(timm.create_model("resnet18").state_dict())
    with pytest.raises(ValueError, match=r"1 are missing \(net.bn1.weight\), 1 are unknown \(net.other\)"):
        load({k: v for k, v in good.items() if k != "bn1.weight"} | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected finite weights, got 1 values of NaN"):
        load(good | {"bn1.weight": good["bn1.weight"].index_fill(0, torch.tensor([1]), torch.nan)})
    with pytest.raises(ValueError, match=r"w.pth: expected a state dict, got list"):
        load([1, 2])
    with pytest.raises(ValueError, match=r"w.pth: expected a state dict, got one that holds more than tensors"):
        load({"a": Path("x")})
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"cut.safetensors: expected a safetensors file, got one that fails"):
        load_backbone(backbone, tmp_path / "cut.safetensors", SMALL)
    with pytest.raises(FileNotFoundError):
        load_backbone(backbone, tmp_path / "none.pth", SMALL)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_the_backbone_of_another_run(run, tmp_path):
    trained = load_file(run[0] / "csg" / "model.safetensors")
    images = np.zeros((4, 1, 8, 8), np.uint8)
    data = ImageData("other", images, np.arange(4) % 2, images, np.arange(4) % 2, ["a", "b"])  # of other classes
    for file in ("csg/model.safetensors", "csg/last.ckpt"):
        model = initial_model(TrainConfig(weights=str(run[0] / file)), data)
        assert all(torch.equal(v, trained[f"backbone.{k}"]) for k, v in model.backbone.state_dict().items())
        assert torch.equal(model.classifier.weight, build_model(TrainConfig(), data).classifier.weight)
        assert bool((model.gate == 0.5).all())


def test_large_images_are_measured_in_smaller_batches():
    model = GatedModel(build_backbone("resnet20", 1), 3)
    images, sizes = np.random.default_rng(0).integers(0, 256, (5, 1, 640, 640), np.uint8), []
    model.backbone.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    features, logits = predict(model, images, ([0.5], [0.25]))
    assert sizes == [2, 2, 1] and features.shape == (5, 64) and logits.shape == (5, 3)
    predict(model, images[:, :, :28, :28], ([0.5], [0.25]))
    assert sizes[3:] == [5]


# ---- a run


@pytest.fixture
def timm_in_workers(tmp_path, monkeypatch):
    """timm and torchvision in the arms' processes too; see model_zoo."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import model_zoo\n")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_run_with_pretrained_weights_and_what_reads_it(timm_in_workers, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(3)
    labels = np.arange(60) % 3
    images = rng.integers(0, 60, (60, 3, 32, 32), np.uint8)
    images[np.arange(60), labels] += 150
    data = tmp_path / "data.npz"
    ImageData("colours", images[:42], labels[:42], images[42:], labels[42:], ["red", "green", "blue"]).save(data)
    weights = _save(timm.create_model(SMALL).state_dict(), tmp_path / "w.safetensors")
    folder = tmp_path / "out"
    options = ["--data", str(data), "--output", str(folder), *SHORT, "--batch-size", "14", "--lr", "0.02"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--model", f"timm/{SMALL}", "--weights", "w.safetensors", *options]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["weights"] == str(weights) and summary["config"]["model"] == f"timm/{SMALL}"
    assert summary["std"]["accuracy"] > 0.9 and summary["csg"]["accuracy"] > 0.9
    assert (folder / "report.html").exists() and (folder / "filter_similarity_csg.png").exists()
    weights.unlink()  # the run's own weights are all that is needed from here on
    assert cli.main(["train", "--resume", "--output", str(folder), "--weights", "w.safetensors"]) == 0
    assert cli.main(["evaluate", str(folder), "--output", str(tmp_path / "e")]) == 0
    measured = json.loads((tmp_path / "e" / "evaluation.json").read_text())["checkpoints"]
    assert [c["measures"]["accuracy"] for c in measured] == [summary[arm]["accuracy"] for arm in ("std", "csg")]
    np.save(tmp_path / "masks.npy", images[42:, 0] > 30)
    for command in (
        ["localize", str(folder), "--masks", "masks.npy"],
        ["detect", str(folder / "csg"), "--images", "6", "--epsilons", "90", "--train-epsilon", "90", "--weights"],
        ["mis", str(folder / "csg")],
        ["report", str(folder)],
    ):
        assert cli.main(command) == 0, command
    capsys.readouterr()
    assert cli.main(["train", "--resume", "--output", str(folder), "--weights", "other.pth"]) == 2
    assert "--resume continues with the run's own settings: weights was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "timm/resnt10t"], "timm has no model 'resnt10t', but"),
        (["--model", "timm/vit_tiny_patch16_224"], "model must take images of 20 x 20 pixels, got timm/vit_tiny"),
        (["--weights", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert cli.main(["train", "--output", str(tmp_path / "out"), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_network_is_checked_at_every_size_of_the_run():
    images = np.zeros((4, 3, 40, 60), np.uint8)
    data = ImageData("wide", images, np.arange(4) % 2, images, np.arange(4) % 2, ["a", "b"])
    check_network(TrainConfig(model=f"timm/{SMALL}"), data)
    assert isinstance(build_model(TrainConfig(model=f"timm/{SMALL}"), data).backbone, TimmBackbone)
