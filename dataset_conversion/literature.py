"""What semi-supervised papers do to scans: h5 files, and crops around the mask."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.reading import image_from_array
from nnunet_ssl.errors import UserError


def read_spacing(options: argparse.Namespace) -> list[float] | None:
    """Return --spacing as x, y, z in mm; None if it was not given.

    Raises:
        UserError: not three numbers.
    """
    if options.spacing and len(options.spacing) != 3:
        raise UserError(
            f"--spacing has {len(options.spacing)} number(s). Give three, in mm: x y z, for "
            f"example --spacing 0.625 0.625 0.625."
        )
    return options.spacing


def read_h5(
    path: Path, axes: str, spacing: list[float] | None = None
) -> tuple[sitk.Image, sitk.Image]:
    """Read `image` and `label` of an h5 file.

    Args:
        path: the file.
        axes: their order in the file, `xyz` or `zyx`.
        spacing: x, y, z in mm; the files have none; None means 1.

    Returns:
        Image and mask, number types as stored.

    Raises:
        UserError: damaged, keys missing, or not 3D.
    """
    try:
        with h5py.File(path) as file:
            absent = [k for k in ("image", "label") if k not in file]
            if absent:
                raise UserError(
                    f"{path} has no {' and no '.join(absent)}, only "
                    f"{', '.join(file) or 'nothing'}. Take the file of the release."
                )
            arrays = [file[k][()] for k in ("image", "label")]
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error}. It is damaged or cut short; copy it again."
        ) from error
    for array in arrays:
        if np.ndim(array) != 3:
            raise UserError(f"{path} is {np.ndim(array)}D, not a volume. Take the file of a scan.")
    if not np.isfinite(arrays[0]).all():
        raise UserError(f"{path} holds NaN or infinite values. Take the file of the release.")
    if axes == "xyz":
        arrays = [a.transpose(2, 1, 0) for a in arrays]
    image, mask = (image_from_array(np.ascontiguousarray(a), spacing or [1, 1, 1]) for a in arrays)
    return image, mask


def box_around_mask(mask: sitk.Image, least: int, margins: Sequence[int]) -> list[int]:
    """Find the part in x and y that the makers of the h5 files keep; z is whole.

    Args:
        mask: 3D; all values above 0 count.
        least: a box smaller than that grows to it, in voxels, before the margins.
        margins: voxels added at low x, high x, low y and high y, up to the border of the scan.

    Returns:
        First and last + 1 voxel of x, then of y.

    Raises:
        UserError: empty mask.

    Source: UA-MT, la_heart_processing.py. Its upper end is the last voxel of the mask plus the
    margin, itself excluded; kept so.
    """
    inside = sitk.GetArrayViewFromImage(mask).astype(bool).any(axis=0)
    box = []
    for axis, (low, high) in enumerate((margins[:2], margins[2:])):  # x, y
        where = np.flatnonzero(inside.any(axis=axis))
        if not len(where):
            raise UserError("The mask is empty, so there is nothing to cut around. Check the file.")
        first, last = int(where[0]), int(where[-1])
        pad = max(least - (last - first), 0) // 2
        box += [max(first - low - pad, 0), min(last + high + pad, mask.GetSize()[axis])]
    return box
