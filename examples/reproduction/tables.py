"""The tables of docs/results.md, made of the results that are there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from studies import Pair, Study, pairs


@dataclass(frozen=True)
class Column:
    """A number of a pair of arms, and how a table shows it."""

    head: str
    form: str
    value: Callable[[Pair], float]

    def mean(self, of: Sequence[Pair]) -> str:
        """Mean and standard deviation over seeds, or the one value."""
        values = [self.value(pair) for pair in of]
        mean = format(statistics.mean(values), self.form)
        return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), self.form.lstrip('+'))}"


STD_ACCURACY = Column("STD accuracy", ".2%", lambda p: p.std["accuracy"])
CSG_ACCURACY = Column("CSG accuracy", ".2%", lambda p: p.csg["accuracy"])
ERROR = Column("standard error", ".2f", lambda p: p.points.std() / len(p.points) ** 0.5)
CSG_MIS = Column("CSG MIS", ".4f", lambda p: p.csg["mis"])
CLOSED = Column("gap closed", ".2f", lambda p: p.closed)

EACH_SEED = (
    STD_ACCURACY,
    CSG_ACCURACY,
    Column("difference, points", "+.2f", lambda p: p.difference),
    ERROR,
    Column("STD MIS", ".4f", lambda p: p.std["mis"]),
    CSG_MIS,
    Column("STD ceiling", ".4f", lambda p: p.std["mis_ceiling"]),
    CLOSED,
    Column("L1-density", ".4f", lambda p: p.csg["l1_density"]),
    Column("gate class = MI class", ".1%", lambda p: p.csg["class_agreement"]),
    Column("own filters only", ".2%", lambda p: p.csg["one_hot_accuracy"]),
)
COST = Column("accuracy CSG - STD, points", "+.2f", lambda p: p.difference)
GAIN = (
    CLOSED,
    Column("L1-density times C", ".2f", lambda p: p.csg["l1_density"] * p.study.classes),
    Column("gate class = MI class", ".0%", lambda p: p.csg["class_agreement"]),
)
ABLATION = (
    STD_ACCURACY,
    CSG_ACCURACY,
    CSG_MIS,
    CLOSED,
    Column("L1-density", ".3f", lambda p: p.csg["l1_density"]),
    Column("gate class = MI class", ".0%", lambda p: p.csg["class_agreement"]),
)
EFFECT = (
    Column("STD MIS / ceiling", ".3f", lambda p: p.std["mis"] / p.std["mis_ceiling"]),
    Column("CSG MIS / ceiling", ".3f", lambda p: p.csg["mis"] / p.std["mis_ceiling"]),
    Column("MIS gained, points of the ceiling", "+.1f", lambda p: 100 * p.gained / p.std["mis_ceiling"]),
    Column("MIS gained", "+.1%", lambda p: p.gained / p.std["mis"]),
    CLOSED,
)
ITEMS = (
    Column("STD: filters of an item", ".0%", lambda p: p.std["filters_of_items"]),
    Column("CSG: filters of an item", ".0%", lambda p: p.csg["filters_of_items"]),
)


MARGIN = 1  # points of accuracy that CSG may cost
FEWEST = 3  # seeds for a verdict: of two, the interval is wider than any effect


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the mean of a few values (Student's t)."""
    from scipy.stats import t

    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def _estimate(values: Sequence[float], form: str) -> str:
    low, high = interval(values)
    return f"{statistics.mean(values):{form}} [{low:{form}}, {high:{form}}]"


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def aims(of: Sequence[Pair]) -> dict[str, bool]:
    """What the method is held to, by the means over the seeds."""
    low, high = interval([p.difference for p in of])
    return {
        "the interval of the accuracy's difference holds 0": low <= 0 <= high,
        f"its lower end lies above -{MARGIN} point": low > -MARGIN,
        "at least 0.65 of the gap closed": statistics.mean(p.closed for p in of) >= 0.65,
        "L1-density at most 1.05 / C": max(p.csg["l1_density"] for p in of) <= 1.05 / of[0].study.classes,
        "the classes of gate and MI agree for at least 85 % of the filters": statistics.mean(
            p.csg["class_agreement"] for p in of
        )
        >= 0.85,
    }


def main_table(study: Study) -> list[str]:
    """STD beside CSG, seed by seed; with all of the study's seeds, three or more, also the intervals of the means and
    the verdict."""
    of = pairs(study)
    if not of:
        return ["Not trained yet."]
    rows = [[str(p.seed), *(format(c.value(p), c.form) for c in EACH_SEED)] for p in of]
    means = ["mean ± sd", *("" if c is ERROR else c.mean(of) for c in EACH_SEED)]
    lines = table(["seed", *(c.head for c in EACH_SEED)], [*rows, means])
    if len(of) < len(study.seeds):
        return [*lines, "", f"{len(of)} of {len(study.seeds)} seeds so far, too few for an interval or a verdict."]
    if len(of) < FEWEST:
        return [*lines, "", f"{len(of)} seeds, too few for an interval or a verdict."]
    return [
        *lines,
        "",
        f"CSG less STD over {len(of)} seeds, with the 95 % interval of the mean (Student's t, seeds as the units): "
        f"accuracy {_estimate([p.difference for p in of], '+.2f')} points, MIS "
        f"{_estimate([p.gained for p in of], '+.4f')} nats. Gap closed: {_estimate([p.closed for p in of], '.2f')}.",
        "",
        *table(
            ["the aims, by the means over the seeds", "reached"],
            [[aim, "yes" if held else "no"] for aim, held in aims(of).items()],
        ),
    ]


def summary_table(studies: list[Study]) -> list[str]:
    """One row for every set of the test part with all its seeds, three or more: what the gate costs and brings."""
    rows = []
    for study in studies:
        of = pairs(study)
        if len(of) >= max(FEWEST, len(study.seeds)):
            low, high = interval([p.difference for p in of])
            gain = [c.mean(of) for c in GAIN]
            rows.append(
                [study.text, len(of), COST.mean(of), f"[{low:+.2f}, {high:+.2f}]", *gain, sum(aims(of).values())]
            )
    return table(
        ["set", "seeds", COST.head, "95 % interval", *(c.head for c in GAIN), "of the five aims"],
        rows,
    )


def ablation_table(studies: list[Study]) -> list[str]:
    """One row for every setting: means over the seeds that are there, against the same seeds' STD arm."""
    rows = [
        [f"{study.text} (`{study.name}`)", ", ".join(str(p.seed) for p in of), *(c.mean(of) for c in ABLATION)]
        for study in studies
        if (of := pairs(study))
    ]
    return table(["setting", "seeds", *(c.head for c in ABLATION)], rows)


def decay_table(studies: list[Study]) -> list[str]:
    """Both arms under each weight decay of the ablations."""
    columns = (STD_ACCURACY, Column("STD MIS", ".4f", lambda p: p.std["mis"]), CSG_ACCURACY, CSG_MIS)
    names = {"decay-low": "5e-4", "default": "1e-3", "decay-high": "2e-3"}
    rows = [
        [text, *(c.mean(of) for c in columns)]
        for name, text in names.items()
        for study in studies
        if study.name == name and (of := pairs(study))
    ]
    return table(["weight decay", *(c.head for c in columns)], rows)


def effect_table(studies: list[Study]) -> list[str]:
    """One row for every set of the test part: how entangled STD's filters are, and what CSG changes."""
    rows = [[study.text, len(of), *(c.mean(of) for c in EFFECT)] for study in studies if (of := pairs(study))]
    return table(["set", "seeds", *(c.head for c in EFFECT)], rows)


# text, key of STD's results, key of CSG's, format
SPECIFICITY = (
    ("class-selectivity index", "class_selectivity", "class_selectivity", ".3f"),
    ("exclusivity: 1 - second / first MI", "exclusivity", "exclusivity", ".3f"),
    ("MI over its class's ceiling", "mis_of_ceiling", "mis_of_ceiling", ".3f"),
    ("filters quiet for their MI class", "quiet_filters", "quiet_filters", ".1%"),
    ("class by MI = class by (STD: weight; CSG: gate)", "weight_agreement", "class_agreement", ".1%"),
    ("class by MI = class by weight", "weight_agreement", "weight_agreement", ".1%"),
    ("accuracy, own filters by (STD: weight; CSG: gate)", "weight_own_accuracy", "one_hot_accuracy", ".2%"),
)


def specificity_table(studies: list[Study]) -> list[str]:
    """What MIS does not say: STD beside the CSG arms of some studies that share it."""
    found = [[p for p in pairs(study) if "exclusivity" in p.std and "exclusivity" in p.csg] for study in studies]
    if not all(found):
        return ["Not trained yet."]
    rows = []
    for text, std, csg, form in SPECIFICITY:
        cells = [Column("", form, lambda p, key=std: p.std[key]).mean(found[0])]
        for of in found:
            low, high = interval([p.csg[csg] - p.std[std] for p in of])
            cells.append(Column("", form, lambda p, key=csg: p.csg[key]).mean(of) + f" [{low:+{form}}, {high:+{form}}]")
        rows.append([text, *cells])
    return table(["mean over the filters", "STD", *(f"{s.text} [interval of CSG - STD]" for s in studies)], rows)


def items_table(studies: list[Study]) -> list[str]:
    """How many filters are of an item rather than of a class, in the sets of shared items."""
    rows = []
    for study in studies:
        of = [p for p in pairs(study) if "filters_of_items" in p.std]
        if of:
            rows.append([study.text, len(of), *(c.mean(of) for c in ITEMS)])
    return table(["set", "seeds", *(c.head for c in ITEMS)], rows)
