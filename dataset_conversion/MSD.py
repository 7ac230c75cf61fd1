"""MSD: any task of the Medical Segmentation Decathlon, 3D and 4D.

Reads TaskXX_Name/ with dataset.json, imagesTr, labelsTr and perhaps imagesTs. The channels of 4D
files (BrainTumour, Prostate) become files of their own. Test masks are not public, and there is no
standard semi-supervised split: hold out part of imagesTr with --test, and report several --draw.

Examples:
  nnunet_ssl convert MSD -i Task04_Hippocampus -d 4 --test 40
  nnunet_ssl convert MSD -i Task09_Spleen -d 9 --test 8 --labeled 3 --draw 1

Source: http://medicaldecathlon.com (CC BY-SA 4.0); Antonelli et al. 2022,
doi:10.1038/s41467-022-30695-9
"""

import argparse
import json
from pathlib import Path

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
    listed,
    read_image,
    split_channels,
)
from nnunet_ssl.errors import UserError

KEPT = ("description", "reference", "licence", "release")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, and what happens to imagesTs."""
    add_split_options(parser)
    add_test_images_option(parser, "the images of imagesTs")


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the cases of a task, by name."""
    source = _task_folder(source)
    about = _read_json(source / "dataset.json")
    images, masks = (_scans(source / part) for part in ("imagesTr", "labelsTr"))
    if not images:
        raise UserError(f"{source / 'imagesTr'} holds no .nii.gz ({describe_folder(source)}).")
    without = [name for name in images if name not in masks]
    if without:
        raise UserError(
            f"{source / 'labelsTr'} lacks the masks of {listed(without)}. Unpack the task again."
        )
    names = [_name(Path(entry["image"])) for entry in about.get("training", [])] or list(images)
    cases = [Case(n, (image,), masks[n]) for n, image in images.items()]
    if options.use_test_images:
        unlabeled = _scans(source / "imagesTs")
        if not unlabeled:
            raise UserError(f"{source / 'imagesTs'} holds no .nii.gz. Drop --use-test-images.")
        cases += [Case(name, (image,)) for name, image in unlabeled.items()]
        names += list(unlabeled)
    return Release(
        name=str(about["name"]).replace(" ", ""),
        cases=cases,
        channels=[about["modality"][k] for k in sorted(about["modality"], key=int)],
        labels={name: int(value) for value, name in about["labels"].items()},
        splits={"train": sorted(names)},
        list_name="dataset.json, by name",
        about={k: about[k] for k in KEPT if k in about},
    )


def _task_folder(source: Path) -> Path:
    """Accept the folder around a single task, as some archives have it."""
    if (source / "dataset.json").is_file():
        return source
    inside = sorted(p.parent for p in source.glob("*/dataset.json"))
    if len(inside) == 1:
        return inside[0]
    found = f"the tasks {listed([p.name for p in inside])}" if inside else describe_folder(source)
    raise UserError(
        f"{source} holds no dataset.json, but {found}. Give the folder of one task with -i, e.g. "
        f"Task04_Hippocampus."
    )


def _read_json(path: Path) -> dict:
    try:
        about = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Unpack the task again.") from error
    if "channel_names" in about:
        raise UserError(
            f"{path} has channel_names: this is a data set of nnU-Net v2 already. Put it below "
            f"nnUNet_raw and use nnunet_ssl split."
        )
    missing = [k for k in ("name", "modality", "labels") if k not in about]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; this is no task of MSD.")
    return about


def _scans(folder: Path) -> dict[str, Path]:
    return {_name(p): p for p in files_below(folder, ".nii", ".nii.gz")}


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Split the channels of 4D files."""
    mask = None if case.mask is None else read_image(case.mask)
    return Scan(split_channels(read_image(case.images[0])), mask)


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
