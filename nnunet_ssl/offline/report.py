"""One self-contained page about the rounds of self-training: what was taken, and was it right."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import spearmanr

from nnunet_ssl.data.pseudo_labels import PSEUDO_LABELS
from nnunet_ssl.evaluation import figures
from nnunet_ssl.io import write_text
from nnunet_ssl.offline.predict import MASKS, TARGETS, label_sets_of
from nnunet_ssl.offline.select import kind_of
from nnunet_ssl.offline.stability import LabelSets, agreement, stability
from nnunet_ssl.offline.write import new_dataset_json
from nnunet_ssl.planning.raw import RawDataset, silence
from nnunet_ssl.planning.workers import Workers, processes_for
from nnunet_ssl.version import __version__

LEAST_FOR_RANKS = 5  # cases, below which a rank correlation says nothing


@dataclass(frozen=True)
class Truth:
    """How a pseudo-label compares with a hidden mask; mean Dice over classes.

    Attributes:
        whole: of the teacher's decision.
        sure: of the voxels that training gets.
    """

    whole: float
    sure: float


def write_report(
    raw: RawDataset,
    raw_root: Path,
    rounds: Sequence[Mapping[str, Any]],
    output: Path,
    hidden: Path | None,
) -> None:
    """Write the page.

    Args:
        raw: the data set that all rounds start from.
        raw_root: nnUNet_raw, with the data sets of the rounds.
        rounds: content of rounds.json.
        output: HTML file; one that exists is replaced.
        hidden: folder with masks of scans without masks, or None.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("nnunet_ssl.offline", "."), PackageLoader("nnunet_ssl.evaluation", ".")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = {
        "style": style(environment),
        "dataset": raw.folder.name,
        "classes": list(label_sets_of(raw.dataset_json)),
        "annotated": len(raw.labeled),
        "scans": len(raw.unlabeled),
        "hidden": hidden is not None,
        "version": __version__,
        "rounds": [round_of(raw, raw_root, entry, hidden) for entry in rounds],
    }
    write_text(environment.get_template("self_training.html.j2").render(page), output)


def style(environment: Environment) -> Markup:
    """Return the style of the benchmark's report: the same colours and tables on both pages."""
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, "report.html.j2")
    found = re.search(r"<style>.*?</style>", source, re.DOTALL)
    assert found is not None
    return Markup(found[0])


def round_of(
    raw: RawDataset,
    raw_root: Path,
    entry: Mapping[str, Any],
    hidden: Path | None,
) -> dict[str, Any]:
    """Everything the page prints of a round."""
    told = json.loads((raw_root / entry["dataset"] / PSEUDO_LABELS).read_text(encoding="utf-8"))
    return {
        **entry,
        "about": told,
        "folds": [
            fold_of(raw, told, fold, Path(labels), hidden)
            for fold, labels in entry["labels"].items()
        ],
    }


def fold_of(
    raw: RawDataset,
    told: Mapping[str, Any],
    fold: str,
    labels: Path,
    hidden: Path | None,
) -> dict[str, Any]:
    """Numbers, plots and pictures of the pseudo-labels for one fold."""
    label_sets = label_sets_of(raw.dataset_json)
    cases = {
        Path(row["source"]).name.removesuffix(f"_0000{raw.file_ending}"): row
        for row in told["cases"].values()
        if row["fold"] == fold
    }
    readable = {case: row for case, row in cases.items() if "stability" in row}
    kept = {case: row for case, row in readable.items() if row["kept"]}
    title = f"Round {told['round']}, fold {fold}"
    ignore = ignore_label(raw)
    truths = compare(raw, labels, list(readable), hidden, label_sets, ignore)
    reasons = Counter(kind_of(row["why"]) for row in cases.values() if not row["kept"])
    return {
        "fold": fold,
        "title": title,
        "number": len(cases),
        "kept": len(kept),
        "reasons": reasons.most_common(),
        "voxels": {
            name: (
                sum(row["voxels"][name] for row in kept.values()),
                sum(row["voxels"][name] for row in readable.values()),
                mean_of(row["classes"][name] for row in readable.values()),
            )
            for name in label_sets
        },
        "unsure": mean_of(row["unsure"] for row in kept.values()),
        "ranking": ranking(f"{title}: stability", readable),
        "truth": truth_of(f"{title}: calibration", readable, truths) if truths else None,
        "examples": [
            example(raw, labels, case, readable[case], name, hidden, label_sets, ignore, truths)
            for name, case in picks(readable).items()
        ],
    }


def ignore_label(raw: RawDataset) -> int:
    """Return the label of unsure voxels."""
    return new_dataset_json(raw.dataset_json, 0)["labels"]["ignore"]


def mean_of(values: Any) -> float | None:
    """Mean of the known values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def picks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the surest, the median and the least sure case; fewer if there are not three."""
    ordered = sorted(rows, key=lambda case: (-rows[case]["stability"], case))
    places = {"Surest": 0, "Median": (len(ordered) - 1) // 2, "Least sure": len(ordered) - 1}
    found: dict[str, str] = {}
    for name, place in places.items():
        if ordered and ordered[place] not in found.values():
            found[name] = ordered[place]
    return found


# --- against hidden masks -------------------------------------------------------------------------


def compare(
    raw: RawDataset,
    labels: Path,
    cases: Sequence[str],
    hidden: Path | None,
    label_sets: LabelSets,
    ignore: int,
) -> dict[str, Truth]:
    """Return by case how good the pseudo-label is, where there is a hidden mask."""
    if hidden is None:
        return {}
    ending, reader = raw.file_ending, raw.reader_writer()
    there = [case for case in cases if (hidden / f"{case}{ending}").is_file()]
    folders = (labels / MASKS, labels / TARGETS, hidden)
    jobs = [
        ([str(folder / f"{case}{ending}") for folder in folders], reader, label_sets, ignore)
        for case in there
    ]
    with Workers(processes_for(len(jobs))) as workers:
        return dict(zip(there, workers.map(truth, jobs, "Hidden masks"), strict=True))


def truth(
    paths: Sequence[str], reader: type, label_sets: Mapping[str, Sequence[int]], ignore: int
) -> Truth:
    """Compare decision and target of a case with its hidden mask."""
    with silence():
        decision, target, mask = (reader().read_seg(path)[0] for path in paths)
    sure = target != ignore
    return Truth(
        stability(agreement(decision, [mask], label_sets)),
        stability(agreement(target * sure, [mask * sure], label_sets)),
    )


def truth_of(
    title: str, rows: Mapping[str, Mapping[str, Any]], truths: Mapping[str, Truth]
) -> dict[str, Any]:
    """Return the calibration: true quality against stability."""
    cases = list(truths)
    predicted = [rows[case]["stability"] for case in cases]
    quality = [truths[case].whole for case in cases]
    rank = None
    if len(cases) >= LEAST_FOR_RANKS and len(set(predicted)) > 1 and len(set(quality)) > 1:
        rank = float(spearmanr(predicted, quality).statistic)
    kept = [case for case in cases if rows[case]["kept"]]
    return {
        "number": len(cases),
        "rank": rank,
        "all": mean_of(quality),
        "kept": mean_of(truths[case].whole for case in kept),
        "left": mean_of(truths[case].whole for case in cases if not rows[case]["kept"]),
        "sure": mean_of(truths[case].sure for case in kept),
        "plot": calibration(title, predicted, quality, [rows[case]["kept"] for case in cases]),
    }


# --- plots and pictures ---------------------------------------------------------------------------


def ranking(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Stability of all cases, sorted; those that were kept and the others."""
    ordered = sorted(rows.values(), key=lambda row: -row["stability"])
    values = 100 * np.array([row["stability"] for row in ordered])
    kept = np.array([row["kept"] for row in ordered], dtype=bool)
    place = np.arange(1, len(ordered) + 1)
    with figures.plot(title, 420, 250) as (made, axes):
        for chosen, color, name in ((kept, figures.GOOD, "kept"), (~kept, figures.BAD, "left")):
            axes.plot(place[chosen], values[chosen], "o", color=color, markersize=3.2, label=name)
        axes.set_xlabel("cases, sorted by stability")
        axes.set_ylabel("stability (Dice, %)")
        figures.legend_below(axes, columns=2)
    return made.markup


def calibration(
    title: str, predicted: Sequence[float], quality: Sequence[float], kept: Sequence[bool]
) -> Markup:
    """True Dice over stability, a point a case; the line is where both are equal."""
    x, y, chosen = 100 * np.array(predicted), 100 * np.array(quality), np.array(kept, dtype=bool)
    low = min(x.min(), y.min())
    with figures.plot(title, 420, 320) as (made, axes):
        axes.plot([low, 100], [low, 100], color=figures.MUTED, linewidth=1)
        for part, color, name in ((chosen, figures.GOOD, "kept"), (~chosen, figures.BAD, "left")):
            axes.plot(x[part], y[part], "o", color=color, markersize=3.6, label=name)
        axes.set_xlabel("stability (Dice, %)")
        axes.set_ylabel("true Dice (%)")
        figures.legend_below(axes, columns=2)
    return made.markup


def example(
    raw: RawDataset,
    labels: Path,
    case: str,
    row: Mapping[str, Any],
    title: str,
    hidden: Path | None,
    label_sets: Mapping[str, Sequence[int]],
    ignore: int,
    truths: Mapping[str, Truth],
) -> dict[str, Any]:
    """Return a case with its slice: the image, the target, and the hidden mask if there is one."""
    ending = raw.file_ending
    paths = {"Pseudo-label": labels / MASKS / f"{case}{ending}"}
    if case in truths and hidden is not None:
        paths["Hidden mask"] = hidden / f"{case}{ending}"
    read = {name: figures.read_volume(path, segmentation=True) for name, path in paths.items()}
    target, spacing = figures.read_volume(labels / TARGETS / f"{case}{ending}", segmentation=True)
    image = figures.read_volume(raw.unlabeled[case][0], segmentation=False)[0]
    unsure = np.where(target == ignore, ignore, 0)
    shown = figures.cut(
        image,
        [*(array for array, _ in read.values()), unsure],
        [*(list(values) for values in label_sets.values()), [ignore]],
        spacing,
    )
    names = [*read, "Unsure voxels"]
    found = truths.get(case)
    return {
        "title": title,
        "case": case,
        "slice": shown,
        "outlines": list(zip(names, shown.outlines, strict=True)),
        "stability": row["stability"],
        "unsure": row["unsure"],
        "why": row["why"],
        "truth": found.whole if found else None,
    }
