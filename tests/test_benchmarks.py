"""The benchmarks' report on the smallest sizes, so that it cannot rot; what is measured is not judged here."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks, made for a quick run on whatever machine."""
    monkeypatch.setenv("CSG_BENCH_QUICK", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "WAITED", float("inf"))  # no turn is repeated, however busy the machine
    monkeypatch.setattr(measure, "steady_memory", lambda: None)  # it would hold for the other tests, too
    return importlib.import_module


def test_report_measures_and_writes_the_same_page_again(bench, monkeypatch, tmp_path):
    report, cases, gate_steps, end_to_end = map(bench, ("report", "gated_pool_cases", "gate_step_cases", "end_to_end"))
    grid = [cases.Case("tiny", (4, 8, 3, 3), torch.float32, layout, 5) for layout in ("rows", "channels_last")]
    network = end_to_end.Network("resnet20", lambda: end_to_end.build_backbone("resnet20"), 64, 10, 2, 8, turns=4)
    monkeypatch.setattr(cases, "grid", lambda: grid)
    monkeypatch.setattr(
        cases,
        "peers",
        lambda: {name: getattr(cases, name) for name in ("eager", "masked", "viewed")} | {"csg_ext": cases.ours},
    )
    monkeypatch.setattr(gate_steps, "SIZES", [(5, 8)])
    monkeypatch.setattr(gate_steps, "PEERS", ("csg_ext", "foreach", "in place"))
    monkeypatch.setattr(end_to_end, "networks", lambda: [network])
    page = tmp_path / "performance.md"
    report.main(["--output", str(page), "--results", str(tmp_path)])
    text = page.read_text()
    for case in grid:
        assert text.count(f"| {case.id} |") == 4  # forward, backward, both, the same with a ReLU
    assert "| 5 x 8 |" in text and "| released |" in text
    assert "- viewed: " in text and "\nin place: " in text and "ot measured here" not in text
    slower = sum(text.count(f"{name} of {case.id}, ") for case in grid for name in ("eager", "masked", "viewed"))
    # 24: two maps, four directions, three peers; the limit is none
    assert f"\n- A peer was faster than csg_ext in {slower} of 24 comparisons" in text
    assert "tiny (4, 8, 3, 3)." in text  # what a layer's name stands for
    assert re.search(r"\n- resnet20, over std's step: csg [+-].* released [+-].*; std beside itself [+-]", text)
    name = bench("measure").results_name()
    picture = tmp_path / "images" / f"performance_{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    rows = json.loads((tmp_path / f"{name}.json").read_text())["gated_pool"]["rows"]
    masked = rows[0]["peak_bytes"]["both"]["masked"]
    assert masked >= 2 * rows[0]["bytes"]  # a map of x's size, and its gradient
    assert rows[0]["peak_bytes"]["both"]["csg_ext"] < masked
    page.unlink()
    report.main(["--from-json", "--output", str(page), "--results", str(tmp_path)])
    assert page.read_text() == text

    results = json.loads((tmp_path / f"{name}.json").read_text())
    for part in results.values():
        part["machine"]["device"] = "Another processor"
    (tmp_path / "cpu_another_processor.json").write_text(json.dumps(results))
    report.main(["--from-json", "--output", str(page), "--results", str(tmp_path)])
    both = page.read_text()
    assert all(both.count(f"| {case.id} |") == 8 for case in grid) and "\n## Another processor\n" in both
    assert both.count("- viewed: ") == 1  # what the columns are is said once


def test_wrong_results_are_not_measured(bench):
    cases = bench("gated_pool_cases")
    case = cases.Case("tiny", (4, 8, 3, 3), torch.bfloat16, "rows", 5)
    cases.check(case, cases.ours)
    with pytest.raises(AssertionError, match="the result differs"):
        cases.check(case, lambda x, gate, labels: 1.1 * cases.eager(x, gate, labels))
    with pytest.raises(AssertionError, match="the gradient of gate differs"):
        cases.check(case, lambda x, gate, labels: cases.eager(x, gate.detach() + 0 * gate, labels))


def test_ratio_of_a_pair_and_its_interval(bench):
    measure = bench("measure")
    seconds = iter([1.0, 2.0, 2.4, 1.2, 1.0, 2.2])  # who comes first changes: ours, other; other, ours; ours, other
    found = measure.compared(lambda: None, lambda: None, clock=lambda f: next(seconds), turns=3, few=None)
    assert found["ratio"] == pytest.approx(2.0) and found["ours"] == 1.0 and found["seconds"] == 2.2
    assert found["turns"] == 3 and not found["disturbed"]
    assert found["interval"][0] == pytest.approx(2.0) and found["interval"][1] == pytest.approx(2.2)


def test_clearly_slower_peers_get_few_turns(bench):
    measure = bench("measure")
    slow, fast = object(), object()
    found = measure.compared(fast, slow, clock=lambda f: 2.0 if f is slow else 1.0, turns=9, few=4)
    assert found["turns"] == 4
    assert measure.compared(slow, fast, clock=lambda f: 2.0 if f is slow else 1.0, turns=9, few=4)["turns"] == 9


def test_disturbed_turns_are_measured_again_and_named(bench, monkeypatch):
    measure = bench("measure")
    monkeypatch.setattr(measure, "WAITED", 0.02)
    waits = iter([0.0, 1e6, 1e6, 1e6])  # before and after each turn: the first one waited
    monkeypatch.setattr(measure, "waited", lambda: next(waits))
    seconds = iter([1.0, 50.0, 2.0, 1.0])  # ours, other; other, ours
    found = measure.compared(lambda: None, lambda: None, clock=lambda f: next(seconds), turns=1, few=None)
    assert found["turns"] == 1 and found["ratio"] == 2.0 and not found["disturbed"]
    always = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(measure, "waited", lambda: float(next(always)))
    found = measure.compared(lambda: None, lambda: None, clock=lambda f: 1.0, turns=2, few=None)
    assert found["turns"] == 8 and found["disturbed"]


def test_peak_memory_counts_what_is_held_at_a_time(bench):
    measure = bench("measure")
    x = torch.ones(1000, device=measure.DEVICE)

    def run():
        first = x + 1  # 4000 bytes
        second = first * 2  # 8000 held
        del first
        return second.sum()  # a scalar

    assert 8000 <= measure.peak_bytes(run) < 11000  # a GPU's allocator counts in blocks of 512 bytes


def test_the_tables_of_scaling_are_those_of_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    runpy.run_path(str(BENCHMARKS / "scaling.py"), run_name="__main__")
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text().splitlines()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows and [line for line in page if line.startswith("| ")] == rows
