"""One self-contained HTML page from a folder of `nnunet_ssl benchmark` or `compare`.

The folder is read as it is: cells that failed or wait are named, never filled in.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import evaluate, figures, statistics
from nnunet_ssl.evaluation.cells import join, twin_of
from nnunet_ssl.evaluation.folder import DICE, MAIN, METRICS, PERCENT, Metric, Runs
from nnunet_ssl.evaluation.statistics import Verdict
from nnunet_ssl.history import read_log
from nnunet_ssl.io import write_text
from nnunet_ssl.naming import resolve
from nnunet_ssl.version import __version__

MOST_POINTS = 100  # of a curve
MOST_EXAMPLES = 12  # methods times budgets whose images are shown, to keep the page small
PROTOCOLS = {
    "raw": "raw: whole images as they come, nothing cut with the help of an annotation",
    "cropped-literature": "cropped-literature: images cut around the annotation, as much of the "
    "literature does; scores are not comparable with those on whole images",
    "": "not told by the data set: whether images were cut with the help of an annotation",
}
ROLES = {
    "twin": "supervised twin",
    "method": "method",
    "equal_compute": "twin, equal compute",
    "stock": "stock nnU-Net",
    "bound": "all annotated",
}
MARKS = {  # how a verdict looks: style, sign
    statistics.HELPED: ("helped", "▲"),
    statistics.HURT: ("hurt", "▼"),
    statistics.SAME: ("same", "="),
    statistics.OPEN: ("open", "?"),
}
# Fields that say where a cell ran and not on what: they may differ without any effect.
PLACES = ("host", "hostname", "node", "pid", "job")


def write_report(folder: Path, output: Path) -> None:
    """Write the page of a folder of runs.

    Args:
        folder: -o of `nnunet_ssl benchmark` or `compare`; may be unfinished.
        output: HTML file; one that exists is replaced.

    Raises:
        UserError: not such a folder, nothing finished yet, or cells that must not stand in one
            table (several protocols, data sets or sets of test cases).
    """
    runs = Runs(Path(folder))
    environment = Environment(
        loader=PackageLoader("nnunet_ssl.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": signed, "wrap": wrap}
    page = environment.get_template("report.html.j2").render(page_of(runs))
    write_text(page, output)


@dataclass
class Row:
    """A trainer at one budget."""

    name: str
    role: str
    color: str
    done: list[dict]
    failed: list[dict]
    waiting: list[dict]
    twin: str | None
    verdict: Verdict | None


def rows_of(runs: Runs, budget: tuple[int, str]) -> list[Row]:
    """All trainers of a budget in the order of the table, the bound last."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for cell in runs.info["cells"]:
        if (cell["budget"], str(cell["budget_name"])) == budget or cell["role"] == "bound":
            rows.setdefault((cell["role"], cell["name"]), []).append(cell)
    names = {c["id"]: c["name"] for c in runs.info["cells"]}
    made = []
    for (role, name), cells in sorted(rows.items(), key=lambda r: list(ROLES).index(r[0][0])):
        done = [c for c in cells if c["id"] in runs.by_id]
        paired = any(c.get("twin") for c in cells)
        made.append(
            Row(
                name=name,
                role=role,
                color=color_of(runs, name, role),
                done=done,
                failed=[c for c in cells if c["state"] == "failed"],
                waiting=[c for c in cells if c in runs.waiting],
                twin=next((names.get(c["twin"]) for c in cells if c.get("twin")), None),
                verdict=statistics.judge(*runs.unit_differences(done, DICE)) if paired else None,
            )
        )
    return made


def color_of(runs: Runs, name: str, role: str) -> str:
    """The colour a trainer keeps over the whole page; twins are grey."""
    if role == "twin":
        return figures.TWIN
    names = list(dict.fromkeys(c["name"] for c in runs.info["cells"] if c["role"] != "twin"))
    return figures.COLORS[names.index(name) % len(figures.COLORS)]


def page_of(runs: Runs) -> dict[str, Any]:
    """Everything the template prints."""
    tables = [(budget, rows_of(runs, budget)) for budget in runs.budgets]
    other_twins, other_bounds = twin_notes(runs), bound_notes(runs)
    return {
        "info": runs.info,
        "version": __version__,
        "protocol": PROTOCOLS.get(runs.info["protocol"], runs.info["protocol"]),
        "roles": ROLES,
        "theme": figures.THEME,
        "rule": statistics.RULE,
        "definitions": evaluate.DEFINITIONS,
        "empty_masks": evaluate.RULE,
        "heads": evaluate.CIRCUMFERENCE if ("hc_error", "mm") in runs.metrics else "",
        "folds": runs.folds,
        "budget_unit": runs.budget_unit,
        "cases": runs.scores["case"].nunique(),
        "classes": runs.classes,
        "metrics": [metric_name(runs, metric) for metric in runs.metrics if metric[0] in MAIN],
        "done": runs.done,
        "failed": runs.failed,
        "waiting": runs.waiting,
        "describe": lambda cell: describe(runs, cell),
        "notes": notes(runs, tables) + other_twins + other_bounds,
        "other_twins": bool(other_twins),
        "other_bounds": bool(other_bounds),
        "budgets": [budget_of(runs, budget, rows) for budget, rows in tables],
        "overview": overview(runs, tables),
        "examples": examples(runs, tables),
        "environments": environments(runs),
    }


def budget_of(runs: Runs, budget: tuple[int, str], rows: Sequence[Row]) -> dict[str, Any]:
    """Verdicts, tables and figures of one budget."""
    name = annotated(runs, budget)
    methods = [row for row in rows if row.role == "method"]
    gains = [(row, gain) for row in methods if len(gain := runs.case_gains(row.done))]
    limits = (min(g.min() for _, g in gains), max(g.max() for _, g in gains)) if gains else (0, 0)
    columns = [*runs.classes, None] if len(runs.classes) > 1 else runs.classes
    panels = [(row, curve_panels(runs, row, name)) for row in rows if row.role != "bound"]
    kinds = {row.verdict.kind for row in rows if row.verdict}
    return {
        "name": name,
        "title": f"With {name}",
        "kind": "differences" if len(kinds) > 1 else next(iter(kinds), ""),
        "verdicts": [
            (row, verdict_mark(row.verdict), sentence(runs, row, row.verdict))
            for row in methods
            if row.verdict
        ],
        "forest": forest(runs, rows, name),
        "table": [
            (
                row,
                [value_cell(runs, row, m) for m in runs.metrics if m[0] in MAIN],
                gap(runs, row, rows),
            )
            for row in rows
        ],
        "twins": len({row.name for row in rows if row.role == "twin"}) > 1,
        "bound": any(row.role == "bound" and row.done for row in rows),
        "per_class": [
            (
                metric_name(runs, metric),
                [
                    (row, [value_cell(runs, row, metric, name) for name in columns])
                    for row in rows
                    if row.done
                ],
            )
            for metric in runs.metrics
            if len(runs.classes) > 1 or metric[0] not in MAIN
        ],
        "gains": [
            (
                row,
                figures.gains(f"Gain per case, {name}, {row.name}", gain.to_numpy(), limits),
                f"{int((gain > 0).sum())} of {len(gain)} cases better",
            )
            for row, gain in gains
        ],
        "curves": [(row, made) for row, made in panels if made],
        "quality": quality(runs, rows, name),
        "costs": [cost(runs, row) for row in rows if row.done],
    }


def annotated(runs: Runs, budget: tuple[int, str]) -> str:
    """A budget in words."""
    number, name = budget
    cases = plural(number, f"annotated {runs.budget_unit}")
    return f"all {cases}" if name == "all" and number > 1 else cases


def verdict_mark(verdict: Verdict) -> dict[str, str]:
    """The badge of a verdict."""
    style, sign = MARKS[verdict.outcome]
    text = verdict.outcome + (", by less than a point" if verdict.small else "")
    return {"style": style, "sign": sign, "text": text}


def sentence(runs: Runs, row: Row, verdict: Verdict) -> str:
    """What a method did at a budget, in one sentence."""
    if not verdict.units:
        return "No run has finished together with its twin."
    pairs = runs.pairs(row.done)
    own, twin = (100 * np.nanmean([runs.score(pair[k], DICE) for pair in pairs]) for k in (0, 1))
    mean, low, high = (100 * v for v in (verdict.mean, verdict.low, verdict.high))
    # A bound that is not 0 must not be printed as 0 beside a verdict on its sign.
    decimals = 2 if any(v and not round(v, 1) for v in (mean, low, high) if v == v) else 1
    text = (
        f"Mean Dice {own:.1f} % against {twin:.1f} % of the twin: {signed(mean, decimals)} points "
        f"over {plural(verdict.units, verdict.kind[:-1])}"
    )
    few = few_draws(runs, row)
    if few:
        text += f" of {plural(few, 'draw')}"
    if not math.isnan(low):
        text += f", 95 % interval {signed(low, decimals)} to {signed(high, decimals)}"
    both, either = runs.paired(row.done, DICE)
    if both < either:
        text += (
            f". The difference is over the {both} of {either} scores (cases × classes × runs) that "
            "both have; each mean is over all that its runs have"
        )
    if verdict.units < statistics.MIN_UNITS:
        more = statistics.MIN_UNITS - verdict.units
        return f"{text}. A verdict needs at least {plural(more, verdict.kind[:-1])} more."
    if verdict.needed is None:
        these = "this draw" if few == 1 else f"these {few} draws"
        return f"{text}. It holds for {these} alone." if few else f"{text}."
    if math.isinf(verdict.needed):
        return f"{text}. More than {statistics.MOST_UNITS} {verdict.kind} would be needed to tell."
    return (
        f"{text}. About {verdict.needed:.0f} {verdict.kind} would tell, if mean and spread stay "
        "as they are."
    )


def few_draws(runs: Runs, row: Row) -> int:
    """Draws behind a verdict if they are too few to be its units, else 0."""
    verdict = row.verdict
    if not verdict or verdict.kind != "runs" or verdict.units < statistics.MIN_UNITS:
        return 0
    return int(runs.differences(row.done, DICE)["draw"].nunique())


def forest(runs: Runs, rows: Sequence[Row], budget: str) -> Markup:
    """The differences to the twin behind the sentences, and those of the extra rows."""
    effects = [
        figures.Effect(
            row.name,
            100 * row.verdict.mean,
            100 * row.verdict.low,
            100 * row.verdict.high,
            list(100 * runs.unit_differences(row.done, DICE)[0]),
        )
        for row in rows
        if row.verdict and row.verdict.units
    ]
    return figures.forest(f"Gain over the twin, {budget}", effects) if effects else Markup()


def value_cell(runs: Runs, row: Row, metric: Metric, name: str | None = None) -> dict[str, str]:
    """Mean ± sd over runs, difference to the twin with its interval, and what is missing."""
    scale = 100 if metric[0] in PERCENT else 1
    decimals = METRICS[metric[0]][1]
    values = scale * np.array([runs.score(cell, metric, name) for cell in row.done])
    mean, sd, n = statistics.mean_sd(values)
    texts = {"value": "–", "difference": "", "paired": "", "missing": ""}
    if n:
        texts["value"] = f"{mean:.{decimals}f}" + ("" if n == 1 else f" ± {sd:.{decimals}f}")
    if row.verdict:
        units, _ = runs.unit_differences(row.done, metric, name)
        if len(units):
            change, low, high = (scale * v for v in statistics.t_interval(units))
            texts["difference"] = span(change, low, high, decimals)
            both, either = runs.paired(row.done, metric, name)
            if both < either:
                texts["paired"] = f"over {both} of {either} in both"
    scores = runs.scores
    chosen = scores["cell"].isin([c["id"] for c in row.done])
    chosen &= (scores["metric"] == metric[0]) & (scores["unit"] == metric[1])
    if name is not None:
        chosen &= scores["class"] == name
    missing = int(scores.loc[chosen, "value"].isna().sum())
    if missing:
        texts["missing"] = f"{missing} of {int(chosen.sum())} missing"
    return texts


def gap(runs: Runs, row: Row, rows: Sequence[Row]) -> str:
    """Share of the gap between twin and all-label bound that a trainer closes."""
    bounds = [c for r in rows if r.role == "bound" for c in r.done]
    pairs = runs.pairs(row.done)
    if not bounds or not pairs or not row.verdict:
        return "–"
    gaps = [runs.difference(bound, twin, DICE) for bound in bounds for _, twin in pairs]
    share = statistics.gap_closed(row.verdict.mean, float(pd.Series(gaps).mean()))
    return "–" if math.isnan(share) else f"{signed(100 * share, 0)} %"


def metric_name(runs: Runs, metric: Metric) -> dict[str, str]:
    """Name and unit of a metric."""
    name, unit = metric
    if name == "nsd":
        # YAML takes 1e-1 for a text
        tolerance = float((runs.spec.get("evaluate") or {}).get("tolerance", 1))
        return {"name": "NSD", "unit": f"%, within {tolerance:g} {unit}"}
    return {"name": METRICS[name][0], "unit": unit or "%"}


def curve_panels(runs: Runs, row: Row, budget: str) -> list[Markup]:
    """Terms, pseudo-label measures and pseudo-Dice of a trainer over its training."""
    logs = read_logs(runs, row.done)
    if not logs:
        return []
    panels = []
    for title, group, whole in (
        ("Loss terms (weighted)", "terms", False),
        ("Pseudo-labels", "pseudo_labels", True),
        ("Pseudo-Dice in training", "pseudo_dice", True),
    ):
        names = sorted({name for log in logs for record in log for name in record.get(group, {})})
        lines = [
            (name, figures.COLORS[k % len(figures.COLORS)], on_grid(logs, group, name))
            for k, name in enumerate(names)
        ]
        if group == "pseudo_dice":
            twins = read_logs(runs, [twin for _, twin in runs.pairs(row.done)])
            if twins:
                lines.append(("twin", figures.TWIN, on_grid(twins, group, None)))
        lines = [line for line in lines if not np.isnan(line[2]).all()]
        if lines:
            panels.append(figures.curves(f"{row.name}, {budget}: {title}", lines, whole=whole))
    return panels


def read_logs(runs: Runs, cells: Sequence[dict]) -> list[list[dict]]:
    """Logs of the runs that wrote one."""
    paths = [runs.path(cell.get("ssl_log")) for cell in cells]
    return [log for path in paths if path is not None and (log := read_log(path))]


def on_grid(logs: Sequence[list[dict]], group: str, name: str | None) -> np.ndarray:
    """Values of a curve, (runs, points): means over equal parts of the training, NaN if missing.

    Vectors are averaged over classes. `name` None takes the first network of the group.
    """
    points = min(MOST_POINTS, *(round(len(log) / log[-1]["progress"]) for log in logs))
    grid = np.full((len(logs), points), math.nan)
    for k, log in enumerate(logs):
        parts: list[list[float]] = [[] for _ in range(points)]
        for record in log:
            values = record.get(group, {})
            value = values.get(name) if name else next(iter(values.values()), None)
            known = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
            if known:
                part = math.ceil(record["progress"] * points - 1e-9) - 1
                parts[min(max(part, 0), points - 1)].append(sum(known) / len(known))
        grid[k] = [np.mean(part) if part else math.nan for part in parts]
    return grid


def quality(runs: Runs, rows: Sequence[Row], budget: str) -> Markup:
    """Dice of the pseudo-labels against hidden masks over training; empty where not measured."""
    lines = []
    for row in rows:
        tables = []
        for cell in row.done:
            path = runs.path(cell.get("pseudo_labels"))
            if path is not None and path.is_file():
                table = pd.read_csv(path, dtype={"case": str, "class": str})
                dice = table[table["metric"] == "dice"]
                by_class = dice.groupby(["progress", "class"])["value"].mean()
                tables.append(100 * by_class.groupby("progress").mean())
        if tables:
            values = pd.concat(tables, axis=1).dropna(how="all")
            points = [
                (100 * float(progress), v.mean(), v.min(), v.max())
                for progress, v in values.iterrows()
            ]
            lines.append((row.name, row.color, points))
    return figures.quality(f"Pseudo-labels, {budget}", lines) if lines else Markup()


def cost(runs: Runs, row: Row) -> dict[str, Any]:
    """What a run of a trainer takes, mean over its runs."""

    def mean(*keys: str) -> float | None:
        values = []
        for cell in row.done:
            value: Any = cell
            for key in keys:
                value = (value or {}).get(key)
            if value is not None:
                values.append(float(value))
        return sum(values) / len(values) if values else None

    ratios = [
        cell["seconds"]["train"] / twin["seconds"]["train"]
        for cell, twin in runs.pairs(row.done)
        if cell["seconds"].get("train") and twin["seconds"].get("train")
    ]
    return {
        "row": row,
        "train": duration(mean("seconds", "train")),
        "predict": duration(mean("seconds", "predict")),
        "evaluate": duration(mean("seconds", "evaluate")),
        "ratio": f"{np.mean(ratios):.2f} ×" if ratios else "–",
        "labeled": count(mean("patches", "labeled")),
        "unlabeled": count(mean("patches", "unlabeled")),
        "rate": count(mean("patches_per_second")),
        "gpu": memory(mean("peak_memory_mb", "gpu")),
        "host": memory(mean("peak_memory_mb", "host")),
        "step": "–" if (step := mean("step_cost")) is None else f"{step:.3g} ×",
    }


def overview(runs: Runs, tables: Sequence[tuple[tuple[int, str], list[Row]]]) -> Markup:
    """Dice over annotated cases, where there are several budgets."""
    if len(tables) < 2:
        return Markup()
    lines: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    bound = []
    for (number, _), rows in tables:
        for row in rows:
            values = [100 * runs.score(cell, DICE) for cell in row.done]
            mean, sd, n = statistics.mean_sd(values)
            if row.role == "bound":
                bound = values
            elif n:
                lines.setdefault((row.name, row.color), []).append((number, mean, sd))
    return figures.dice_by_budget(
        f"Dice by number of annotated {runs.budget_unit}s",
        [(name, color, points) for (name, color), points in lines.items()],
        float(np.nanmean(bound)) if bound else None,
        runs.budget_unit,
    )


def examples(runs: Runs, tables: Sequence[tuple[tuple[int, str], list[Row]]]) -> dict[str, Any]:
    """Images of the best, the median and the worst case of each method by gain."""
    images, labels = (runs.path(runs.info["test"].get(key)) for key in ("images", "labels"))
    methods = [
        (annotated(runs, budget), row)
        for budget, rows in tables
        for row in rows
        if row.role == "method" and len(runs.case_gains(row.done))
    ]
    told: list[str] = []
    shown = []
    if labels is None or not labels.is_dir():
        told.append(f"No images: the annotations are not there ({labels}).")
        methods = []
    if len(methods) > MOST_EXAMPLES:
        told.append(f"Images of the first {MOST_EXAMPLES} methods and budgets only.")
    for budget, row in tqdm(methods[:MOST_EXAMPLES], desc="images", disable=not methods):
        try:
            shown.append((budget, row, list(example_cases(runs, row, images, labels))))
        except MissingFileError as error:
            told.append(f"No images of {row.name}, {budget}: {error}.")
    return {"shown": shown, "told": told}


class MissingFileError(Exception):
    """A file that the images need is not there, or cannot be read."""


def example_cases(
    runs: Runs, row: Row, images: Path | None, labels: Path | None
) -> Iterator[dict[str, Any]]:
    """Yield best, median and worst case by gain, each with its slice."""
    gain = runs.case_gains(row.done).sort_values(ascending=False, kind="stable")
    single = [(pair, runs.case_gains(pair[:1])) for pair in runs.pairs(row.done)]
    known = [name for name in runs.classes if name in runs.info["labels"]]
    picks = {"Best": 0, "Median": (len(gain) - 1) // 2, "Worst": len(gain) - 1}
    for title, position in picks.items():
        if position in list(picks.values())[: list(picks).index(title)]:
            continue  # fewer than three cases
        case, mean = str(gain.index[position]), float(gain.iloc[position])
        # The run that stands closest to the mean over runs shows what the number says.
        distances = [(abs(own.get(case, math.inf) - mean), k) for k, (_, own) in enumerate(single)]
        cell, twin = single[min(distances)[1]][0]
        folders = (labels, runs.path(twin["predictions"]), runs.path(cell["predictions"]))
        yield {
            "title": title,
            "case": case,
            "gain": mean,
            "run": describe(runs, cell),
            "colors": [runs.classes.index(name) for name in known],
            "slice": slice_of(runs, case, images, [find_file(folder, case) for folder in folders]),
            "dice": [case_dice(runs, c, case) for c in (twin, cell)],
        }


def find_file(folder: Path | None, case: str) -> Path:
    """The file of a case, whatever its ending."""
    if folder is None or not folder.is_dir():
        raise MissingFileError(f"folder {folder} is not there")
    for ending in sorted(evaluate.ENDINGS):
        if (path := folder / f"{case}{ending}").is_file():
            return path
    raise MissingFileError(f"{folder} holds no {case}")


def slice_of(runs: Runs, case: str, images: Path | None, paths: Sequence[Path]) -> figures.Slice:
    """The slice of a case; without its image where that is not there."""
    values = [runs.info["labels"][name] for name in runs.classes if name in runs.info["labels"]]
    try:
        segmentations = [figures.read_volume(path, segmentation=True) for path in paths]
        try:
            file = find_file(images, f"{case}_0000")
            image = figures.read_volume(file, segmentation=False)[0]
        except MissingFileError:
            image = None
        spacing = segmentations[0][1]
        return figures.cut(image, [s[0] for s in segmentations], values, spacing)
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise MissingFileError(f"{case} cannot be read ({error})") from error


def case_dice(runs: Runs, cell: dict, case: str) -> str:
    """Mean Dice of a case in a run."""
    value = runs.dice_by_cell[cell["id"]][case].mean()
    return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def notes(runs: Runs, tables: Sequence[tuple[tuple[int, str], list[Row]]]) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    if len(runs.done) < len(runs.info["cells"]):
        found.append(
            f"Not all runs are there: {len(runs.done)} finished, {len(runs.failed)} failed, "
            f"{len(runs.waiting)} waiting."
        )
    if not runs.folds:
        draws = len({c["draw"] for c in runs.done if c["role"] != "bound"})
        if draws in range(1, statistics.MIN_DRAWS):
            found.append(
                f"{'One draw' if draws == 1 else f'{draws} draws'} of annotated cases only: how "
                "much depends on which cases were annotated is not known. A verdict holds for "
                f"{'this draw' if draws == 1 else 'these draws'} alone."
            )
        else:
            few = [
                f"{row.name} with {annotated(runs, budget)}"
                for budget, rows in tables
                for row in rows
                if row.role == "method" and few_draws(runs, row)
            ]
            if few:
                found.append(
                    f"Fewer than {statistics.MIN_DRAWS} draws of annotated cases have finished of "
                    f"{', '.join(few)}: a verdict holds for these draws alone."
                )
    for budget, rows in tables:
        cells = [cell for row in rows for cell in row.done]
        for title, key in (
            ("commits", "commit"),
            ("versions", "versions"),
            ("hardware", "hardware"),
            ("number formats", "precision"),
        ):
            # stock rows do not tell their number format
            told = [cell for cell in cells if key != "precision" or cell.get(key)]
            values = {settled(cell.get(key)) for cell in told}
            if len(values) > 1:
                effect = " Times are not comparable." if key == "hardware" else ""
                found.append(
                    f"The runs with {annotated(runs, budget)} come from different {title} "
                    f"({len(values)}; see Runs below).{effect}"
                )
    if any(str(cell.get("commit")).endswith("-dirty") for cell in runs.done):
        found.append("Some runs were made with changes of the code that no commit holds.")
    unknown = [name for name in runs.classes if name not in runs.info["labels"]]
    if unknown:
        found.append(f"Classes that the data set does not name: {', '.join(unknown)}.")
    return found


def twin_notes(runs: Runs) -> list[str]:
    """Where the twin that a method stands beside is not the one that it declares."""
    found: dict[tuple[str, str], list[str]] = {}
    unknown = []
    for cell, twin in runs.pairs([c for c in runs.done if c["role"] == "method"]):
        try:
            declared = settings_of(join(*twin_of(cell["trainer"])))
            texts = differing(settings_of(twin["trainer"]), declared)
        except UserError:
            unknown.append(cell["name"])
            continue
        if texts:
            found.setdefault(texts, []).append(cell["name"])
    notes = [
        f"The twin of {', '.join(dict.fromkeys(names))} has {used}, where the method's own twin "
        f"has {declared}: the difference may come from that as well."
        for (used, declared), names in found.items()
    ]
    if unknown:
        notes.append(
            f"Trainers or settings that are not known here: {', '.join(dict.fromkeys(unknown))}. "
            "Whether the twin has the settings of the method's own twin cannot be told."
        )
    return notes


def bound_notes(runs: Runs) -> list[str]:
    """Where a twin is not the network that the bound is with fewer annotations."""
    found: dict[tuple[str, str], list[str]] = {}
    for bound in dict.fromkeys(c["trainer"] for c in runs.done if c["role"] == "bound"):
        for _, twin in runs.pairs(runs.done):
            try:
                texts = differing(settings_of(bound), settings_of(twin["trainer"]))
            except UserError:
                continue
            if texts:
                found.setdefault(texts, []).append(twin["name"])
    return [
        f"The bound has {used}, where the twin {', '.join(dict.fromkeys(names))} has {own}: the "
        "gap between them comes from that as well."
        for (used, own), names in found.items()
    ]


def settings_of(trainer: str) -> dict[str, Any]:
    """A trainer, without its settings, and their values; the seed is left out.

    Raises:
        UserError: not known.
    """
    settings = resolve(trainer).settings()  # type: ignore[attr-defined]
    values = {k: v for k, v in settings.items() if k != "seed"}
    return {"trainer": trainer.split("+")[0], **values}


def differing(first: dict[str, Any], second: dict[str, Any]) -> tuple[str, str] | None:
    """What two trainers set differently, as each sets it; None if nothing."""
    keys = [k for k in first if k in second and first[k] != second[k]]
    if not keys:
        return None

    def told(values: dict[str, Any]) -> str:
        return ", ".join(f"{k}={values[k]}" for k in keys)

    return told(first), told(second)


def settled(value: Any) -> str:
    """A value as text, without what only says where it ran."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in PLACES}
    return json.dumps(value, sort_keys=True)


def environments(runs: Runs) -> list[dict[str, Any]]:
    """Commit, versions, hardware and number format, with the runs that share them."""
    groups: dict[str, dict[str, Any]] = {}
    for cell in runs.done:
        parts = {k: cell.get(k) for k in ("commit", "versions", "hardware", "precision")}
        key = "".join(settled(value) for value in parts.values())
        groups.setdefault(key, {**parts, "cells": []})["cells"].append(cell)
    return list(groups.values())


def describe(runs: Runs, cell: dict) -> str:
    """Which run of a trainer a cell is."""
    if runs.folds:
        return f"fold {cell['fold']}"
    return f"draw {cell['draw']}, seed {cell['seed']}"


def signed(value: float, decimals: int = 1) -> str:
    """A number with its sign, and no negative zero."""
    text = f"{value:+.{decimals}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")


def span(mean: float, low: float, high: float, decimals: int) -> str:
    """A difference and, where there is one, its interval."""
    if math.isnan(low):
        return signed(mean, decimals)
    return f"{signed(mean, decimals)} ({signed(low, decimals)} to {signed(high, decimals)})"


def wrap(name: str) -> Markup:
    """A trainer's name, its settings set apart."""
    base, *settings = name.split("+")
    text = Markup("{}").format(base)
    for setting in settings:
        text += Markup(' <span class="setting">{}</span>').format(setting)
    return text


def plural(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float | None) -> str:
    """A time a reader takes in at once."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(number: float | None) -> str:
    """A number with thousands set apart."""
    if number is None:
        return "–"
    return f"{number:,.0f}".replace(",", " ") if number >= 100 else f"{number:.3g}"


def memory(mb: float | None) -> str:
    """Peak memory."""
    return "–" if mb is None else f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1024:.1f} GB"
