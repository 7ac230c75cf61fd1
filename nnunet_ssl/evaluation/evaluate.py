"""Score a folder of segmentations against a folder of annotations."""

import csv
import json
import math
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import (
    LIST_OF_IO_CLASSES,
    determine_reader_writer_from_dataset_json,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_ssl.errors import MAX_LISTED, UserError
from nnunet_ssl.evaluation.metrics import (
    CIRCUMFERENCES,
    DISTANCES,
    OVERLAPS,
    Scores,
    bounding_box,
    circumference_errors,
    score_masks,
)
from nnunet_ssl.io import (
    atomic_path,
    check_complete,
    explain_os_error,
    has_nonfinite_nifti,
    silence,
    write_json,
)
from nnunet_ssl.planning.workers import Workers, available_cpus

CASES_NAME, SUMMARY_NAME = "cases.csv", "summary.json"
COLUMNS = ("case", "class", "metric", "unit", "value")
RULE = (
    "Empty masks: a case whose annotation and segmentation both lack a class is left out of that "
    "class and counted. If only one lacks it, Dice, Jaccard and NSD are 0; distances are missing, "
    "never 0, and the case is counted and listed."
)
DEFINITIONS = (
    "As medpy.metric.binary 0.5. HD95: 95th percentile of the surface distances of both "
    "directions; ASSD: their mean; ASD: mean from segmentation to annotation. NSD: share of the "
    "surface voxels of both masks within the tolerance, voxels counted, not weighted by area. "
    "sd: over cases, n - 1."
)
CIRCUMFERENCE = (
    "HC error: head circumference of the segmentation minus that of the annotation, each measured "
    "on the ellipse that fits the outline of the mask's largest piece; |HC error|: its size. "
    "Missing where no ellipse fits one of the two."
)
WIDTH = 100  # of the text below the table
UNITS = {"mm": ("mm",), "voxel": ("voxel",), "both": ("mm", "voxel")}
TITLES = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "assd": "ASSD", "asd": "ASD"}
TITLES |= {"hc_error": "HC error", "hc_abs_error": "|HC error|"}
ITK_ENDINGS = (".nii", ".mhd")  # read by SimpleITK, but not in the list of nnU-Net's reader
ENDINGS = {*ITK_ENDINGS, *(e for cls in LIST_OF_IO_CLASSES for e in cls.supported_file_endings)}
# how far the geometry of two files of one grid may differ, by rounding in their headers
SPACING_TOLERANCE = 1e-3  # relative
ORIGIN_TOLERANCE = 1e-2  # of the smallest edge of a voxel
DIRECTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Classes:
    """What is scored.

    Attributes:
        values: name of a label or region -> the values it consists of.
        ignore: value of the annotation to leave out, or None.
        source: where this is from, for messages.
    """

    values: dict[str, tuple[int, ...]]
    ignore: int | None
    source: str


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case.

    Attributes:
        scores: class -> scores.
        empty: class -> which masks lack it ("both", "annotation" or "segmentation"), if one does.
    """

    scores: dict[str, Scores]
    empty: dict[str, str]


def evaluate_folder(
    ground_truth: Path,
    predictions: Path,
    output: Path,
    *,
    labels: Sequence[int] | None = None,
    dataset_json: Path | None = None,
    units: Literal["mm", "voxel", "both"] = "mm",
    tolerance: float = 1.0,
    circumference: Sequence[str] = (),
    processes: int | None = None,
    quiet: bool = False,
) -> dict:
    """Score every case, write `cases.csv` and `summary.json`, print a table.

    Nothing is written unless every case can be scored. Images of one slice are scored in 2D. Files
    that hold no spacing (PNG, TIFF without JSON) are scored in voxels, whatever `units` says.

    Args:
        ground_truth: folder of annotations, `<case><ending>`.
        predictions: folder of segmentations of the same cases, under the same names.
        output: folder for the scores, made if need be.
        labels: values to score, beside background 0.
        dataset_json: names, regions, ignore label and reader; default: dataset.json beside the
            predictions, beside the annotations or one folder up.
        units: of the distances.
        tolerance: of NSD, in each of the units, >= 0.
        circumference: classes that are heads, whose circumference is compared as well. 2D, in mm.
        processes: cases at a time; None: one per core that this process may use.
        quiet: print nothing.

    Returns:
        The content of summary.json.

    Raises:
        UserError: no files; a prediction missing or too many; labels unknown; a file unreadable;
            shape or geometry of a pair differ; a value outside the labels; a circumference in 3D
            or without spacing. One message tells all.
    """
    ground_truth, predictions, output = Path(ground_truth), Path(predictions), Path(output)
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"The tolerance is {tolerance}. Give --tolerance 0 or more.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file. Give another folder with -o.")
    dataset = _find_dataset_json(ground_truth, predictions, dataset_json, labels is None)
    content = _read_dataset_json(dataset) if dataset else {}
    classes = _classes_of_values(labels) if labels else _classes_of_dataset(dataset, content)
    _check_circumference(circumference, classes, units)
    annotations = _list_masks(ground_truth, content)
    segmentations = _list_masks(predictions, content)
    _check_pairs(ground_truth, annotations, predictions, segmentations)

    cases = list(annotations)
    readers = [
        _choose_reader(files[cases[0]], files[cases[0]].name[len(cases[0]) :], content)
        for files in (annotations, segmentations)
    ]
    spacing_known = all(_holds_spacing(path, readers[0]) for path in annotations.values())
    if circumference and not spacing_known:
        raise UserError(
            f"The masks in {ground_truth} hold no spacing, so circumferences in mm cannot be told. "
            f"Write them with spacing, or leave out --circumference."
        )
    used_units = UNITS[units] if spacing_known else ("voxel",)
    options = (classes, used_units, tolerance, tuple(circumference))
    jobs = [(annotations[c], segmentations[c], *readers, *options) for c in cases]
    if processes is None:
        processes = min(len(cases), available_cpus())
    with Workers(processes) as workers, silence() if quiet else nullcontext():
        results = workers.map(score_case, jobs, "Scoring cases")
    _raise_all(p for result in results if isinstance(result, list) for p in result)

    scored: dict[str, CaseScores] = dict(zip(cases, results, strict=True))
    summary = _summarize(scored, classes) | {
        "rule": RULE,
        "definitions": f"{DEFINITIONS} {CIRCUMFERENCE}" if circumference else DEFINITIONS,
        "settings": {
            "ground_truth": str(ground_truth),
            "predictions": str(predictions),
            "labels_from": classes.source,
            "ignore": classes.ignore,
            "units": list(used_units),
            "spacing_known": spacing_known,
            "tolerance": tolerance,
            "circumference": list(circumference),
        },
        "versions": _versions(),
    }
    _write(output, scored, summary)
    if not quiet:
        print(format_summary(summary))
        print(f"\nWritten: {output / CASES_NAME}, {output / SUMMARY_NAME}")
    return summary


def check_annotations(
    annotations: Mapping[str, Path],
    images: Mapping[str, Path],
    image_reader: type[BaseReaderWriter],
    dataset_json: Path,
    workers: Workers,
) -> None:
    """Check annotations before there is anything to score.

    A segmentation gets the geometry of its image, so that of image and annotation must fit as
    `evaluate_folder` wants it.

    Args:
        annotations: case -> mask, of all cases.
        images: case -> image, or the first of its channels; of the cases to check.
        image_reader: of the images.
        dataset_json: of the data set; names labels and file ending.
        workers: to read with.

    Raises:
        UserError: an annotation unreadable, with another shape or geometry than its image, or with
            a value outside the labels. One message tells all.
    """
    content = _read_dataset_json(dataset_json)
    classes = _classes_of_dataset(dataset_json, content)
    reader = _choose_reader(next(iter(annotations.values())), content["file_ending"], content)
    jobs = [(annotations[c], image, reader, image_reader, classes) for c, image in images.items()]
    results = workers.map(check_annotation, jobs, "Comparing test masks with their images")
    _raise_all(problem for problems in results for problem in problems)


# ---- what to score ------------------------------------------------------------------------------


def _find_dataset_json(
    ground_truth: Path, predictions: Path, given: Path | None, required: bool
) -> Path | None:
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"{given} does not exist. Correct --dataset-json.")
        return Path(given)
    folders = (predictions, ground_truth, ground_truth.resolve().parent)
    found = [path for folder in folders if (path := folder / "dataset.json").is_file()]
    if required and not found:
        raise UserError(
            f"Which labels? There is no dataset.json in {predictions}, in {ground_truth} or above "
            f"it. Give --dataset-json FILE, or the values: --labels 1 2"
        )
    return found[0] if found else None


def _read_dataset_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}. Correct the file.") from error
    return content if isinstance(content, dict) else {}


def _classes_of_values(labels: Sequence[int]) -> Classes:
    wrong = [i for i in labels if i < 1]
    if wrong or len(set(labels)) < len(labels):
        raise UserError(
            f"--labels {' '.join(map(str, labels))}: give each value once, 1 or more (0 is "
            f"background)."
        )
    return Classes({str(i): (i,) for i in labels}, None, "--labels")


def _classes_of_dataset(path: Path | None, content: dict) -> Classes:
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise UserError(f"{path} lacks labels. Add them, or give the values: --labels 1 2")
    if "background" not in labels and all(str(key).isdigit() for key in labels):
        labels = {name: value for value, name in labels.items()}  # as in MSD: value -> name
    values: dict[str, tuple[int, ...]] = {}
    try:
        for name, value in labels.items():
            parts = value if isinstance(value, list) else [value]
            values[name] = tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: label {name} is {value!r}. Write an integer or a list."
        ) from error
    ignore = values.pop("ignore", (None,))[0]
    values = {name: parts for name, parts in values.items() if parts != (0,)}
    for name, region in values.items():
        if 0 in region or not region:
            raise UserError(
                f"{path}: region {name} is {list(region)}. List its values, without background 0."
            )
    if not values:
        raise UserError(f"{path} names no label but background. Add labels.")
    return Classes(values, ignore, str(path))


def _check_circumference(names: Sequence[str], classes: Classes, units: str) -> None:
    unknown = [name for name in names if name not in classes.values]
    if unknown:
        raise UserError(
            f"--circumference {unknown[0]}: no such class. There are: "
            f"{', '.join(classes.values)} ({classes.source})."
        )
    if names and "mm" not in UNITS[units]:
        raise UserError(
            "--circumference is told in mm, so --units voxel does not fit. Give --units mm or both."
        )


# ---- files --------------------------------------------------------------------------------------


def _list_masks(folder: Path, dataset: dict) -> dict[str, Path]:
    """Case -> file, sorted; of the data set's file ending where such files exist."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Give a folder that holds one mask per case.")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        matching = [e for e in ENDINGS if path.name.lower().endswith(e)]
        if matching and path.is_file() and not path.name.startswith("."):
            ending = max(matching, key=len)
            found.setdefault(ending, {})[path.name[: -len(ending)]] = path
    if not found:
        raise UserError(
            f"{folder} holds no mask. Put one file per case there, ending with one of "
            f"{', '.join(sorted(ENDINGS))}."
        )
    wanted = dataset.get("file_ending")
    if wanted in found:
        return found[wanted]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds files of several kinds: {', '.join(sorted(found))}. Keep one kind, or "
            f"name it as file_ending in dataset.json."
        )
    return next(iter(found.values()))


def _check_pairs(
    ground_truth: Path,
    annotations: dict[str, Path],
    predictions: Path,
    segmentations: dict[str, Path],
) -> None:
    if ground_truth.resolve() == predictions.resolve():
        raise UserError(f"-g and -p are both {predictions}. Give the folder of segmentations.")
    missing = [path for case, path in annotations.items() if case not in segmentations]
    extra = [path for case, path in segmentations.items() if case not in annotations]
    _raise_all(
        [f"{p} has no segmentation in {predictions}. Predict it, or move it away." for p in missing]
        + [f"{p} has no annotation in {ground_truth}. Add it, or move it away." for p in extra]
    )


def _raise_all(problems: Iterable[str]) -> None:
    listed = list(problems)
    if len(listed) > MAX_LISTED:
        listed[MAX_LISTED:] = [f"and {len(listed) - MAX_LISTED} more."]
    if listed:
        raise UserError("\n".join(listed))


def _choose_reader(example: Path, ending: str, dataset: dict) -> type[BaseReaderWriter]:
    """Return nnU-Net's reader of such files: the one dataset.json names, else the first able."""
    ending = ending.lower()
    if ending in ITK_ENDINGS and "overwrite_image_reader_writer" not in dataset:
        return SimpleITKIO
    content = dataset | {"file_ending": ending}
    with silence():
        try:
            return determine_reader_writer_from_dataset_json(content, str(example), verbose=False)
        except RuntimeError:  # the example is broken, which is told when its turn comes
            return determine_reader_writer_from_dataset_json(content, verbose=False)


def _holds_spacing(path: Path, reader: type[BaseReaderWriter]) -> bool:
    if issubclass(reader, Tiff3DIO):
        return path.with_suffix(".json").is_file()
    return not issubclass(reader, NaturalImage2DIO)


# ---- one case -----------------------------------------------------------------------------------


def score_case(
    annotation: Path,
    segmentation: Path,
    annotation_reader: type[BaseReaderWriter],
    segmentation_reader: type[BaseReaderWriter],
    classes: Classes,
    units: Sequence[str],
    tolerance: float,
    circumference: Sequence[str] = (),
) -> CaseScores | list[str]:
    """Read, check and score one case; all problems in words if it cannot be scored."""
    pair = ((annotation, annotation_reader), (segmentation, segmentation_reader))
    arrays, geometries, problems = [], [], []
    for path, reader in pair:
        try:
            array, geometry = _read_mask(path, reader)
            arrays.append(array)
            geometries.append(geometry)
        except UserError as error:
            problems.append(str(error))
    if problems:
        return problems

    truth, found = arrays
    problems = _compare_geometry(
        segmentation,
        found,
        geometries[1],
        annotation,
        truth,
        geometries[0],
        "the segmentation to the grid of the annotation",
    )
    allowed, ignore = _allowed_values(classes)
    problems += _check_values(annotation, truth, allowed | ignore, classes.source)
    problems += _check_values(segmentation, found, allowed, classes.source)
    if problems:
        return problems

    axes = [i for i, size in enumerate(truth.shape) if size > 1] or [0]
    if circumference and len(axes) != 2:
        return [f"{annotation} is not 2D, as circumferences need. Leave out --circumference."]
    spacing = geometries[0]["array_spacing"]
    spacings = {"mm": [spacing[i] for i in axes], "voxel": [1.0] * len(axes)}
    shape = tuple(truth.shape[i] for i in axes)
    truth, found = truth.reshape(shape), found.reshape(shape)
    heads = _measure_heads(truth, found, classes, circumference, spacings["mm"])
    box = bounding_box((truth != 0) | (found != 0)) or (slice(0, 1),) * len(axes)
    kind = np.min_scalar_type(max(allowed | ignore))
    truth, found = truth[box].astype(kind), found[box].astype(kind)
    ignored = None if classes.ignore is None else truth == classes.ignore
    if ignored is not None:
        found[ignored] = 0

    result = CaseScores({}, {})
    for name, values in classes.values.items():
        masks = {"annotation": np.isin(truth, values), "segmentation": np.isin(found, values)}
        empty = [which for which, mask in masks.items() if not mask.any()]
        if empty:
            result.empty[name] = "both" if len(empty) == 2 else empty[0]
        result.scores[name] = score_masks(
            **masks, spacings={u: spacings[u] for u in units}, tolerance=tolerance, ignored=ignored
        ) | heads.get(name, {})
    return result


def check_annotation(
    annotation: Path,
    image: Path,
    annotation_reader: type[BaseReaderWriter],
    image_reader: type[BaseReaderWriter],
    classes: Classes,
) -> list[str]:
    """Return in words why an annotation cannot be compared with a segmentation of its image."""
    try:
        truth, geometry = _read_mask(annotation, annotation_reader)
    except UserError as error:
        return [str(error)]
    with silence():  # the image has been read before, and is whole
        array, properties = image_reader().read_images([str(image)])
    problems = _compare_geometry(
        annotation,
        truth,
        geometry,
        image,
        array[0],
        _geometry_of(properties),
        "the mask to the grid of the image",
    )
    allowed, ignore = _allowed_values(classes)
    return problems + _check_values(annotation, truth, allowed | ignore, classes.source)


def _allowed_values(classes: Classes) -> tuple[set[int], set[int]]:
    """Values of masks, and those of annotations alone."""
    allowed = {0, *(v for values in classes.values.values() for v in values)}
    return allowed, set() if classes.ignore is None else {classes.ignore}


def _measure_heads(
    truth: np.ndarray,
    found: np.ndarray,
    classes: Classes,
    names: Sequence[str],
    spacing: Sequence[float],
) -> dict[str, Scores]:
    """Compare circumferences on whole images: their frame is no outline."""
    ignored = None if classes.ignore is None else truth == classes.ignore
    scores = {}
    for name in names:
        head, annotated = (np.isin(array, classes.values[name]) for array in (found, truth))
        scores[name] = circumference_errors(head, annotated, spacing, ignored)
    return scores


def _read_mask(path: Path, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a mask as (z, y, x) and its geometry; `array_spacing` is in the order of the array."""
    try:
        check_complete(path)
        with silence():
            array, properties = reader().read_seg(str(path))
    except MemoryError:
        raise
    except Exception as error:  # every reader library has its own errors
        lines = [line for line in str(error).splitlines() if line and "Reason:" not in line]
        reason = lines[-1] if lines else type(error).__name__  # ITK's "Reason:" misleads
        raise UserError(
            f"Cannot read {path}: {reason}. The file is damaged or cut short; write it again."
        ) from error
    if len(array) != 1:
        raise UserError(f"{path} holds {len(array)} channels. A mask has one: convert it.")
    if has_nonfinite_nifti(path):
        raise UserError(f"{path} holds NaN or infinite values. Write a mask of integers.")
    return array[0], _geometry_of(properties)


def _geometry_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    geometry: dict[str, Any] = {"array_spacing": [float(i) for i in properties["spacing"]]}
    if "sitk_stuff" in properties:
        geometry |= {k: properties["sitk_stuff"][k] for k in ("spacing", "origin", "direction")}
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = stuff.get("reoriented_affine", stuff["original_affine"])
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        geometry["spacing"] = tuple(spacing)
        geometry["origin"] = tuple(affine[:3, 3])
        geometry["direction"] = tuple((affine[:3, :3] / spacing).ravel())
    else:
        geometry["spacing"] = tuple(geometry["array_spacing"])
    return geometry


def _compare_geometry(
    path: Path,
    array: np.ndarray,
    geometry: dict,
    other: Path,
    expected: np.ndarray,
    wanted: dict,
    resample: str,
) -> list[str]:
    if array.shape != expected.shape:
        return [
            f"{path} has shape {array.shape}, but {other} has {expected.shape}. Resample "
            f"{resample}."
        ]
    voxel = min(wanted["array_spacing"])
    limits = {
        "spacing": SPACING_TOLERANCE * np.abs(wanted["spacing"]),
        "origin": ORIGIN_TOLERANCE * voxel,
        "direction": DIRECTION_TOLERANCE,
    }
    problems = []
    for name, limit in limits.items():
        if name not in geometry or name not in wanted:
            continue
        ours, theirs = np.asarray(geometry[name]), np.asarray(wanted[name])
        if ours.shape != theirs.shape or (np.abs(ours - theirs) > limit).any():
            problems.append(
                f"{path} has {name} {_numbers(ours)}, but {other} has {_numbers(theirs)}. Correct "
                f"the header, or resample {resample}."
            )
    return problems


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _check_values(path: Path, array: np.ndarray, allowed: set[int], source: str) -> list[str]:
    unknown = sorted(set(pd.unique(array.ravel()).tolist()) - allowed)
    if not unknown:
        return []
    shown = ", ".join(f"{value:g}" for value in unknown[:MAX_LISTED])
    return [
        f"{path} holds the value(s) {shown}, outside the set "
        f"{', '.join(map(str, sorted(allowed)))} ({source}). Correct the file, or name the "
        f"value(s) as labels."
    ]


# ---- all cases ----------------------------------------------------------------------------------


def _summarize(scored: dict[str, CaseScores], classes: Classes) -> dict:
    summary: dict[str, Any] = {"format": 1, "cases": len(scored), "classes": {}}
    for name, values in classes.values.items():
        columns: dict[str, list[float]] = {}
        for result in scored.values():
            for (metric, unit), value in result.scores[name].items():
                column = columns.setdefault(f"{metric}_{unit}" if unit else metric, [])
                if value is not None:
                    column.append(value)
        empty: dict[str, list[str]] = {"both": [], "annotation": [], "segmentation": []}
        for case, result in scored.items():
            if name in result.empty:
                empty[result.empty[name]].append(case)
        summary["classes"][name] = {
            "values": list(values),
            "metrics": {metric: _statistics(column) for metric, column in columns.items()},
            "empty": {which: {"n": len(found), "cases": found} for which, found in empty.items()},
        }
    return summary


def _statistics(values: list[float]) -> dict[str, float | int | None]:
    return {
        "mean": float(np.mean(values)) if values else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
    }


def _versions() -> dict[str, str]:
    packages = ("nnunet_ssl", "nnunetv2", "numpy", "scipy", "SimpleITK")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _write(output: Path, scored: dict[str, CaseScores], summary: dict) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(explain_os_error(error, output)) from error
    with (
        atomic_path(output / CASES_NAME) as part,
        open(part, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case, result in scored.items():
            for name, scores in result.scores.items():
                for (metric, unit), value in scores.items():
                    row = (case, name, metric, unit, "" if value is None else repr(float(value)))
                    writer.writerow(row)
    write_json(summary, output / SUMMARY_NAME)


def format_summary(summary: dict) -> str:
    """Table of mean ± sd per class, and below it what was empty and by which rule."""
    settings = summary["settings"]
    tolerance, units = settings["tolerance"], settings["units"]
    blocks = []
    for unit in units:
        titles = [TITLES[m] for m in OVERLAPS] + [f"NSD {tolerance:g} {unit}"]
        titles += [f"{TITLES[m]} {unit}" for m in DISTANCES]
        keys = [*OVERLAPS, f"nsd_{unit}", *(f"{m}_{unit}" for m in DISTANCES)]
        if settings["circumference"] and unit == "mm":
            titles += [f"{TITLES[m]} mm" for m in CIRCUMFERENCES]
            keys += [f"{m}_mm" for m in CIRCUMFERENCES]
        rows = [["class", "n", *titles]]
        for name, entry in summary["classes"].items():
            n = entry["metrics"]["dice"]["n"]
            cells = [_cell(entry["metrics"].get(key), n, key) for key in keys]
            rows.append([name, str(n), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        blocks.append(
            "\n".join(
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            )
        )
    notes = [f"Mean ± sd over {summary['cases']} case(s). {summary['rule']}"]
    if settings["circumference"]:
        notes.append(CIRCUMFERENCE)
    if not settings["spacing_known"]:
        notes.append("The files hold no spacing: distances are in voxels.")
    what = {
        "both": "neither annotated nor segmented in {n} case(s), left out",
        "annotation": "segmented but not annotated in {n} case(s), distances missing",
        "segmentation": "annotated but not segmented in {n} case(s), distances missing",
    }
    for name, entry in summary["classes"].items():
        for which, text in what.items():
            n, cases = entry["empty"][which]["n"], entry["empty"][which]["cases"]
            if n:
                more = f" and {n - MAX_LISTED} more" if n > MAX_LISTED else ""
                listed = ", ".join(cases[:MAX_LISTED])
                notes.append(f"{name}: {text.format(n=n)}: {listed}{more}.")
    wrapped = [textwrap.fill(note, WIDTH, break_on_hyphens=False) for note in notes]
    return "\n\n".join([*blocks, "\n".join(wrapped)])


def _cell(statistics: dict | None, n: int, key: str) -> str:
    if not statistics or not statistics["n"]:
        return "-"
    digits = 2 if key.startswith((*DISTANCES, *CIRCUMFERENCES)) else 4
    text = f"{statistics['mean']:.{digits}f}"
    if statistics["sd"] is not None:
        text += f" ± {statistics['sd']:.{digits}f}"
    return text if statistics["n"] == n else f"{text} (n={statistics['n']})"
