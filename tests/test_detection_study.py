"""The script that scores adversarial-sample detection over seeds: from a finished run to the tables in the page."""

import copy
import json
import shutil

import pytest
from example_scripts import load_study

SETTINGS = {
    "--images": ["60"],
    "--epsilons": ["60"],
    "--train-epsilon": ["60"],
    "--steps": ["2"],
    "--weights": ["1", "10"],
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    return load_study("detect", tmp_path, monkeypatch)


def row(text, *start):
    """The cells of the one row that starts so, without those of the start."""
    (found,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    return [cell.strip() for cell in found.strip("|").split("|")][len(start) :]


def test_a_finished_run_is_attacked_and_tabulated(script, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "demo-0")
    script.run([0], SETTINGS, tmp_path)
    found = json.loads((script.RESULTS / "seed-0.json").read_text())
    report = json.loads((tmp_path / "demo-0" / "detect" / "detection.json").read_text())
    assert found["options"][:2] == ["--images", "60"] and found["settings"]["steps"] == 2
    for arm in report["checkpoints"]:
        kept = found["arms"][arm["name"]]
        assert list(kept["attacks"]) == [a["name"] for a in arm["attacks"]]
        for attack in arm["attacks"]:
            for d, measures in attack["detectors"].items():
                for key in script.MEASURES:
                    got, wanted = kept["attacks"][attack["name"]][key][d], list(measures[key].values())
                    assert got == wanted or got == pytest.approx(wanted, abs=1e-4)

    script.PAGE.write_text(f"before\n{script.BEGIN}\nstale\n<!-- end -->\nafter\n")
    script.report()
    page = script.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "stale" not in page and "nan" not in page
    for arm in report["checkpoints"]:
        first = arm["attacks"][0]
        changed, *cells = row(page.split("**TPR")[0], first["name"], arm["name"].upper())
        assert changed == f"{first['changed'] / arm['benign']:.0%}"
        v, low, high = first["detectors"]["forest"]["auroc"].values()
        numbers = [float(x.strip("[],")) for x in cells[0].split()]
        assert numbers == pytest.approx([v, low, high], abs=0.0051)
    evading = report["checkpoints"][1]["attacks"][-1]["detectors"]["score"]["evaded"]["value"]
    name = report["checkpoints"][1]["attacks"][-1]["name"]
    assert float(row(page, f"Share that evades the score, {name}")[1][:-1]) == pytest.approx(100 * evading, abs=0.51)

    script.PAGE.write_text("no marks")
    with pytest.raises(SystemExit, match="must hold the lines"):
        script.report()
    (script.RESULTS / "seed-1.json").write_text(json.dumps({**found, "options": []}))
    with pytest.raises(SystemExit, match="results of one set of options"):
        script.report()


@pytest.fixture
def planted(script):
    """Two seeds: in "plain" the score is better on CSG in both, softmax in one; "dull" changes nothing."""

    def measures(score, softmax):
        values = {"score": score, "softmax": softmax}
        return {d: values.get(d, [0.5, 0.4, 0.6]) for d in script.DETECTORS}

    def arm(shift):
        plain = {key: measures([0.7 + shift, 0.6, 0.8], [0.9, 0.8, 1.0]) for key in script.MEASURES}
        none = {key: measures([None] * 3, [None] * 3) for key in script.MEASURES}
        return {
            "test_images": 100,
            "benign": 80,
            "train_images": {"fit_attacked": 70},
            "fpr": measures([0.05, 0.0, 0.1], [0.05, 0.0, 0.1]),
            "attacks": {
                "plain": {"changed": 40, "target_reached": None, **plain},
                "dull": {"changed": 0, "target_reached": None, **none},
                "adaptive 8/255": {"changed": 80, "target_reached": None, **plain},
            },
        }

    def seed(number, shift, softmax):
        zero = {d: [0.0, -0.1, 0.1] for d in script.DETECTORS}
        change = {"auroc": {**zero, "score": [shift, 0.01, 0.3], "softmax": softmax}}
        return {
            "seed": number,
            "options": ["--images", "100"],
            "config": {"model": "resnet20", "epochs": 12, "lambda_2": 0.1},
            "machine": "m",
            "versions": {"torch": "t"},
            "date": "2020-01-01",
            "accuracy": {"std": 0.9, "csg": 0.91},
            "arms": {"std": arm(0), "csg": arm(shift)},
            "difference": {name: copy.deepcopy(change) for name in ("plain", "dull", "adaptive 8/255")},
        }

    return [seed(0, 0.1, [0.2, 0.1, 0.3]), seed(1, 0.2, [0.0, -0.2, 0.1])]


def test_seeds_are_put_together(script, planted):
    text = script.tables(planted)
    auroc = text.split("**TPR")[0]
    assert row(auroc, "plain", "CSG")[0] == "50%" and row(auroc, "plain", "CSG")[3] == "0.85 [0.60, 0.80]"
    assert row(auroc, "dull", "STD")[3] == "-"
    difference = text.split("**AUROC, CSG - STD**")[1]
    assert row(difference, "plain")[2:4] == ["**+0.15 [+0.01, +0.30]**", "+0.10 [-0.20, +0.30]"]
    question = "Does {} find more on CSG than on STD (AUROC, in every seed)?"
    assert row(text, question.format("score")) == ["more: 2, less: 0, not distinguishable: 0"]
    assert row(text, question.format("softmax")) == ["more: 0, less: 0, not distinguishable: 2"]
    assert row(text, "Is score on CSG above both baselines on STD (mean AUROC)?") == ["for 0 of 2"]
    assert row(text, "Which detector is best on CSG (mean AUROC)?") == ["forest: 1, softmax: 1"]
    assert row(text, "Share that evades the score, adaptive 8/255") == ["70%", "85%"]
