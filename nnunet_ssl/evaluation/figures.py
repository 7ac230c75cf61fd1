"""Plots and slices of the report, as text that stands inside an HTML page.

Plots carry the page's colours: matplotlib draws with the hex values of `THEME`, which are then
replaced by CSS variables, so that one SVG is right on a light and on a dark page.
"""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contourpy
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from PIL import Image

from nnunet_ssl.evaluation.statistics import MARGIN
from nnunet_ssl.planning.raw import silence

INK, MUTED, GRID, BAND = "#010203", "#040506", "#070809", "#0a0b0c"
GOOD, BAD, TWIN = "#0d0e0f", "#101112", "#131415"
COLORS = [f"#a0{k:02x}00" for k in range(8)]  # one a method or class, then again from the start
THEME = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    BAND: "var(--band)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    TWIN: "var(--twin)",
    **{color: f"var(--c{k})" for k, color in enumerate(COLORS)},
}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "text.parse_math": False,  # names may hold a dollar sign
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 12.5,
    "axes.labelsize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
}
SLIM = [  # what matplotlib writes and the page does not need, or must not hold twice
    (r"<metadata>.*?</metadata>", ""),
    (r"<style.*?</style>", ""),  # would style the whole page
    (r"<!--.*?-->", ""),
    (r' id="[A-Za-z0-9]+(\.[a-z]+)?_\d+"', ""),  # figure_1, line2d_1, ...
    (r" font-family: [^;]*;", ""),  # the page's
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"(\d\.\d\d)\d+", r"\1"),  # a hundredth of a pixel is enough
    (r"\s*\n\s*", " "),
    (r"> <", "><"),
]
DPI = 72  # matplotlib's SVG is 72 units an inch
LONGEST = 256  # pixels of a slice along its longer side


class Plot:
    """An SVG under construction; `markup` holds it after the `plot` block."""

    markup = Markup()


@contextmanager
def plot(title: str, width: float = 360, height: float = 250) -> Iterator[tuple[Plot, Axes]]:
    """Yield a plot and its axes; size in CSS pixels, `title` names it to screen readers."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(width / DPI, height / DPI), layout="constrained")
        made = Plot()
        yield made, figure.add_subplot()
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    for pattern, replacement in SLIM:
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    for color, css in THEME.items():
        svg = svg.replace(color, css)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg class="plot" role="img" aria-label="{escape(title)}" {view[0]}'
    head += f' style="max-width:{width:g}px">'
    made.markup = Markup(re.sub(r"^<svg[^>]*>", lambda _: head, svg))


@dataclass(frozen=True)
class Effect:
    """A row of the forest plot: Dice differences to the twin, all in Dice points."""

    name: str
    mean: float
    low: float
    high: float
    runs: Sequence[float]


def forest(title: str, effects: Sequence[Effect]) -> Markup:
    """Mean difference to the twin with its interval, and the single units behind it."""
    margin = 100 * MARGIN
    with plot(title, 420, 62 + 46 * len(effects)) as (made, axes):
        axes.axvspan(-margin, margin, color=BAND, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        values = [-1.5 * margin, 1.5 * margin]
        for row, effect in enumerate(effects):
            y = len(effects) - row
            color = GOOD if effect.low > 0 else BAD if effect.high < 0 else INK
            if not np.isnan(effect.low):
                axes.plot([effect.low, effect.high], [y, y], color=color, linewidth=3, alpha=0.45)
                values += [effect.low, effect.high]
            if len(effect.runs) > 1:
                axes.plot(effect.runs, [y] * len(effect.runs), "|", color=color, markersize=9)
            axes.plot(effect.mean, y, "o", color=color, markersize=6.5)
            values += [effect.mean, *effect.runs]
            axes.text(0, y + 0.24, effect.name, transform=axes.get_yaxis_transform(), va="bottom")
        # An interval of very few runs can be so wide that nothing else is seen.
        reach = 3 * max(abs(v) for e in effects for v in (e.mean, *e.runs, 1.5 * margin))
        low, high = max(min(values), -reach), min(max(values), reach)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_ylim(0.5, len(effects) + 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Dice points gained over the twin")
    return made.markup


def dice_by_budget(
    title: str,
    lines: Sequence[tuple[str, str, Sequence[tuple[int, float, float]]]],
    bound: float | None,
    unit: str,
) -> Markup:
    """Mean Dice (%) over the budget, counted in `unit`.

    A line is a name, a colour and its (budget, mean, sd) points; `bound` that of all annotations.
    """
    budgets = sorted({point[0] for _, _, points in lines for point in points})
    with plot(title, 560, 340) as (made, axes):
        if bound is not None:
            axes.axhline(bound, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                "all annotated",
                (0, bound),
                (2, 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                color=MUTED,
                fontsize=11.5,
            )
        for k, (name, color, points) in enumerate(lines):
            x = [budgets.index(p[0]) + 0.04 * (k - (len(lines) - 1) / 2) for p in points]
            before = sum(color == other for _, other, _ in lines[:k])  # twins are all grey
            axes.errorbar(
                x,
                [p[1] for p in points],
                [0 if np.isnan(p[2]) else p[2] for p in points],
                color=color,
                linestyle=("-", "--", ":", "-.")[before % 4],
                marker="o",
                markersize=4.5,
                elinewidth=1,
                capsize=2,
                label=visible(name),
            )
        axes.set_xticks(range(len(budgets)), [str(b) for b in budgets])
        axes.set_xlabel(f"annotated {unit}s")
        axes.set_ylabel("Dice (%)")
        legend_below(axes, columns=2)
    return made.markup


def curves(
    title: str,
    lines: Sequence[tuple[str, str, np.ndarray]],
    unit: str = "",
    whole: bool = False,
) -> Markup:
    """Curves over training: lines of name, colour and values (runs, points), evenly spaced.

    Thick: mean over runs; the band spans the runs. `whole` keeps the axis from 0 to 1 where all
    values lie there.
    """
    with plot(title) as (made, axes):
        for name, color, values in lines:
            seen = ~np.isnan(values).all(axis=0)
            x = 100 * (np.arange(values.shape[1]) + 1)[seen] / values.shape[1]
            shown = values[:, seen]
            axes.plot(x, np.nanmean(shown, axis=0), color=color, label=visible(name))
            if len(shown) > 1:
                low, high = np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        if whole and all(np.nanmax(values) <= 1 for _, _, values in lines):
            axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(0, 100)
        axes.set_xlabel("training (%)")
        axes.set_ylabel(unit)
        axes.set_title(title.split(": ")[-1])
        legend_below(axes, columns=2)
    return made.markup


def gains(title: str, values: np.ndarray, limits: tuple[float, float]) -> Markup:
    """Gain of each case (Dice points), sorted, as stems from 0; `limits` of the gains shown."""
    ordered = np.sort(values)[::-1]
    x = np.arange(1, len(ordered) + 1)
    with plot(title, 360, 220) as (made, axes):
        for part, color in ((ordered >= 0, GOOD), (ordered < 0, BAD)):
            axes.vlines(x[part], 0, ordered[part], color=color, linewidth=1.4)
            axes.plot(x[part], ordered[part], "o", color=color, markersize=3.2)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xlim(0.2, len(ordered) + 0.8)
        low, high = min(0.0, limits[0]), max(0.0, limits[1])
        pad = 0.05 * max(high - low, 100 * MARGIN)
        axes.set_ylim(low - pad, high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("cases, sorted by gain")
        axes.set_ylabel("Dice points")
    return made.markup


def quality(
    title: str, lines: Sequence[tuple[str, str, Sequence[tuple[float, float, float, float]]]]
) -> Markup:
    """Dice (%) of pseudo-labels: lines of name, colour and (progress %, mean, lowest, highest)."""
    with plot(title, 420, 300) as (made, axes):
        for k, (name, color, points) in enumerate(lines):
            x = np.array([p[0] for p in points]) + 0.8 * (k - (len(lines) - 1) / 2)
            mean, low, high = (np.array([p[i] for p in points]) for i in (1, 2, 3))
            axes.errorbar(
                x,
                mean,
                [mean - low, high - mean],
                color=color,
                marker="o",
                markersize=4,
                elinewidth=1,
                capsize=2,
                label=visible(name),
            )
        axes.set_xticks(sorted({p[0] for _, _, points in lines for p in points}))
        axes.set_xlabel("training (%)")
        axes.set_ylabel("Dice on unannotated cases (%)")
        legend_below(axes, columns=1)
    return made.markup


def visible(name: str) -> str:
    """A name that matplotlib's legend shows: those that begin with _ are left out there."""
    return f" {name}" if name.startswith("_") else name


def legend_below(axes: Axes, columns: int) -> None:
    """Legend under the axes, where it covers no data."""
    if len(axes.get_legend_handles_labels()[1]):
        axes.figure.legend(  # type: ignore[union-attr]
            loc="outside lower left", ncols=columns, handlelength=1.4, columnspacing=1.2
        )


@dataclass(frozen=True)
class Slice:
    """One slice: the image once, outlines of any number of segmentations over it.

    Attributes:
        image: data URI of a JPEG, empty without image.
        width, height: size of the shown part; longer side 200, aspect by spacing.
        outlines: per segmentation the SVG path of each class, in these units.
    """

    image: str
    width: float
    height: float
    outlines: list[list[str]]


def cut(
    image: np.ndarray | None,
    segmentations: Sequence[np.ndarray],
    classes: Sequence[int | Sequence[int]],
    spacing: Sequence[float],
) -> Slice:
    """Show the slice where the first segmentation, the annotation, has most foreground.

    Args:
        image: (Z, Y, X), or None.
        segmentations: (Z, Y, X) label maps of the same shape.
        classes: value, or values, of each class.
        spacing: of the three axes, any unit. Slices stand along the first axis, or along a much
            coarser one (three times the finest spacing, as nnU-Net has it).

    Returns:
        The part around everything that is segmented there, with a margin.
    """
    shape = np.array(segmentations[0].shape)
    axis = int(np.argmax(spacing)) if max(spacing) >= 3 * min(spacing) and shape.min() > 1 else 0
    values = [v for c in classes for v in ([c] if isinstance(c, int) else c)]
    foreground = [np.moveaxis(np.isin(s, values), axis, 0) for s in segmentations]
    index = int(foreground[0].sum(axis=(1, 2)).argmax())
    pixel = [s for k, s in enumerate(spacing) if k != axis]
    box = around(np.any([f[index] for f in foreground], axis=0), pixel)
    sizes = [(b.stop - b.start) * p for b, p in zip(box, pixel, strict=True)]
    scale = [200 / max(sizes) * p for p in pixel]
    outlines = []
    for segmentation in segmentations:
        plane = np.moveaxis(segmentation, axis, 0)[index][box]
        outlines.append([outline(np.isin(plane, c), scale) for c in classes])
    shown = "" if image is None else jpeg(np.moveaxis(image, axis, 0)[index][box], sizes)
    height, width = (200 / max(sizes) * s for s in sizes)
    return Slice(shown, round(width, 1), round(height, 1), outlines)


def around(mask: np.ndarray, pixel: Sequence[float]) -> tuple[slice, slice]:
    """Square around a 2D mask, a third wider on each side, cut at the border; all if empty.

    Args:
        mask: (Y, X).
        pixel: edge lengths of a pixel.
    """
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    ranges = [np.flatnonzero(mask.any(axis=1 - k))[[0, -1]] + (0, 1) for k in range(2)]
    side = 5 / 3 * max((stop - start) * p for (start, stop), p in zip(ranges, pixel, strict=True))
    slices = []
    for (start, stop), p, size in zip(ranges, pixel, mask.shape, strict=True):
        half = max(side / p, 16) / 2
        middle = (start + stop) / 2
        slices.append(slice(max(0, round(middle - half)), min(size, round(middle + half))))
    return slices[0], slices[1]


def outline(mask: np.ndarray, scale: Sequence[float]) -> str:
    """SVG path around a 2D mask; `scale` turns pixels (row, column) into the path's units."""
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    parts = []
    for line in lines:
        points = (np.asarray(line) - 0.5) * (scale[1], scale[0])  # pad moved the centres by 1
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


def jpeg(plane: np.ndarray, sizes: Sequence[float]) -> str:
    """Data URI of a slice, windowed from its 1st to 99th percentile, at most LONGEST wide."""
    plane = np.nan_to_num(plane.astype(float))
    low, high = np.percentile(plane, [1, 99])
    gray = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
    pixels = Image.fromarray(np.round(255 * gray).astype(np.uint8))
    factor = min(LONGEST, max(plane.shape)) / max(sizes)
    height, width = (max(1, round(factor * s)) for s in sizes)
    with io.BytesIO() as file:
        pixels.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def read_volume(path: Path, segmentation: bool) -> tuple[np.ndarray, list[float]]:
    """Read with nnU-Net's reader: (Z, Y, X), channels averaged, and the spacing of the axes."""
    with silence():
        reader = determine_reader_writer_from_file_ending(
            "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix,
            str(path),
            allow_nonmatching_filename=True,
            verbose=False,
        )()
    if segmentation:
        array, properties = reader.read_seg(str(path))
        return array[0], [float(s) for s in properties["spacing"]]
    array, properties = reader.read_images([str(path)])
    return array.mean(axis=0), [float(s) for s in properties["spacing"]]
