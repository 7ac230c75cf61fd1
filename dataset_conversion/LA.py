"""LA: left atrium in late gadolinium-enhanced MRI, challenge of 2018; 80 + 20 scans.

Reads one of two releases, told apart by the files:

  <ID>/lgemri.nrrd, laendo.nrrd   the challenge's, whole scans; 255 is the left atrium. With
                                  --protocol cropped-literature they are cut around the mask as the
                                  h5 files were, with margins drawn anew (seeded by the ID).
  <ID>/mri_norm2.h5               UA-MT's, which nearly all papers use: cut around the mask, so
                                  training and test images tell where the atrium is. Always
                                  cropped-literature. The files have no spacing: 1 is written, and
                                  distances are in voxels as in the papers, unless --spacing is
                                  given (the scans have 0.625 0.625 0.625 mm).

Where both lie side by side, `raw` takes the nrrd and `cropped-literature` the h5 files.

Splits: 80 training scans in the order of the papers (--labeled 4, 8 or 16; the others without
masks) and 20 test scans; no validation set. The challenge's own test scans are in no list. The
scans come from fewer patients than there are scans, and which belong together is not published: a
patient can be on both sides, here as in every paper.

Intensities stay as they are; z-scoring is nnU-Net's.

Examples:
  nnunet_ssl convert LA -i download/2018LA_Seg_Training_Set -d 10 --labeled 8
  nnunet_ssl convert LA -i UA-MT/data -d 11 --labeled 8
  nnunet_ssl convert LA -i UA-MT/data -d 12 --labeled 8 --draw 1

Source: https://www.cardiacatlas.org/atriaseg2018-challenge/ (no licence stated; research use);
Xiong et al. 2021, doi:10.1016/j.media.2020.101832; Yu et al. 2019 (UA-MT), arXiv:1907.07034
"""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.core import (
    CROPPED,
    Case,
    Release,
    Scan,
    add_protocol_option,
    add_spacing_option,
    add_split_options,
    run_script,
)
from nnunet_ssl.dataset_conversion.literature import box_around_mask, read_h5, read_spacing
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    published_list,
    read_image,
)
from nnunet_ssl.dataset_conversion.writing import check_geometry
from nnunet_ssl.errors import UserError

ATRIUM = 255  # in the challenge's masks
LEAST = 112  # voxels, box around the mask before the margins
MARGINS = range(10, 20)  # voxels, one drawn for each side


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, spacing and protocol."""
    add_split_options(parser)
    add_spacing_option(
        parser, "x y z in mm, instead of that of the nrrd files, or for the h5 files; default: 1"
    )
    add_protocol_option(parser)


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the scans of either release, by ID."""
    spacing = read_spacing(options)
    scans = {p.parent.name: p for p in files_below(source, "lgemri.nrrd")}
    packed = {p.parent.name: p for p in files_below(source, "mri_norm2.h5")}
    if not scans and not packed:
        raise UserError(
            f"{source} holds neither lgemri.nrrd nor mri_norm2.h5, but {describe_folder(source)}. "
            f"Give the folder with one folder per scan."
        )
    if packed and not scans and options.protocol == "raw":
        raise UserError(
            f"{source} holds mri_norm2.h5, which is cropped already. Drop --protocol raw, or give "
            f"the challenge's release (lgemri.nrrd)."
        )
    use_h5 = bool(packed) and (not scans or options.protocol == CROPPED)
    splits = {"train": published_list("LA_train.txt"), "test": published_list("LA_test.txt")}
    if use_h5:
        cases = [Case(name, (p,), p) for name, p in packed.items()]
    else:
        masks = {name: p.with_name("laendo.nrrd") for name, p in scans.items()}
        without = [n for names in splits.values() for n in names if n in masks]
        without = [n for n in without if not masks[n].is_file()]
        if without:
            raise UserError(f"laendo.nrrd is missing for {listed(without)}. Unpack it again.")
        cases = [Case(n, (p,), m if (m := masks[n]).is_file() else None) for n, p in scans.items()]
    return Release(
        name="LA",
        cases=cases,
        channels=["LGE-MRI"],
        labels={"background": 0, "left atrium": 1},
        splits=splits,
        list_name="UA-MT, 80/20",
        protocol=CROPPED if use_h5 else options.protocol or "raw",
        spacing_known=not use_h5 or spacing is not None,
        about={
            "reference": "Xiong et al. 2021, doi:10.1016/j.media.2020.101832",
            "licence": "none stated; research use",
        },
    )


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one scan; cut it if asked."""
    spacing = read_spacing(options)
    if case.images[0].suffix == ".h5":
        image, mask = read_h5(case.images[0], "xyz", spacing)
        return Scan([image], mask)
    image = _with_spacing(read_image(case.images[0]), spacing)
    if case.mask is None:
        return Scan([image])
    mask = _with_spacing(read_image(case.mask), spacing)
    values = sitk.GetArrayViewFromImage(mask)
    if values.any() and not (values == ATRIUM).any():
        raise UserError(
            f"{case.mask} holds no {ATRIUM}, but {listed([f'{v:g}' for v in np.unique(values)])}. "
            f"Take the laendo.nrrd of the challenge."
        )
    other = int(np.count_nonzero((values != ATRIUM) & (values != 0)))
    notes: dict[str, Any] = {"voxels_neither_0_nor_255_as_background": other} if other else {}
    mask = mask == ATRIUM
    if options.protocol != CROPPED:
        return Scan([image], mask, notes)
    draw = random.Random(case.name)
    margins = [draw.choice(MARGINS) for _ in range(4)]
    check_geometry(image, mask, case.name, f"mask {case.mask}")  # two cuts would look alike
    x0, x1, y0, y1 = box = box_around_mask(mask, LEAST, margins)
    notes |= {"box_x_y": box, "margins": margins}
    return Scan([image[x0:x1, y0:y1, :]], mask[x0:x1, y0:y1, :], notes)


def _with_spacing(image: sitk.Image, spacing: list[float] | None) -> sitk.Image:
    if spacing:
        image.SetSpacing(spacing)
    return image


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
