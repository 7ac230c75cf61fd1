"""Read a folder of `nnunet_ssl benchmark` or `compare`: what was run, and its scores."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import statistics

FORMAT = 1
METRICS = {  # in the order of the tables: what it is called, decimals
    "dice": ("Dice", 1),
    "jaccard": ("Jaccard", 1),
    "hd95": ("HD95", 2),
    "assd": ("ASSD", 2),
    "asd": ("ASD", 2),
    "nsd": ("NSD", 1),
    "hc_abs_error": ("|HC error|", 2),
    "hc_error": ("HC error", 2),
}
# in the main table; the others stand below it
MAIN = ("dice", "hd95", "assd", "nsd", "hc_abs_error")
PERCENT = ("dice", "jaccard", "nsd")
DICE = ("dice", "")

Metric = tuple[str, str]  # name and unit


class Runs:
    """A folder of runs: what the cells were, and their scores.

    Attributes:
        info: runs.json.
        done: cells with scores; `failed` and `waiting` the others. `by_id` holds those done.
        folds: the runs are folds of a cross-validation.
        budget_unit: what budgets count, in the singular.
        scores: one row a cell, case, class and metric; `value` NaN where missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = self._read_info()
        cells = self.info["cells"]
        self._refuse_mixed(cells)
        self.scores = self._read_scores(cells)
        scored = set(self.scores["cell"])
        self.done = [c for c in cells if c["state"] == "done" and c["id"] in scored]
        self.failed = [c for c in cells if c["state"] == "failed"]
        self.waiting = [c for c in cells if c not in self.done and c not in self.failed]
        if not self.done:
            first = f" The first error: {self.failed[0]['error']}" if self.failed else ""
            raise UserError(
                f"No cell of {folder} has finished ({len(self.failed)} failed, "
                f"{len(self.waiting)} waiting): nothing to report. Run the command that made the "
                f"folder again; it goes on where it was.{first}"
            )
        self.by_id = {c["id"]: c for c in self.done}
        self.scores = self.scores[self.scores["cell"].isin(self.by_id)]
        self.folds = self.info["units"] == "folds"
        self.budget_unit = self.info.get("budget_unit", "case")  # or group, patient, ...
        if not self.folds:
            self._refuse_different_cases()

    def _read_info(self) -> dict:
        path = self.folder / "runs.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder} holds no runs.json. Give the folder that was the -o of nnunet_ssl "
                "benchmark or nnunet_ssl compare."
            )
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} cannot be read ({error}). Run the command that made the folder again."
            ) from error
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise UserError(
                f"{path} is not of format {FORMAT}. Run the benchmark again, or make the report "
                "with the version of nnunet_ssl that ran it."
            )
        return info

    def _refuse_mixed(self, cells: Sequence[dict]) -> None:
        """One table, one protocol, one data set: also where the spec was edited between runs."""
        for key in ("protocol", "dataset", "configuration"):
            named = {str(c[key]) for c in [self.info, *cells] if key in c}
            if len(named) > 1:
                raise UserError(
                    f"{self.folder / 'runs.json'} mixes several values of {key}: "
                    f"{', '.join(sorted(named))}. They cannot stand in one table: run each into "
                    "a folder of its own."
                )
        protocol = self.spec.get("protocol", self.info["protocol"])
        if protocol != self.info["protocol"]:
            raise UserError(
                f"{self.folder / 'spec.yaml'} says protocol {protocol}, but runs.json says "
                f"{self.info['protocol']}. They cannot stand in one table: run each into a folder "
                "of its own."
            )

    @cached_property
    def spec(self) -> dict:
        """The spec as it was read; empty where the folder has none."""
        path = self.folder / "spec.yaml"
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except yaml.YAMLError as error:
            raise UserError(f"{path} cannot be read: {error}. Mend or remove it.") from error
        return spec if isinstance(spec, dict) else {}

    def _read_scores(self, cells: Sequence[dict]) -> pd.DataFrame:
        path = self.folder / "results.csv"
        columns = ["cell", "case", "class", "metric", "unit", "value"]
        if not path.is_file():
            return pd.DataFrame(columns=columns)
        try:
            scores = pd.read_csv(
                path,
                usecols=columns,
                dtype={c: str for c in columns[:-1]} | {"value": float},
                keep_default_na=False,  # a case may be called NA
                na_values={"value": [""]},
            )
        except (ValueError, pd.errors.ParserError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Delete it and run the command that made the "
                "folder again: finished cells are kept, and it is written anew."
            ) from error
        unknown = set(scores["cell"]) - {c["id"] for c in cells}
        if unknown:
            raise UserError(
                f"{path} holds cells that runs.json does not know: {', '.join(sorted(unknown))}. "
                "Run the command that made the folder again."
            )
        twice = scores.duplicated(["cell", "case", "class", "metric", "unit"])
        if twice.any():
            cell = scores.loc[twice, "cell"].iloc[0]
            raise UserError(
                f"{path} holds rows of cell {cell} twice. Delete it and run the command that made "
                "the folder again."
            )
        return scores

    def _refuse_different_cases(self) -> None:
        cases = {
            cell: frozenset(rows["case"]) for cell, rows in self.scores.groupby("cell", sort=False)
        }
        first = self.done[0]["id"]
        for cell, found in cases.items():
            if found != cases[first]:
                odd = sorted(found ^ cases[first])
                raise UserError(
                    f"Cells {first} and {cell} of {self.folder} were tested on different cases "
                    f"({', '.join(odd[:5])}): they cannot be compared. Run each test set into a "
                    "folder of its own."
                )

    def path(self, text: str | None) -> Path | None:
        """A path of runs.json, which is relative to the folder where it lies inside."""
        return None if text is None else self.folder / text

    @cached_property
    def metrics(self) -> list[Metric]:
        """Metrics with their unit, in the order of the tables."""
        found = self.scores[["metric", "unit"]].drop_duplicates().itertuples(index=False)
        order = list(METRICS)
        return sorted(
            ((m, unit) for m, unit in found if m in order), key=lambda m: (order.index(m[0]), m[1])
        )

    @cached_property
    def classes(self) -> list[str]:
        """Foreground classes in the order of the data set."""
        known = list(self.info["labels"])
        found = dict.fromkeys(self.scores["class"])
        return sorted(found, key=lambda c: known.index(c) if c in known else len(known))

    @cached_property
    def class_means(self) -> pd.DataFrame:
        """Mean over cases, missing values left out: rows (cell, metric, unit), a column a class."""
        means = self.scores.groupby(["cell", "metric", "unit", "class"])["value"].mean()
        return means.unstack("class").reindex(columns=self.classes)

    def scores_of(self, cell: dict, metric: Metric) -> pd.Series:
        """Scores of a run by class, mean over cases, in the metric's own unit."""
        key = (cell["id"], *metric)
        if key not in self.class_means.index:
            return pd.Series(math.nan, index=self.classes)
        return self.class_means.loc[key]

    def pairs(self, cells: Sequence[dict]) -> list[tuple[dict, dict]]:
        """Runs whose twin has finished too, with their twins."""
        return [(c, self.by_id[c["twin"]]) for c in cells if c.get("twin") in self.by_id]

    @cached_property
    def budgets(self) -> list[tuple[int, str]]:
        """Budgets in order, without that of the bound where there are others."""
        cells = self.info["cells"]
        limited = [c for c in cells if c["role"] != "bound"] or cells
        return sorted({(c["budget"], str(c["budget_name"])) for c in limited})

    def score(self, cell: dict, metric: Metric, name: str | None = None) -> float:
        """Score of a run: of one class, or the mean over the classes that have one."""
        values = self.scores_of(cell, metric)
        return float(values.mean() if name is None else values[name])

    @cached_property
    def tables(self) -> dict[Metric, pd.DataFrame]:
        """Scores of a metric: rows (class, case), a column a cell."""
        return {
            (str(metric), str(unit)): rows.pivot(
                index=["class", "case"], columns="cell", values="value"
            )
            for (metric, unit), rows in self.scores.groupby(["metric", "unit"])
        }

    def in_both(self, cell: dict, twin: dict, metric: Metric, name: str | None) -> pd.DataFrame:
        """Scores of two runs by class and case, columns `own`, `twin`; NaN where one has none."""
        table = self.tables[metric].reindex(columns=[cell["id"], twin["id"]])
        table.columns = pd.Index(["own", "twin"])
        return table if name is None else table[table.index.get_level_values("class") == name]

    def difference(self, cell: dict, twin: dict, metric: Metric, name: str | None = None) -> float:
        """A run's score minus another's, over the cases and classes that both have.

        Mean over the cases of a class, then over classes; NaN without a common score.
        """
        if metric not in self.tables:
            return math.nan
        scores = self.in_both(cell, twin, metric, name)
        return float((scores["own"] - scores["twin"]).groupby("class").mean().mean())

    def paired(
        self, cells: Sequence[dict], metric: Metric, name: str | None = None
    ) -> tuple[int, int]:
        """Scores (case x class x run) that run and twin both have, and those that one has."""
        both = either = 0
        for cell, twin in self.pairs(cells) if metric in self.tables else []:
            known = self.in_both(cell, twin, metric, name).notna()
            both += int(known.all(axis=1).sum())
            either += int(known.any(axis=1).sum())
        return both, either

    def differences(
        self, cells: Sequence[dict], metric: Metric, name: str | None = None
    ) -> pd.DataFrame:
        """Differences to the twin, one a run, with draw and seed; runs that lack it left out."""
        table = pd.DataFrame(
            [
                (c["draw"], c["seed"], self.difference(c, t, metric, name))
                for c, t in self.pairs(cells)
            ],
            columns=["draw", "seed", "difference"],
        )
        return table.dropna(subset="difference")

    def unit_differences(
        self, cells: Sequence[dict], metric: Metric, name: str | None = None
    ) -> tuple[np.ndarray, statistics.UnitKind]:
        """Differences to the twin, one a unit of the rule."""
        return statistics.units_of(self.differences(cells, metric, name), self.folds)

    @cached_property
    def dice_by_cell(self) -> dict[str, pd.Series]:
        """Dice of each cell by case and class."""
        dice = self.scores[self.scores["metric"] == "dice"]
        return {
            str(cell): rows.set_index(["case", "class"])["value"]
            for cell, rows in dice.groupby("cell")
        }

    def case_gains(self, cells: Sequence[dict]) -> pd.Series:
        """Dice gained over the twin by case, in points: mean over classes, then over runs."""
        gains = [
            (self.dice_by_cell[c["id"]] - self.dice_by_cell[t["id"]]).groupby("case").mean()
            for c, t in self.pairs(cells)
        ]
        if not gains:
            return pd.Series(dtype=float)
        return 100 * pd.concat(gains).dropna().groupby(level="case").mean()
