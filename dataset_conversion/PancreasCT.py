"""PancreasCT: pancreas in portal-venous CT, NIH Clinical Center (TCIA); 62 + 20 scans.

Reads one of three releases, told apart by the files; put images and labels below one folder:

  Pancreas-CT/PANCREAS_0001/<study>/<series>/*.dcm     TCIA's, whole scans in HU, and
  TCIA_pancreas_labels-02-05-2017/label0001.nii.gz     their masks
  Pancreas_h5/image0001_norm.h5                        MC-Net's
  0001.h5                                              CoraNet's, which BCP uses

TCIA's masks are stored mirrored against the DICOM files: the y axis, depending on the reader also
z. Each mask is tried in all four ways. Those that lie in soft tissue (mean 0 to 200 HU, at most
10 % of the voxels below -100 HU) qualify, and that with the largest step in HU at its border is
taken: the pancreas lies in fat. conversion.json tells the choice and its numbers under `notes`; a
scan where no way qualifies is refused.

With --protocol cropped-literature TCIA's scans are made as MC-Net's files were: resampled to 1 mm,
clipped to -125 to 275 HU, cut in x and y 25 voxels around the mask, at least 96; z-scoring is
nnU-Net's. The h5 files are cut around the mask already and always cropped-literature. MC-Net's have
1 mm. CoraNet's are cut in z, too, and were resampled as if slices lay as close as pixels, so that
their true spacing is unknown: 1 is written unless --spacing is given.

Splits: MC-Net's lists, 62 training scans in their order (--labeled 6 or 12; the others without
masks) and 20 test scans. --split coranet gives CoraNet's, by number: 62 up to 0063, 18 test scans
from 0064. Scans 0025 and 0070 were withdrawn from TCIA: they are reported and skipped, so that 61
and 19 remain; 0070 is the 11th of MC-Net's 12 labeled ones. Scans are called image0001, ...

Examples:
  nnunet_ssl convert PancreasCT -i download -d 47 --labeled 12
  nnunet_ssl convert PancreasCT -i download -d 48 --labeled 12 --protocol cropped-literature
  nnunet_ssl convert PancreasCT -i Pancreas_h5 -d 49 --labeled 6

Source: Roth et al. 2016, doi:10.7937/K9/TCIA.2016.tNB1kqBU (CC BY 3.0); Wu et al. 2021 (MC-Net),
arXiv:2103.02911; Shi et al. 2021 (CoraNet), arXiv:2110.08762
"""

import argparse
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

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
from nnunet_ssl.errors import UserError

LISTS = {"mc-net": "MC-Net, 62/20", "coranet": "CoraNet, by number, 62/18"}
WITHDRAWN = ("image0025", "image0070")
FLIPS = {"none": (), "y": (1,), "z": (0,), "y and z": (0, 1)}  # axes of an array z, y, x
SOFT_TISSUE = (0, 200)  # HU, mean within the mask
FAT = -100  # HU
MOST_FAT = 0.1  # of the mask's voxels below it; borders lie in fat
SHELL = 3  # voxels around the mask
WINDOW = (-125, 275)  # HU
LEAST, MARGIN = 96, 25  # voxels, box around the mask and what is added to it


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, spacing and protocol."""
    add_split_options(parser)
    parser.add_argument(
        "--split",
        choices=list(LISTS),
        default="mc-net",
        help="whose published lists (%(default)s)",
    )
    add_spacing_option(parser, "x y z in mm, for CoraNet's h5 files; default: 1")
    add_protocol_option(parser)


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the scans of one release, by number."""
    spacing = read_spacing(options)
    mc_net = _numbered(files_below(source, "_norm.h5"), r"image(\d{4})_norm\.h5")
    coranet = _numbered(files_below(source, ".h5"), r"(\d{4})\.h5")
    series = _series(source)
    found = {
        "TCIA's DICOM series": series,
        "MC-Net's h5 files": mc_net,
        "CoraNet's h5 files": coranet,
    }
    kinds = [kind for kind, scans in found.items() if scans]
    if not kinds:
        raise UserError(
            f"{source} holds no DICOM files below PANCREAS_XXXX, no imageXXXX_norm.h5 and no "
            f"XXXX.h5, but {describe_folder(source)}. Give the folder with the scans."
        )
    if len(kinds) > 1:
        raise UserError(f"{source} holds {' and '.join(kinds)}. Give the folder of one release.")
    if not series and options.protocol == "raw":
        raise UserError(
            f"{source} holds {kinds[0]}, which are cropped already. Drop --protocol raw, or give "
            f"TCIA's release."
        )
    if spacing and not coranet:
        raise UserError(f"--spacing: that of {kinds[0]} is known. Drop --spacing.")
    cropped = not series or options.protocol == CROPPED
    cases = (
        _with_masks(series, source)
        if series
        else [Case(n, (p,), p) for n, p in (mc_net or coranet).items()]
    )
    return Release(
        name="PancreasCT",
        cases=cases,
        # any other name than CT makes nnU-Net z-score each scan, as the papers do
        channels=["windowed CT" if cropped else "CT"],
        labels={"background": 0, "pancreas": 1},
        splits=_published(options.split),
        list_name=LISTS[options.split],
        withdrawn=WITHDRAWN,
        protocol=CROPPED if cropped else "raw",
        spacing_known=not coranet or spacing is not None,
        about={
            "reference": "Roth et al. 2016, doi:10.7937/K9/TCIA.2016.tNB1kqBU",
            "licence": "CC BY 3.0",
        },
        notes=[f"{c.name} is here, but was withdrawn." for c in cases if c.name in WITHDRAWN],
    )


def _published(split: str) -> dict[str, list[str]]:
    if split == "mc-net":
        return {k: published_list(f"PancreasCT_{k}.txt") for k in ("train", "test")}
    names = [n for i in range(1, 83) if (n := f"image{i:04d}") not in WITHDRAWN]
    return {"train": names[:62], "test": names[62:]}


def _numbered(paths: list[Path], pattern: str) -> dict[str, Path]:
    """Return name -> file, for file names that match."""
    found: dict[str, Path] = {}
    for path in paths:
        if match := re.fullmatch(pattern, path.name, re.IGNORECASE):
            name = f"image{match[1]}"
            if name in found:
                raise UserError(f"{found[name]} and {path} are both {name}. Remove one copy.")
            found[name] = path
    return found


def _series(source: Path) -> dict[str, Path]:
    """Return name -> folder with DICOM files; the number is that of PANCREAS_XXXX above it."""
    found: dict[str, Path] = {}
    for folder in sorted({p.parent for p in files_below(source, ".dcm")}):
        match = re.search(r"PANCREAS_(\d{4})", folder.as_posix(), re.IGNORECASE)
        if match is None:
            raise UserError(
                f"{folder} holds DICOM files, but no folder above is called PANCREAS_XXXX. Keep "
                f"TCIA's folders, or remove it."
            )
        name = f"image{match[1]}"
        if name in found:
            raise UserError(
                f"{found[name]} and {folder} are both series of PANCREAS_{match[1]}. Remove one."
            )
        found[name] = folder
    return found


def _with_masks(series: dict[str, Path], source: Path) -> list[Case]:
    masks = _numbered(files_below(source, ".nii", ".nii.gz"), r"label(\d{4})\.nii(?:\.gz)?")
    without = [name.replace("image", "label") for name in series if name not in masks]
    if without:
        raise UserError(
            f"{source} lacks the masks {listed(without)} (.nii.gz). Unpack TCIA's labels into it, "
            f"beside the images."
        )
    return [Case(name, (folder,), masks[name]) for name, folder in series.items()]


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one scan; find the way its mask lies; cut it if asked."""
    path = case.images[0]
    if path.suffix == ".h5":
        image, mask = read_h5(path, "xyz", read_spacing(options))
        return Scan([image], mask)
    assert case.mask is not None  # `find` sees to it
    image, stored = read_image(path), read_image(case.mask)
    if stored.GetSize() != image.GetSize():
        raise UserError(
            f"{case.mask} has size {stored.GetSize()}, the series {path} {image.GetSize()}. Slices "
            f"are missing or doubled; download the series again."
        )
    array, notes = orient(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(stored))
    mask = sitk.GetImageFromArray(array)
    mask.CopyInformation(image)  # the header of the mask describes another orientation
    if options.protocol != CROPPED:
        return Scan([image], mask, notes)
    mask = _to_1mm(mask)
    x0, x1, y0, y1 = box = box_around_mask(mask, LEAST, [MARGIN] * 4)
    mask = mask[x0:x1, y0:y1, :]
    # straight onto the grid of the cut: the same values in a fraction of the time
    image = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32), mask, sitk.Transform(), sitk.sitkBSpline
    )
    image = sitk.Clamp(image, sitk.sitkFloat32, *WINDOW)
    return Scan([image], mask, {**notes, "box_x_y": box})


def orient(hu: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, dict[str, str | float]]:
    """Mirror a mask in y, z, both or neither, so that it lies on the pancreas.

    Args:
        hu: scan in HU, (z, y, x).
        mask: above 0 is pancreas, (z, y, x).

    Returns:
        The mask as it fits; which flip, mean HU inside, share below -100 HU, and the step: mean HU
        inside less that of the voxels up to 3 away.

    Raises:
        UserError: empty mask, or none of the four fits.
    """
    if not mask.any():
        raise UserError("the mask is empty. Check the file.")
    tried = []
    for name, axes in FLIPS.items():
        flipped = np.flip(mask, axes)
        inside_of = ndimage.find_objects((flipped > 0).astype(np.uint8))[0]
        near = tuple(slice(max(s.start - SHELL, 0), s.stop + SHELL) for s in inside_of)
        inside, around = flipped[near] > 0, hu[near]
        shell = ndimage.binary_dilation(inside, iterations=SHELL) & ~inside
        mean = float(around[inside].mean())
        outside = float(around[shell].mean()) if shell.any() else mean
        fat = float((around[inside] < FAT).mean())
        notes = {
            "mask_mirrored_in": name,
            "mean_hu": round(mean, 1),
            "share_below_-100_hu": round(fat, 4),
            "step_hu": round(mean - outside, 1),
        }
        tried.append((flipped, notes, SOFT_TISSUE[0] <= mean <= SOFT_TISSUE[1] and fat <= MOST_FAT))
    fitting = [(flipped, notes) for flipped, notes, fits in tried if fits]
    if not fitting:
        seen = "; ".join(
            f"{n['mask_mirrored_in']}: mean {n['mean_hu']} HU, {n['share_below_-100_hu']:.0%} "
            f"below {FAT}"
            for _, n, _ in tried
        )
        raise UserError(
            f"the mask lies in soft tissue in no orientation (mirrored in {seen}). Check that scan "
            f"and mask have the same number and are complete."
        )
    flipped, notes = max(fitting, key=lambda pair: pair[1]["step_hu"])
    return np.ascontiguousarray(flipped), notes


def _to_1mm(mask: sitk.Image) -> sitk.Image:
    """Resample a mask to 1 mm; the size is cut to whole voxels, as MC-Net does."""
    size = [int(n * s) for n, s in zip(mask.GetSize(), mask.GetSpacing(), strict=True)]
    return sitk.Resample(
        mask,
        size,
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        mask.GetOrigin(),
        [1.0, 1.0, 1.0],
        mask.GetDirection(),
    )


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
