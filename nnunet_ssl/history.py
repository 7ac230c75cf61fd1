"""What training tells of itself: one line an epoch in `ssl_log.jsonl`, and curves of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import gather
from nnunet_ssl.io import atomic_path, explain_os_error, write_text

matplotlib.use("agg")

LOG_NAME = "ssl_log.jsonl"
PLOT_NAME = "ssl_progress.png"


class Meter:
    """Means over an epoch and all processes, kept on the device: no step waits for it.

    Values that are not finite count as missing, each entry of a vector by itself.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Count one value, a scalar or a vector."""
        value = torch.as_tensor(value).detach().float()
        finite = value.isfinite()
        value = torch.where(finite, value, 0.0)
        if name in self._sums:
            self._sums[name] = self._sums[name] + value
            self._counts[name] = self._counts[name] + finite
        else:
            self._sums[name], self._counts[name] = value, finite.float()

    def means(self) -> dict[str, float | list[float]]:
        """Return the means as numbers and lists, NaN where nothing was counted; start anew."""
        here = {name: (self._sums[name].cpu(), self._counts[name].cpu()) for name in self._sums}
        self._sums, self._counts = {}, {}
        everywhere = gather(here)
        result: dict[str, float | list[float]] = {}
        for name in here:
            sums, counts = (sum(t[name][i] for t in everywhere if name in t) for i in (0, 1))
            result[name] = (sums / counts).tolist()
        return result


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, so that the file is JSON for every reader."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class History:
    """The log of one training run.

    Args:
        folder: the fold's output folder.
        writes: False keeps the log in memory, in all but the first of several processes.
    """

    def __init__(self, folder: str | Path, writes: bool = True):
        self.writes = writes
        self.path = Path(folder) / LOG_NAME
        self.plot_path = Path(folder) / PLOT_NAME
        self.records: list[dict] = []

    def cut_back(self, epoch: int) -> None:
        """Read the log and keep what happened before `epoch`; a torn last line is dropped."""
        self.records = [r for r in read_log(self.path) if r["epoch"] < epoch]
        if self.writes:
            write_text("".join(json.dumps(r) + "\n" for r in self.records), self.path)

    def append(self, record: dict) -> None:
        """Add one epoch."""
        record = _finite(record)
        self.records.append(record)
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(explain_os_error(error, self.path)) from error

    def plot(self) -> None:
        """Draw the curves of all epochs so far."""
        if not self.writes:
            return
        import matplotlib.pyplot as plt

        panels = [
            ("loss terms (weighted)", "terms"),
            ("ramp weight, coverage, confidence, agreement", "pseudo_labels"),
            ("class share: pseudo-labels solid, annotated dashed", "shares"),
            ("pseudo-Dice, mean over classes", "pseudo_dice"),
            ("fixed patches, mean over classes", "drift"),
        ]
        with plt.style.context("default"):  # nnU-Net's plots leave their large fonts behind
            figure, axes = plt.subplots(2, 3, figsize=(20, 9), layout="constrained")
            axes.flat[-1].set_axis_off()
            epochs = [r["epoch"] for r in self.records]
            for axis, (title, group) in zip(axes.flat[:-1], panels, strict=True):
                for name, values, style in self._curves(group):
                    axis.plot(epochs, values, style, label=name, marker=".")
                axis.set(title=title, xlabel="epoch")
                axis.grid(alpha=0.3)
                if axis.get_legend_handles_labels()[0]:
                    axis.legend(fontsize=8)
            try:
                with atomic_path(self.plot_path) as part:
                    figure.savefig(part, format="png", dpi=80)
            finally:
                plt.close(figure)

    def _curves(self, group: str) -> list[tuple[str, list[float], str]]:
        nan = float("nan")

        def column(*path: str | int) -> list[float]:
            values = []
            for record in self.records:
                value: Any = record
                for key in path:
                    if isinstance(value, dict):
                        value = value.get(key)
                    elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                        value = value[key]
                    else:
                        value = None
                values.append(nan if value is None else float(value))
            return values

        if group == "shares":
            annotated = [r.get("shares", {}).get("labels") or [] for r in self.records]
            classes = max((len(shares) for shares in annotated), default=0)
            return [
                (f"{name}, class {k + 1}", column("shares", name, k), style)
                for name, style in (("pseudo", "-"), ("labels", "--"))
                for k in range(classes)
            ]
        names = sorted({name for r in self.records for name in r.get(group, {})})
        if group in ("pseudo_dice", "drift"):
            return [
                (name, [mean_of(r.get(group, {}).get(name)) for r in self.records], "-")
                for name in names
            ]
        return [(name, column(group, name), "-") for name in names]


def mean_of(values: Sequence[float | None] | float | None) -> float:
    """Return the mean of the values that are known; NaN if there is none."""
    values = [values] if isinstance(values, float) else values
    counted = [v for v in values or [] if v is not None and not math.isnan(v)]
    return sum(counted) / len(counted) if counted else float("nan")


def read_log(path: str | Path) -> list[dict]:
    """Read `ssl_log.jsonl`; lines that a kill tore off are left out."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
