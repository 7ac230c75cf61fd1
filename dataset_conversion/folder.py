r"""folder: own scans, in any format, with masks for some or all of them.

Reads NIfTI, NRRD, MHA, MHD, PNG, TIFF, JPEG and DICOM series (a folder per series). Scans without
a mask become the unannotated ones. Say which files are which in one of two ways.

Patterns, relative to SRC: what `*` stands for names the case and pairs image and mask; `**/` skips
any number of folders. Quote them, or the shell expands them.

  SRC/images/p01.nii.gz     --images 'images/*.nii.gz'
  SRC/masks/p01_seg.nii.gz  --masks 'masks/*_seg.nii.gz'

  SRC/p01/t1.nii.gz         --images '*/t1.nii.gz' '*/t2.nii.gz'   (one pattern a channel)
  SRC/p01/t2.nii.gz         --masks '*/tumour.nrrd'
  SRC/p01/tumour.nrrd

  SRC/p01/CT/*.dcm          --images '*/CT'                        (folders: DICOM series)

Several channels can also be files that end with _0000, _0001, ..., or one 4D or colour file.

A table, SRC being a CSV file: columns image (or image_0, image_1, ...), mask (empty: none), group
(patient), case (name); paths relative to the table. Further columns of numbers go to cases.csv.

Images of one patient must not be on both sides of a split: give the column group, or --group.

Examples:
  nnunet_ssl convert folder -i scans -d 20 --images 'images/*.nii.gz' --masks 'masks/*.nii.gz' \
      --channels MRI --labels prostate=1 --test 10
  nnunet_ssl convert folder -i scans.csv -d 21 --channels CT --labels liver=1 tumour=2,3
  nnunet_ssl convert folder -i us -d 22 --images '*.png' --masks '*_mask.png' --spacing 0.1 0.1 \
      --channels US --labels head=255 --group '^[0-9]+'
"""

import argparse
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.core import (
    Case,
    Release,
    Scan,
    add_spacing_option,
    add_split_options,
    run_script,
)
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    read_image,
    split_channels,
)
from nnunet_ssl.errors import UserError

WITHOUT_SPACING = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
HINTS = {
    "labels": "Name the value with --labels, or let it count as background: --labels "
    "background=0,VALUE ...",
    "geometry": "Resample one to the grid of the other; if voxels belong together as they are and "
    "only the header is wrong, add --copy-geometry.",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which files, what they show, and splits."""
    parser.add_argument("--name", help="NAME of the data set; default: that of SRC")
    parser.add_argument("--images", nargs="+", metavar="PATTERN", help="images, as above")
    parser.add_argument("--masks", metavar="PATTERN", help="masks, as above")
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="what each channel shows. CT makes nnU-Net keep the intensity scale; any other name "
        "(MRI, US, ...) makes it normalise each scan",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME=VALUE[,VALUE]",
        help="classes and their values in the masks; here they become 1, 2, ... Default: labels "
        "of SRC/dataset.json",
    )
    parser.add_argument(
        "--group", metavar="REGEX", help="the part of the case name that names the patient"
    )
    add_spacing_option(
        parser, "size of a pixel or voxel, x y (z), where files tell none (PNG, ...)"
    )
    parser.add_argument(
        "--copy-geometry",
        action="store_true",
        help="masks take spacing, origin and direction of their image: for masks whose voxels fit "
        "but whose header is wrong",
    )
    add_split_options(parser)


def find(source: Path, options: argparse.Namespace) -> Release:
    """Pair images and masks."""
    about = _read_dataset_json(source)
    names = options.channels or _channel_names(about, _dataset_json(source))
    if not names:
        raise UserError(
            "--channels is missing: say what the images show, e.g. --channels CT or --channels MRI "
            "(one name a channel). CT is treated differently by nnU-Net."
        )
    options.channels = [str(name) for name in names]
    if source.is_file():
        if options.images or options.masks or options.group:
            raise UserError(f"{source} is a table: drop --images, --masks and --group.")
        cases = _from_table(source, len(names))
    else:
        cases = _from_patterns(source, options)
    labels, label_map = _labels(options, about, cases, _dataset_json(source))
    flat = [c for c in cases if c.images[0].suffix.lower() in WITHOUT_SPACING]
    if options.spacing and not flat:
        raise UserError("--spacing: the files have their own spacing. Drop --spacing.")
    unmasked = [c.name for c in cases if c.mask is None]
    notes = [f"{len(unmasked)} of {len(cases)} scans have no mask."] if unmasked else []
    if all(c.group in ("", c.name) for c in cases):
        notes.append("each case counts as one patient; if not, tell groups (see -h).")
    stem = options.name or source.resolve().stem
    return Release(
        name=re.sub(r"[^A-Za-z0-9]", "", stem) or "Scans",
        cases=cases,
        channels=options.channels,
        labels=labels,
        label_map=label_map,
        list_name="by name" if source.is_dir() else source.name,
        spacing_known=bool(options.spacing) or not flat,
        about={k: about[k] for k in ("regions_class_order",) if k in about and not options.labels},
        notes=notes,
    )


# ------------------------------------------------------------------------------------ patterns


def _from_patterns(source: Path, options: argparse.Namespace) -> list[Case]:
    if not options.images:
        raise UserError(
            f"--images is missing: say which files below {source} are the images, e.g. --images "
            f"'images/*.nii.gz'. There are {_examples(source)}. Or give a CSV file with -i."
        )
    masks = _match(source, options.masks, "--masks") if options.masks else {}
    taken = set(masks.values())
    channels = [_match(source, p, "--images", taken) for p in options.images]
    images = {case: [path] for case, path in channels[0].items()}
    if len(channels) > 1:
        if len(channels) != len(options.channels):
            raise UserError(
                f"--images has {len(channels)} patterns, --channels names {len(options.channels)}: "
                f"{', '.join(options.channels)}. Give one pattern a channel."
            )
        every = sorted(set().union(*channels))
        for number, found in enumerate(channels):
            absent = [case for case in every if case not in found]
            if absent:
                raise UserError(
                    f"No file matches {options.images[number]!r} for {listed(absent)}. Each case "
                    f"needs all channels."
                )
        images = {case: [found[case] for found in channels] for case in every}
    else:
        images = _join_numbered(images, len(options.channels))
        masks = {
            case if case in images else re.sub(r"_0000$", "", case): path
            for case, path in masks.items()
        }
    alone = [case for case in masks if case not in images]
    if alone:
        raise UserError(
            f"{len(alone)} mask(s) belong to no image: {listed([masks[c] for c in alone])}. What * "
            f"stands for must be equal: here {alone[0]!r}, in the images {next(iter(images))!r}."
        )
    cases = [Case(_clean(c), tuple(paths), masks.get(c), c) for c, paths in sorted(images.items())]
    return [replace(c, group=_group(c.group, options.group)) for c in cases]


def _match(
    source: Path, pattern: str, option: str, leave: set[Path] | None = None
) -> dict[str, Path]:
    """Case -> file, or folder if no file matches; what the stars stand for, joined by `_`.

    Raises:
        UserError: no match, two for one case, or single files of DICOM series.
    """
    if "*" not in pattern:
        raise UserError(f"{option} {pattern!r} has no *. Put * where the name of the case stands.")
    parts = re.split(r"(\*\*/|\*)", pattern.removeprefix("./"))
    known = {"**/": r"(?:.*/)?", "*": r"([^/]+)"}
    regex = re.compile("".join(known.get(p, re.escape(p)) for p in parts))
    files = [p for p in files_below(source) if p not in (leave or ())]
    matching = {p: m for p in files if (m := regex.fullmatch(p.relative_to(source).as_posix()))}
    if not matching:
        folders = sorted({f for p in files for f in p.parents if f.is_relative_to(source)})
        matching = {
            p: m for p in folders if (m := regex.fullmatch(p.relative_to(source).as_posix()))
        }
    if not matching:
        raise UserError(
            f"No file below {source} matches {option} {pattern!r}. There are {_examples(source)}."
        )
    slices = Counter(p.parent for p in matching if p.suffix.lower() in (".dcm", ".ima"))
    if slices and max(slices.values()) > 1:
        folder = max(slices, key=lambda p: slices[p])
        raise UserError(
            f"{option} {pattern!r} matches single DICOM slices in {folder}. Let it match the "
            f"folder: {pattern.rpartition('/')[0] or '*'!r}"
        )
    cases: dict[str, Path] = {}
    for path, match in matching.items():
        name = "_".join(match.groups())
        if name in cases:
            raise UserError(
                f"{option} {pattern!r} matches {cases[name]} and {path} for case {name!r}. Make "
                f"the pattern narrower."
            )
        cases[name] = path
    return cases


def _join_numbered(images: dict[str, list[Path]], channels: int) -> dict[str, list[Path]]:
    """Join `<case>_0000`, `<case>_0001`, ... where all names end so, up to the channel number."""
    parts = {name: re.fullmatch(r"(.+)_(\d{4})", name) for name in images}
    numbers = {int(m[2]) for m in parts.values() if m}
    if not all(parts.values()) or numbers != set(range(channels)):
        return images
    joined: dict[str, list[Path]] = {}
    for name, match in sorted(parts.items()):
        assert match is not None
        joined.setdefault(match[1], []).extend(images[name])
    few = [name for name, paths in joined.items() if len(paths) != channels]
    if few:
        raise UserError(
            f"{listed(few)}: a channel is missing, _0000 to _{channels - 1:04d} needed."
        )
    return joined


def _examples(source: Path) -> str:
    files = files_below(source)
    names = [p.relative_to(source).as_posix() for p in files[:: max(1, len(files) // 3)][:3]]
    return f"{describe_folder(source)}, for example {', '.join(names)}"


def _clean(name: str) -> str:
    """Make a name that nnU-Net, CSV files and shells take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "case"


def _group(name: str, regex: str | None) -> str:
    if regex is None:
        return _clean(name)
    try:
        match = re.search(regex, name)
    except re.error as error:
        raise UserError(f"--group {regex!r} is no regular expression: {error}.") from error
    if not match or not match[0]:
        raise UserError(f"--group {regex!r} matches nothing in {name!r}. Make it match all names.")
    return match[0]


# --------------------------------------------------------------------------------------- table


def _from_table(path: Path, channels: int) -> list[Case]:
    """Read a CSV file; separators are , ; or tab."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read {path} as a table: {error}. Save it as CSV, UTF-8."
        ) from error
    lines = [line for line in lines if line.strip()]
    head = lines[0] if lines else ""
    reader = csv.DictReader(lines, delimiter=max(",;\t", key=head.count))
    columns = [c.strip().lower() for c in reader.fieldnames or []]
    reader.fieldnames = columns
    wanted = [f"image_{i}" for i in range(channels)]
    if channels == 1 or "image" in columns:
        wanted = ["image"]
    absent = [c for c in wanted if c not in columns]
    if absent:
        raise UserError(
            f"{path} has no column {listed(absent)}, only {listed(columns) or 'nothing'}. Name the "
            f"columns image (or image_0, image_1, ... for {channels} channels), mask, group, case."
        )
    rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
    if not rows:
        raise UserError(f"{path} has no rows. Write one a scan.")
    places = [_places(path, number, row, wanted) for number, row in enumerate(rows, start=2)]
    names = [
        row.get("case") or _stem(images[0]) for row, (images, _) in zip(rows, places, strict=True)
    ]
    if len(set(names)) < len(names) and "case" not in columns:  # p1/t1.nii.gz, p2/t1.nii.gz
        names = [_stem(row[wanted[0]], whole=True) for row in rows]
    numeric = _numeric_columns(rows, {*wanted, "mask", "group", "case"})
    return [
        Case(
            _clean(name),
            images,
            mask,
            row.get("group") or _clean(name),
            {c: float(row[c]) for c in numeric},
        )
        for name, row, (images, mask) in zip(names, rows, places, strict=True)
    ]


def _places(
    path: Path, line: int, row: Mapping[str, str], wanted: Sequence[str]
) -> tuple[tuple[Path, ...], Path | None]:
    def place(column: str) -> Path:
        text = row[column].replace("\\", "/")
        if not text:
            raise UserError(f"{path}, line {line}: {column} is empty. Name the file.")
        file = path.parent / text
        if not file.exists():
            raise UserError(
                f"{path}, line {line}: {column} {file} does not exist. Paths are relative to the "
                f"table."
            )
        return file

    images = tuple(place(c) for c in wanted)
    return images, place("mask") if row.get("mask") else None


def _stem(path: Path | str, whole: bool = False) -> str:
    path = Path(path)
    name = re.sub(r"(\.nii)?(\.gz)?$", "", path.name, flags=re.I)
    name = name if name != path.name else path.stem
    name = re.sub(r"_0000$", "", name)
    return "_".join([*(p for p in path.parent.parts if p != ".."), name]) if whole else name


def _numeric_columns(rows: Sequence[Mapping[str, str]], known: set[str]) -> list[str]:
    def numeric(text: str) -> bool:
        try:
            return math.isfinite(float(text))
        except ValueError:
            return False

    columns = [c for c in rows[0] if c not in known]
    return [c for c in columns if all(numeric(row.get(c, "")) for row in rows)]


# -------------------------------------------------------------------------------------- labels


def _dataset_json(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "dataset.json"


def _read_dataset_json(source: Path) -> dict[str, Any]:
    path = _dataset_json(source)
    try:
        about = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct or remove it.") from error
    if not isinstance(about, dict):
        raise UserError(f"{path} holds no object {{...}}. Correct or remove it.")
    return about


def _channel_names(about: Mapping[str, Any], path: Path) -> list[str]:
    key = "channel_names" if about.get("channel_names") else "modality"
    names = about.get(key) or {}
    if not isinstance(names, dict) or not all(str(k).isdigit() for k in names):
        raise UserError(
            f'{path}: {key} is not of the form {{"0": "NAME", ...}}, but {json.dumps(names)}. '
            f"Correct it, or name the channels with --channels."
        )
    return [names[k] for k in sorted(names, key=int)]


def _check_values(labels: Any, path: Path) -> dict[str, int | list[int]]:
    """Return the labels of dataset.json, which are to be NAME: value (or values of a region)."""
    fix = "Correct it, or name the classes with --labels, which gives them new values."
    if not isinstance(labels, dict):
        raise UserError(f'{path}: labels is not of the form {{"NAME": value, ...}}. {fix}')
    for name, value in labels.items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is not int or not 0 <= number <= 255:
                raise UserError(
                    f"{path}: label {name!r} has the value {json.dumps(number)}, which is not a "
                    f"whole number from 0 to 255. {fix}"
                )
    return labels


def _labels(
    options: argparse.Namespace, about: Mapping[str, Any], cases: Sequence[Case], path: Path
) -> tuple[dict[str, int | list[int]], dict[int, int] | None]:
    """Names -> values here, and values in the masks -> values here (None: unchanged).

    `about` is what dataset.json, `path`, holds.
    """
    if options.labels:
        return _parse_labels(options.labels)
    found = about.get("labels", {})
    if found and all(str(k).isdigit() for k in found):  # as in MSD
        found = {name: int(value) for value, name in found.items()}
    if found:
        return dict(_check_values(found, path)), None
    masks = [c.mask for c in cases if c.mask is not None]
    if not masks:
        raise UserError(
            "No scan has a mask; some need one. Say which files are the masks: --masks PATTERN or, "
            "in a table, the column mask."
        )
    values: set[float] = set()
    for mask in masks[:3]:
        image = _one_component(mask)
        values.update(np.unique(sitk.GetArrayViewFromImage(image)).tolist())
    told = listed([f"{v:g}" for v in sorted(values)])
    example = " ".join(f"name{i}={v:g}" for i, v in enumerate(sorted(values - {0}), start=1))
    raise UserError(
        f"--labels is missing: name the values of the masks. The first masks hold {told}. E.g. "
        f"--labels {example or 'organ=1'}"
    )


def _parse_labels(texts: Sequence[str]) -> tuple[dict[str, int | list[int]], dict[int, int]]:
    labels: dict[str, int | list[int]] = {"background": 0}
    label_map: dict[int, int] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(\d+(?:,\d+)*)", text)
        if not match:
            raise UserError(f"--labels {text}: write NAME=VALUE or NAME=VALUE,VALUE.")
        name, values = match[1], [int(v) for v in match[2].split(",")]
        if name in labels and name != "background":
            raise UserError(f"--labels: {name} stands there twice. Use NAME=VALUE,VALUE.")
        new = labels.setdefault(name, len(labels))
        for value in values:
            if value in label_map:
                raise UserError(f"--labels: value {value} has two names. Give it one.")
            label_map[value] = int(new)  # type: ignore[arg-type]
    label_map.setdefault(0, 0)
    if len(labels) == 1:
        raise UserError("--labels names only the background. Name at least one class.")
    return labels, label_map


# ---------------------------------------------------------------------------------------- read


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read all channels and the mask; bring the mask's axes into the order of the image's."""
    count = len(options.channels)
    images: list[sitk.Image] = []
    for path in case.images:
        wanted = count if len(case.images) == 1 else 1
        images += [_set_spacing(i, path, options) for i in _channels(path, wanted)]
    if case.mask is None:
        return Scan(images)
    mask = _set_spacing(_one_component(case.mask), case.mask, options)
    same_size = mask.GetSize() == images[0].GetSize()
    told: dict[str, Any] = {}
    if same_size and (options.copy_geometry or _without_spacing(case.mask)):
        mask.CopyInformation(images[0])
    elif (
        mask.GetDimension() == images[0].GetDimension() == 3
        and mask.GetDirection() != images[0].GetDirection()
    ):
        axes = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines
        ours, theirs = (axes(i.GetDirection()) for i in (images[0], mask))
        if ours != theirs:  # the same grid, stored from another corner
            mask = sitk.DICOMOrient(mask, ours)
            told["mask_axes"] = f"{theirs} to {ours}"
    return Scan(images, mask, told)


def _channels(path: Path, wanted: int) -> list[sitk.Image]:
    """Split into `wanted` channels; grey images stored as colour count as one.

    Raises:
        UserError: colour where one channel is expected.
    """
    image = _single_slice(read_image(path))
    parts = split_channels(image)
    colour = image.GetNumberOfComponentsPerPixel() in (3, 4)
    if colour and wanted != len(parts):
        parts = parts[:3]  # no opacity
    if colour and wanted == 1:
        planes = [sitk.GetArrayViewFromImage(p) for p in parts]
        if not all(np.array_equal(planes[0], p) for p in planes[1:]):
            raise UserError(
                f"{path} is a colour image, but one channel is expected. Give three names: "
                f"--channels red green blue"
            )
        parts = parts[:1]
    return parts


def _one_component(path: Path) -> sitk.Image:
    image = _single_slice(read_image(path))
    parts = split_channels(image) if image.GetNumberOfComponentsPerPixel() > 1 else [image]
    planes = [sitk.GetArrayViewFromImage(p) for p in parts[:3]]
    if not all(np.array_equal(planes[0], p) for p in planes[1:]):
        raise UserError(f"{path}: the mask is in colour. Save it with one number per class.")
    return parts[0]


def _single_slice(image: sitk.Image) -> sitk.Image:
    """Make a volume of one slice 2D, as nnU-Net's planner expects it."""
    single = image.GetDimension() == 3 and image.GetSize()[2] == 1
    return image[:, :, 0] if single else image


def _without_spacing(path: Path) -> bool:
    return path.suffix.lower() in WITHOUT_SPACING


def _set_spacing(image: sitk.Image, path: Path, options: argparse.Namespace) -> sitk.Image:
    """Set --spacing, else 1, where the format has none (TIFF tags are no millimetres)."""
    if _without_spacing(path):
        spacing = options.spacing or [1.0] * image.GetDimension()
        if len(spacing) != image.GetDimension():
            raise UserError(
                f"--spacing has {len(spacing)} numbers, but {path} is {image.GetDimension()}D."
            )
        image.SetSpacing(spacing)
    return image


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
