"""The script that scores localization over seeds: from a finished run to the tables in the page."""

import json
import shutil

import numpy as np
import pytest
from example_scripts import load_study

from csg_ext.data import load_images


@pytest.fixture
def script(tmp_path, monkeypatch):
    return load_study("localize", tmp_path, monkeypatch)


def test_a_finished_run_is_scored_and_tabulated(script, run, digits, tmp_path):
    data, rng = load_images(digits), np.random.default_rng()
    a, b = rng.integers(0, len(data.test_labels), (2, 12))
    pairs = np.concatenate([data.test_images[a][..., ::2], data.test_images[b][..., ::2]], 3)
    masks = np.stack([pairs[:, 0] > 100] * 2, 1)
    masks[:, 0, :, 4:], masks[:, 1, :, :4] = False, False
    with np.load(digits) as images:
        np.savez(
            tmp_path / "scenes.npz",
            **images,
            test_masks=data.test_images[:, 0] > 120,
            train_masks=data.train_images[:, 0] > 120,
            pair_images=pairs,
            pair_labels=np.stack([data.test_labels[a], data.test_labels[b]], 1),
            pair_masks=masks,
        )
    shutil.copytree(run[0], tmp_path / "scenes-0")
    script.run([0], 6, 0.01, tmp_path)
    found = json.loads((script.RESULTS / "seed-0.json").read_text())
    scored = json.loads((tmp_path / "scenes-0" / "localize" / "localization.json").read_text())
    for arm in scored["checkpoints"]:
        kept = found["arms"][arm["name"]]
        assert kept["single"]["cam"]["iou"] == arm["methods"]["cam"]["iou"]
        assert kept["query"]["cam"]["energy"] == arm["query"]["cam"]["energy"]
        assert 0 < kept["single"]["grad_cam"]["energy"] < 1 and 0 < kept["query"]["grad_cam"]["energy"] < 1
        assert ("gate" in kept["single"]) == ("gate" in kept["query"]) == (arm["name"] == "csg")

    script.PAGE.write_text(f"before\n{script.BEGIN}\nold\n<!-- end -->\nafter\n")
    script.report()
    page = script.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page and "nan" not in page
    gate = found["arms"]["csg"]["query"]["gate"]
    assert f"| the gate's map | CSG | {gate['energy']:.3f} | {gate['standard_error']:.3f} |" in page
    picks = gate["energy"] - 2 * gate["standard_error"] > 0.5
    assert f"(energy above 0.5 by two standard errors) | {'yes' if picks else 'no'} |" in page
    again = {**found, "seed": 1, "arms": json.loads(json.dumps(found["arms"]))}
    again["arms"]["csg"]["query"]["gate"]["energy"] = 0.9 - gate["energy"]
    text = script.tables([found, again])
    spread = abs(0.9 - 2 * gate["energy"]) / 2**0.5
    assert f"| the gate's map | CSG | 0.450 ± {spread:.3f} |" in text
    script.PAGE.write_text("no marks")
    with pytest.raises(SystemExit, match="must hold the lines"):
        script.report()
