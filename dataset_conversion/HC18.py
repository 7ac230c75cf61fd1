"""HC18: fetal head in 2D ultrasound, challenge of 2018; 999 images.

Reads XXX_HC.png, XXX_HC_Annotation.png and training_set_pixel_size_and_HC.csv at any depth. Images
with annotation in a folder `test...` beside others are the test set, unless --test replaces it;
alone they are converted like any. Those without are the challenge's test images. The
annotation is an ellipse drawn as a line. The mask is the line (about 2.5 pixels) and what it
encloses; where the head reaches the border of the image, the line is open and the border closes
it. Copies in which the ellipse is filled, or stored in colour, are recognised. PNG has no spacing:
the pixel size of the csv (0.05-0.33 mm, other in each image) goes into the NIfTI file, and nnU-Net
brings all images to the median one. The line makes the head 0.6 % longer around (median of 200;
1.4 % at most) than the csv says; without its outer half 0.2 %.

Splits: none is published. The numbers grow with the size of the head (correlation 0.9), so the
first N by name would be early pregnancies alone: the order here is by hash of the examination,
random and the same for everyone; --list gives another. Images of one examination (same three
digits; 806) stay together. The release does not tell which examinations are of one woman: the 1334
images of training and test set are of 551. --labeled counts images of whole examinations, as many
as fit: 100 (10 %) or 200 (20 %) of the 999. Papers test on part of the training images, too (--test
counts examinations), since masks of the challenge's 335 test images are not public.

--resize 108x160 (a fifth of most images, 540x800) makes a small data set for quick experiments; the
contour is filled before. Scores on it are not those on whole images.

cases.csv, for training cases: pixel_size, in mm. The csv's circumferences are left out, as they are
measured on the annotations, also on those that are hidden here.

Examples:
  nnunet_ssl convert HC18 -i HC18 -d 30 --test 160 --labeled 80
  nnunet_ssl convert HC18 -i HC18 -d 31 --test 160 --labeled 80 --draw 1
  nnunet_ssl convert HC18 -i HC18 -d 32 --labeled 100 --use-test-images
  nnunet_ssl convert HC18 -i HC18 -d 33 --resize 108x160
  nnunet_ssl convert HC18 -i HC18 -d 34 --list train.list --test test.list

Source: https://zenodo.org/records/1327317 (CC BY 4.0 as copies state it); van den Heuvel et al.
2018, doi:10.1371/journal.pone.0200412
"""

import argparse
import csv
import math
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import label as components

from nnunet_ssl.dataset_conversion.core import (
    Case,
    Release,
    Scan,
    add_split_options,
    add_test_images_option,
    run_script,
)
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    image_from_array,
    listed,
    one_plane,
    read_image,
    split_channels,
)
from nnunet_ssl.dataset_conversion.resizing import add_resize_option
from nnunet_ssl.dataset_conversion.selection import by_hash
from nnunet_ssl.errors import UserError

IMAGE = re.compile(r"((\d{3})_\d?HC)(_Annotation)?\.png", re.IGNORECASE)
# columns, followed by (mm), with blanks; the table of the test images lacks the second
PIXEL_SIZE, CIRCUMFERENCE = "pixel size", "head circumference"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, resolution, and what happens to the challenge's test images."""
    add_split_options(parser)
    add_resize_option(parser)
    add_test_images_option(parser, "the images of test_set")


def find(source: Path, options: argparse.Namespace) -> Release:
    """List images, by hash of the examination."""
    images, masks = _find_images(source, False), _find_images(source, True)
    # in folders `test...`: those with annotation, and the challenge's test images
    held_out = {name: path for name, path in images[True].items() if name in masks[True]}
    unknown = {name: path for name, path in images[True].items() if name not in masks[True]}
    annotated = _merge(images[False], held_out)
    annotations = _merge(masks[False], masks[True])
    if not annotations or not annotated:
        raise UserError(
            f"{source} holds no XXX_HC.png with XXX_HC_Annotation.png, but "
            f"{describe_folder(source)}. Give the folder with training_set and its csv file."
        )
    alone = sorted(set(annotated) ^ set(annotations))
    if alone:
        raise UserError(
            f"Image or annotation is missing for {listed(alone)}. Unpack training_set again."
        )
    notes: list[str] = []
    folders = {path.parent for path in held_out.values()}
    odd = [name for name, path in unknown.items() if path.parent in folders]
    if odd:
        notes.append(
            f"{len(odd)} image(s) beside annotated ones have no annotation: {listed(odd)}. They "
            f"count as test images of the challenge."
        )
    numbers = _read_tables(source)
    if not unknown:  # then a table without circumferences is not the challenge's
        told = {(False, name): numbers[True, name] for name in held_out if (True, name) in numbers}
        numbers = told | numbers
    examinations: dict[str, list[str]] = {}
    for name in annotated:
        examinations.setdefault(name[:3], []).append(name)
    cases = [
        Case(name, (annotated[name],), annotations[name], group, row, row["pixel_size"])
        for group in by_hash(examinations)
        for name in examinations[group]
        for row in [_row(numbers, name, annotated[name], test=False)]
    ]
    splits: dict[str, list[str]] | None = None
    if held_out and images[False]:
        sides = {"train": images[False], "test": held_out}
        splits = {part: [c.name for c in cases if c.name in side] for part, side in sides.items()}
    if options.use_test_images:
        if not unknown:
            raise UserError(
                f"{source} has no folder test_set with images that lack annotations. Drop "
                f"--use-test-images."
            )
        for name, path in unknown.items():  # numbered anew: 000_HC is another examination
            row = _row(numbers, name, path, test=True)
            new = f"test_{name}"
            cases.append(Case(new, (path,), None, new[:8], row, row["pixel_size"]))
            if splits:
                splits["train"].append(new)
    return Release(
        name="HC18",
        cases=cases,
        channels=["US"],
        labels={"background": 0, "fetal head": 1},
        splits=splits,
        list_name="by hash of the examination (none is published)"
        + ("; test: by folder" if splits else ""),
        counts="images",
        notes=notes,
        about={
            "reference": "van den Heuvel et al. 2018, doi:10.1371/journal.pone.0200412",
            "licence": "CC BY 4.0 as copies of the data state it",
        },
    )


def _find_images(source: Path, annotation: bool) -> dict[bool, dict[str, Path]]:
    """List images, or annotations, by name: those in folders `test...` (True) and the others."""
    found: dict[bool, dict[str, Path]] = {False: {}, True: {}}
    for path in files_below(source, ".png"):
        match = IMAGE.fullmatch(path.name)
        if not match or bool(match[3]) != annotation:
            continue
        folders = path.relative_to(source).parts[:-1] or (source.resolve().name,)
        test = any(f.lower().startswith("test") for f in folders)
        found[test] = _merge(found[test], {match[1].upper(): path})
    return found


def _merge(paths: dict[str, Path], more: dict[str, Path]) -> dict[str, Path]:
    """Join two lists of files; a case in both is refused."""
    for name in sorted(paths.keys() & more.keys()):
        raise UserError(f"{paths[name]} and {more[name]} are the same case. Remove one copy.")
    return paths | more


def _read_tables(source: Path) -> dict[tuple[bool, str], dict[str, float]]:
    """Read the csv files: (test image or not, name of the case) -> pixel size in mm."""
    numbers: dict[tuple[bool, str], dict[str, float]] = {}
    for path in files_below(source, ".csv"):
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read {path}: {error}. Unpack it again.") from error
        columns = {re.sub(r"[\s_]+", " ", c.strip().lower()): c for c in (rows[0] if rows else {})}
        size, length = (
            next((c for clean, c in columns.items() if clean.startswith(start)), None)
            for start in (PIXEL_SIZE, CIRCUMFERENCE)
        )
        if "filename" not in columns or size is None:
            continue  # another table
        for row in rows:
            name = row[columns["filename"]].strip()
            try:
                value = float(row[size])
            except (TypeError, ValueError):
                value = math.nan
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"{path}: {name} has no pixel size above 0. Unpack the csv file again."
                )
            numbers[length is None, Path(name).stem.upper()] = {"pixel_size": value}
    return numbers


def _row(
    numbers: dict[tuple[bool, str], dict[str, float]], name: str, path: Path, test: bool
) -> dict[str, float]:
    if (test, name) not in numbers:
        file = "test_set_pixel_size.csv" if test else "training_set_pixel_size_and_HC.csv"
        raise UserError(
            f"No csv file tells the pixel size of {path}. Put {file} of the release into the "
            f"folder that is given with -i."
        )
    return numbers[test, name]


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one image; fill its contour."""
    spacing = [case.extra] * 2
    image, grey = one_plane(read_image(case.images[0]))
    image.SetSpacing(spacing)
    notes = {} if grey else {"image": "colour, mean taken"}
    if case.mask is None:
        return Scan([image], notes=notes)
    planes = [sitk.GetArrayFromImage(p) for p in split_channels(read_image(case.mask))[:3]]
    bright = np.max(planes, axis=0)  # opacity is left out; the line may have any colour
    filled, kind = fill_contour(bright > bright.max() / 2, case.mask)
    mask = image_from_array(filled.astype(np.uint8), spacing)
    return Scan([image], mask, notes | {"contour": kind} if kind != "closed" else notes)


def fill_contour(line: np.ndarray, path: Path) -> tuple[np.ndarray, str]:
    """Fill an ellipse, which the border of the image may cut.

    Args:
        line: bool, (y, x), the drawn line, or the filled ellipse.
        path: for messages.

    Returns:
        Mask with the line; `closed`, `closed along the image border`, or `filled already`.

    Raises:
        UserError: nothing is drawn, or the line has a gap.
    """
    if not line.any():
        raise UserError(f"{path} is empty. Unpack training_set again.")
    where = np.argwhere(line)
    centre = tuple(np.rint(where.mean(axis=0)).astype(int))  # inside, for any part of an ellipse
    if line[centre]:
        return line, "filled already"
    regions, _ = components(~line)
    inside = regions == regions[centre]
    low, high = where.min(axis=0), where.max(axis=0) + 1
    if inside.sum() > inside[low[0] : high[0], low[1] : high[1]].sum():
        raise UserError(f"{path}: the contour has a gap, it encloses nothing. Close the line.")
    cut = any(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    return line | inside, "closed along the image border" if cut else "closed"


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
