"""Tests of the page of `csg-ext report` in headless Chromium, against the run's own arrays."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from browser_page import BrowserPage
from safetensors.torch import load_file, save_file
from short_run import report_command
from torch import nn

from csg_ext import plots
from csg_ext.data import ImageData, load_images
from csg_ext.data.batches import normalise
from csg_ext.nn import GatedModel
from csg_ext.report import collect, read_run, write_report
from csg_ext.report.pictures import NAMES
from csg_ext.runs import read_checkpoint, restore

ODD = ['<img src=x onerror="window.ran=1">', "</script><script>window.ran=1</script>", "<b>a</b> & 'b' {{ c }}"]


def _arrays(folder: Path, arm: str) -> dict[str, np.ndarray]:
    with np.load(folder / arm / "arrays.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def odd(run, digits, tmp_path_factory) -> Path:
    """The short run, its classes renamed to names with HTML in them, and its report."""
    place = tmp_path_factory.mktemp("odd")
    folder = shutil.copytree(run[0], place / "run")
    data = load_images(digits)
    data.classes = ODD
    data.save(place / "odd.npz")
    stored = json.loads((folder / "run.json").read_text())
    stored["source"]["data"] = str(place / "odd.npz")
    (folder / "run.json").write_text(json.dumps(stored))
    status, out, err = report_command(folder)
    assert status == 0, err
    assert str(folder / "report.html") in out
    return folder


@pytest.fixture
def opened(browser, odd):
    """The odd run's page, which must have loaded, and be left, without a message on the console."""
    shown = browser.open(odd / "report.html")
    yield shown
    assert shown.errors() == []


def _matrices(folder: Path, arm: str) -> dict[str, np.ndarray]:
    arrays = _arrays(folder, arm)
    return {"gate": arrays["gate"].astype(np.float64), "mi": arrays["mi"].T}


UNIT = {"gate": ("gate", ""), "mi": ("mutual information", " nats")}


@pytest.mark.parametrize(("network", "kind"), [("csg", "gate"), ("csg", "mi"), ("std", "mi")])
def test_hovering_shows_the_filter_the_class_the_value_and_the_top_images(opened, odd, network, kind):
    opened.choose("network", ["std", "csg"].index(network))
    opened.choose("kind", kind)
    arrays, matrix = _arrays(odd, network), _matrices(odd, network)[kind]
    order = plots.class_order(np.float32(matrix) if kind == "gate" else matrix)
    for _ in range(4):
        row, column = int(torch.randint(3, ())), int(torch.randint(64, ()))
        opened.point(row, column)
        text = opened.text("#status")
        found = re.fullmatch(r"Filter (\d+), class (.*): ([a-z ]+) (-?[\d.]+)( nats)?", text)
        assert found, text
        k, (name, unit) = int(found[1]), UNIT[kind]
        assert matrix[:, k].max() == pytest.approx(matrix[:, order[column]].max(), abs=2e-4)  # ties may be in any order
        assert (found[2], found[3], found[5] or "") == (ODD[row], name, unit)
        assert float(found[4]) == pytest.approx(matrix[row, k], abs=1e-4)
        assert opened.text("#tip") == text and opened.find("#tip").is_displayed()
        assert opened.text("#filter-title") == f"Filter {k}"
        images = [
            int(re.match(r"test image (\d+)", canvas.get_attribute("aria-label"))[1])
            for canvas in opened.all("#filter-images canvas")
        ]
        feature = arrays["features"][:, k]
        best = -np.sort(-feature)[: collect.TOP]
        np.testing.assert_array_equal(feature[images], best[best > 0])


@pytest.mark.parametrize("kind", ["gate", "mi"])
def test_sorting(opened, odd, kind):
    matrix = _matrices(odd, "csg")[kind]
    opened.choose("kind", kind)
    best, own = matrix.max(0), matrix.argmax(0)
    for order in ("number", "value", "class"):
        opened.choose("order", order)
        z = np.array(opened.js("return document.getElementById('matrix').data[0].z.map((row) => Array.from(row))"))
        assert z.shape == matrix.shape
        if order == "number":
            np.testing.assert_allclose(z, matrix, atol=1e-5)
        elif order == "value":
            np.testing.assert_allclose(z.max(0), -np.sort(-best), atol=1e-5)
        else:
            np.testing.assert_array_equal(z.argmax(0), np.sort(own))
            within = np.diff(z.max(0))[np.diff(z.argmax(0)) == 0]
            assert (within <= 0).all()


def test_a_class_and_its_filters(opened, odd):
    matrix = _matrices(odd, "csg")["mi"]
    opened.choose("kind", "mi")
    for c in range(3):
        opened.choose("class", c)
        mine = np.flatnonzero(matrix.argmax(0) == c)
        buttons = opened.all("#class-filters button")
        listed = [int(b.get_attribute("data-filter")) for b in buttons]
        assert sorted(listed) == mine.tolist()
        np.testing.assert_allclose(matrix[c, listed], -np.sort(-matrix[c, mine]), atol=1e-5)
        assert opened.text("#class-title") == f"Filters of {ODD[c]}"
        if listed:
            buttons[0].click()
            assert opened.text("#filter-title") == f"Filter {listed[0]} (kept)"
            assert buttons[0].get_attribute("aria-pressed") == "true"


def test_an_image_and_its_maps(opened, odd):
    data = load_images(odd.parent / "odd.npz")
    button = opened.all("#gallery button")[5]
    index = int(re.match(r"test image (\d+)", button.get_attribute("aria-label"))[1])
    stored = read_checkpoint(odd / "csg" / "model.safetensors")
    model = restore(stored, data).eval().double()
    x = normalise(data.test_images[index : index + 1], *data.statistics(), torch.device("cpu")).double()
    with torch.inference_mode():
        maps = model.forward_features(x)[0]
    added = model.classifier.weight @ torch.diag(maps.mean((1, 2)))
    scores = added.sum(1) + model.classifier.bias
    c = int(scores.argmax())
    button.click()
    share = 100 * scores.softmax(0)[c].item()
    text = opened.text("#image-status")
    assert text.startswith(f"Test image {index}, {ODD[data.test_labels[index]]}: predicted {ODD[c]} (")
    assert float(re.search(r"([\d.]+) %\)$", text)[1]) == pytest.approx(share, abs=0.06)
    captions = [figure.get_property("textContent") for figure in opened.all("#maps figcaption")][2:]
    best = added[c].sort(descending=True)
    for caption, value in zip(captions, best.values.tolist(), strict=False):
        found = re.fullmatch(r"filter (\d+): ([+−])([\d.]+)", caption)
        assert added[c, int(found[1])].item() == pytest.approx(value, abs=1e-4)
        assert float(found[3]) * (1 if found[2] == "+" else -1) == pytest.approx(value, abs=0.006)
    # The brightest cell of the strongest filter's map lies where that filter is strongest.
    shown = opened.js(
        "const c = document.querySelectorAll('#maps canvas')[2], d = c.getContext('2d').getImageData(0, 0, c.width, "
        "c.height).data; return [c.width, Array.from(d).filter((_, i) => i % 4 === 0).map((r, i) => r - d[4 * i + 2])]"
    )
    red = np.array(shown[1]).reshape(shown[0], shown[0])
    top = maps[int(best.indices[0])]
    blocks = red.reshape(top.shape[0], shown[0] // top.shape[0], top.shape[1], -1).mean((1, 3))
    assert blocks.argmax() == int(top.argmax())


def test_keyboard(opened, odd):
    opened.js("document.getElementById('matrix-frame').focus()")
    opened.choose("order", "number")
    matrix = _matrices(odd, "csg")["gate"]
    opened.js("document.getElementById('matrix-frame').focus()")
    for keys, row, column in ((["ARROW_UP"], 0, 0), (["ARROW_RIGHT", "ARROW_DOWN"], 1, 1), (["END"], 1, 63)):
        opened.press(*keys)
        text = opened.text("#status")
        assert text.startswith(f"Filter {column}, class {ODD[row]}: gate ")
        assert float(text.rsplit(" ", 1)[1]) == pytest.approx(matrix[row, column], abs=1e-4)
        assert opened.find("#cursor").is_displayed()
    opened.press("HOME", "ENTER")
    assert opened.text("#filter-title") == "Filter 0 (kept)"


def test_every_control_by_keyboard(opened):
    """Tab reaches all of them in their order, each shows that it has the focus, and keys do what the mouse does."""
    focused = """const e = document.activeElement, s = getComputedStyle(e);
        const place = e.id || e.closest("[id]")?.id || e.className || e.tagName;
        return [place, s.outlineStyle, parseFloat(s.outlineWidth)]"""

    def tab(wanted: str) -> None:
        opened.press("TAB")
        place, style, width = opened.js(focused)
        assert (place, style) == (wanted, "solid") and width >= 2

    order = ["skip", "theme", "SUMMARY", "wide", "network", "kind", "order", "class"]
    for wanted in order[:2]:
        tab(wanted)
    before = opened.js("return getComputedStyle(document.body).backgroundColor")
    opened.press("ENTER")
    assert opened.js("return getComputedStyle(document.body).backgroundColor") != before
    for wanted in order[2:]:
        tab(wanted)
        if wanted == "SUMMARY":
            opened.press("ENTER")
            assert opened.js("return document.activeElement.parentElement.open")
    opened.press("ARROW_DOWN")
    listed = opened.all("#class-filters button")
    assert opened.text("#class-title") == f"Filters of {ODD[0]}" and listed
    tab("matrix-frame")
    opened.press("ARROW_DOWN")
    assert opened.text("#status").startswith("Filter ")
    for _ in listed:
        tab("class-filters")
    opened.press("SPACE")
    assert listed[-1].get_attribute("aria-pressed") == "true" and opened.text("#filter-title").endswith("(kept)")
    tab("gallery")
    opened.press("ENTER")
    assert opened.text("#image-status").startswith("Test image ")


CONTRAST = """
const light = (c) => c.map((v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (e) => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c.slice(0, 3); } };
const contrast = (e, colour, place) => {
  const [a, b] = [light(parse(colour).slice(0, 3)), light(behind(place))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 100)]; };
const shown = [...document.querySelectorAll("body *")].filter((e) =>
  e.checkVisibility() && getComputedStyle(e).clipPath === "none");
const texts = shown.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
const style = (e) => getComputedStyle(e), svg = (e) => e.namespaceURI.endsWith("svg");
return [texts.map((e) => contrast(e, svg(e) ? style(e).fill : style(e).color, e)),
  shown.filter((e) => e.matches("button, select")).map((e) => contrast(e, style(e).borderTopColor, e.parentElement))];
"""


def test_text_and_edges_contrast_with_what_is_behind_them(browser, odd):
    """At least 4.5 and 3, as WCAG 2.2 asks of small text and of controls, in both looks."""
    shown = browser.open(odd / "report.html")
    for _ in range(2):
        shown.choose("class", 1)
        shown.js("document.querySelector('#gallery button').click()")
        texts, edges = shown.js(CONTRAST)
        assert len(texts) > 100 and min(texts)[0] >= 4.5, min(texts)
        assert len(edges) > 20 and min(edges)[0] >= 3, min(edges)
        shown.find("#theme").click()


def test_names_stay_text(opened, odd):
    text = (odd / "report.html").read_text(encoding="utf-8")
    assert all(name not in text for name in ODD)
    assert opened.js("return window.ran") is None
    assert opened.all("img[src='x']") == []
    assert [o.get_property("textContent") for o in opened.all("#class option")][1:] == ODD
    ticks = [t.get_property("textContent") for t in opened.all("#matrix .ytick text")]
    assert ticks == [name if len(name) <= 24 else name[:23] + "…" for name in ODD]


def test_screen_readers_and_the_table(opened, odd):
    opened.all("#gallery button")[0].click()
    opened.choose("class", 1)
    for element in opened.all("select, button, #matrix-frame, canvas[role=img], .plot img, .wide"):
        if element.is_displayed():
            name = element.accessible_name.strip()
            assert name, element.get_attribute("outerHTML")[:200]
            assert element.tag_name != "button" or element.text in name  # who speaks what is seen must be understood
    regions = [e.get_attribute("aria-labelledby") for e in opened.all("section, [role=region]")]
    assert len(set(regions)) == len(regions)
    assert opened.find("html").get_attribute("lang") == "en"
    levels = [int(h.tag_name[1]) for h in opened.all("h1, h2, h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) == 1
    summary = json.loads((odd / "summary.json").read_text())
    cells = [
        [c.get_property("textContent") for c in row.find_elements("css selector", "th, td")]
        for row in opened.all("tbody tr")
    ]
    assert cells[0][1:] == [f"{summary[arm]['accuracy']:.2%}" for arm in ("std", "csg")]
    assert cells[1][1:] == [f"{summary[arm]['mis']:.4f}" for arm in ("std", "csg")]
    assert opened.js("return [...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    assert len(opened.all(".plot img")) == len(NAMES)


def test_light_and_dark(browser, odd):
    def brightness(shown: BrowserPage, selector: str, style: str) -> float:
        colour = shown.js(f"return getComputedStyle(document.querySelector('{selector}')).{style}")
        return float(np.mean([float(v) for v in re.findall(r"[\d.]+", colour)[:3]]))

    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shown = browser.open(odd / "report.html")
        dark = scheme == "dark"
        assert (brightness(shown, "body", "backgroundColor") < 80) == dark
        assert (brightness(shown, "#matrix .ytick text", "fill") > 150) == dark
        shown.find("#theme").click()
        assert (brightness(shown, "body", "backgroundColor") < 80) != dark
        assert (brightness(shown, "#matrix .ytick text", "fill") > 150) != dark
        assert shown.errors() == []
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_comes_from_the_network(browser, odd):
    shown = browser.open(odd / "report.html")
    names = shown.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith("data:") for name in names)
    assert shown.errors() == []
    for attempt in (
        "fetch('data:,x').then(() => done('loaded'), () => done('blocked'))",
        "const i = new Image(); i.onload = () => done('loaded'); i.onerror = () => done('blocked');"
        "i.src = 'training.png'",
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "done(window.ran ? 'loaded' : 'blocked')",
    ):
        assert shown.driver.execute_async_script(f"const done = arguments[0]; {attempt}") == "blocked"
    assert sum("Content Security Policy" in message for message in shown.errors()) >= 3


class _Wide(nn.Module):
    num_filters = 2048

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, self.num_filters, 3, 8, 1)

    def forward(self, x):
        return self.conv(x).relu()


def test_two_runs_and_two_thousand_filters(browser, run, tmp_path):
    """A page of the short run and of one with K = 2048, 50 classes, the last without filters, and colour images."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    classes, count, filters = 50, 300, _Wide.num_filters
    images = rng.integers(0, 256, (count, 3, 64, 48)).astype(np.uint8)
    labels = np.arange(count) % classes
    data = ImageData("noise", images, labels, images, labels, [f"class {c}" for c in range(classes)])
    arms = []
    for name in ("STD", "CSG"):
        gate = rng.random((classes, filters), np.float32)
        gate[-1] = 0
        arms.append(
            collect.Arm(
                name=name,
                model=GatedModel(_Wide(), classes).eval(),
                gate=gate if name == "CSG" else None,
                gate_note="",
                mi=rng.random((filters, classes)),
                features=rng.random((count, filters), np.float32),
                labels=labels,
                confusion=np.eye(classes, dtype=np.int64) * 6,
                history=[{"epoch": 1, "loss_std": 1.0, "train_accuracy": 0.5, "l1_density": 0.5}],
                statistics=data.statistics(),
            )
        )
    short = read_run(run[0])
    wide = collect.Run("wide", json.loads(json.dumps(short.summary)), data, arms)
    file = write_report([short, wide], tmp_path)
    assert file.stat().st_size < 10e6
    shown = browser.open(file)
    shown.choose("run", 1)
    assert "Top images are shown for" in shown.text("#notes")
    assert len(shown.all(".plot")) == 22  # eleven pictures of either run
    assert shown.js("const c = document.querySelector('#gallery canvas'); return c.width / c.height") == 0.75
    ends = "const b = e.getBoundingClientRect(); return [b.left, b.right]"
    numbers = shown.js(f"return [...document.querySelectorAll('#matrix .xtick text')].map((e) => {{{ends}}})")
    assert len(numbers) > 10 and all(a[1] < b[0] for a, b in pairwise(sorted(numbers)))  # none runs into the next
    shown.choose("order", "number")
    row, column = int(rng.integers(classes)), int(rng.integers(filters))
    shown.point(row, column)
    found = re.fullmatch(r"Filter (\d+), class class (\d+): gate ([\d.]+)", shown.text("#status"))
    k, c = int(found[1]), int(found[2])
    assert abs(k - column) <= 2 and c == row  # a filter is half a pixel wide
    assert float(found[3]) == pytest.approx(arms[1].gate[c, k], abs=1e-4)
    began = shown.js("return performance.now()")
    shown.choose("order", "class")
    assert shown.js("return performance.now()") - began < 5000
    shown.choose("class", 7)
    mine = np.flatnonzero(arms[1].gate.argmax(0) == 7)
    assert len(shown.all("#class-filters button")) == min(len(mine), 60)
    shown.choose("class", classes - 1)
    assert shown.text("#class-note").startswith("0 of 2048 filters")
    shown.js("document.getElementById('matrix-frame').focus()")
    shown.press("ARROW_DOWN")
    assert shown.text("#status") == ""
    shown.choose("run", 0)
    assert shown.text("#notes") == ""
    assert shown.errors() == []


def test_a_checkpoint_without_a_gate(browser, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    weights = load_file(folder / "csg" / "model.safetensors")
    del weights["csg.gate"]
    save_file(weights, folder / "csg" / "model.safetensors")
    status, _, err = report_command(folder)
    assert status == 0, err
    shown = browser.open(folder / "report.html")
    assert "The checkpoint holds no gate." in shown.text("#notes")
    assert [o.get_attribute("value") for o in shown.all("#kind option")] == ["mi"]
    shown.point(1, 3)
    assert re.fullmatch(r"Filter \d+, class 1: mutual information [\d.]+ nats", shown.text("#status"))
    shown.choose("network", 0)
    assert "trained without a gate" in shown.text("#notes")
    assert shown.errors() == []
