"""Checks of one case, its labels, and writing it as NIfTI."""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.reading import listed
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error

ENDING = ".nii.gz"
TOLERANCE = 1e-3  # of a voxel for spacing and origin, absolute for the direction
ROUNDING = 1e-3  # how far a float label may lie from its integer


def check_geometry(
    image: sitk.Image, other: sitk.Image, case: str, what: str, hint: str = ""
) -> None:
    """Compare size, spacing, origin and direction.

    Raises:
        UserError: they differ; names `case` and `what` (mask, channel 1, ...). `hint` tells what
            to do if only the header is wrong.
    """
    size, wanted = other.GetSize(), image.GetSize()
    if size != wanted:
        raise UserError(
            f"{case}: the {what} has size {_times(size)}, the image {_times(wanted)}. Resample one "
            f"to the grid of the other, or check that they belong together."
        )
    spacing = np.array(image.GetSpacing())
    direction = np.array(image.GetDirection()), np.array(other.GetDirection())
    far = {
        "spacing": np.abs(spacing - other.GetSpacing()) > TOLERANCE * spacing,
        "origin": np.abs(np.subtract(image.GetOrigin(), other.GetOrigin())) > TOLERANCE * spacing,
        "direction": np.abs(direction[0] - direction[1]) > TOLERANCE,
    }
    for name, differs in far.items():
        if differs.any():
            ours, theirs = (getattr(i, f"Get{name.capitalize()}")() for i in (image, other))
            raise UserError(
                f"{case}: the {what} has {name} {_numbers(theirs)}, the image {_numbers(ours)}. "
                + (hint or "Correct the header, or resample one to the grid of the other.")
            )


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"


def map_labels(
    mask: sitk.Image, label_map: Mapping[int, int], case: str, hint: str = ""
) -> tuple[sitk.Image, dict[int, int]]:
    """Check the values of a mask and map them, slice by slice to keep memory flat.

    Args:
        mask: one component; float values next to an integer count as that integer.
        label_map: value in the mask -> new value, below 256; no other value may occur.
        case: for messages.
        hint: what to do about an unexpected value.

    Returns:
        Mask of uint8 with the same geometry; voxels of each new value.

    Raises:
        UserError: a value that `label_map` lacks, or a mask with several components.
    """
    if mask.GetNumberOfComponentsPerPixel() > 1:
        raise UserError(f"{case}: the mask is a colour image. Save it with one value per voxel.")
    array = sitk.GetArrayViewFromImage(mask)
    result = np.zeros(array.shape, np.uint8)
    counts: Counter[int] = Counter({new: 0 for new in label_map.values()})
    unknown: set[float] = set()
    for values, new_values in zip(array, result, strict=True):
        if array.dtype.kind == "f":
            rounded = np.rint(values)
            values = np.where(np.abs(values - rounded) <= ROUNDING, rounded, values)
        known = np.zeros(values.shape, bool)
        for value, new in label_map.items():
            here = values == value
            new_values[here] = new
            counts[new] += int(here.sum())
            known |= here
        if not known.all():
            unknown.update(np.unique(values[~known]).tolist())
    if unknown:
        raise UserError(
            f"{case}: the mask holds {listed([f'{v:g}' for v in sorted(unknown)])}, expected are "
            f"{listed(sorted(label_map))}. "
            + (hint or "Correct the mask, or check that this is the right file.")
        )
    mapped = sitk.GetImageFromArray(result)
    mapped.CopyInformation(mask)
    return mapped, dict(counts)


def hash_voxels(images: list[sitk.Image]) -> str:
    """Return the sha256 over size and voxels (as float32) of all channels."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(image.GetSize()).encode())
        for slab in sitk.GetArrayViewFromImage(image):
            digest.update(np.ascontiguousarray(slab, np.float32).data)
    return digest.hexdigest()


def write_image(image: sitk.Image, path: Path) -> None:
    """Write `.nii.gz` atomically; 64-bit numbers become 32-bit ones, which every reader knows.

    Raises:
        UserError: the disk is full, or the folder is not writable; nothing is left then.
    """
    kind = image.GetPixelID()
    if kind == sitk.sitkFloat64:
        image = sitk.Cast(image, sitk.sitkFloat32)
    elif kind in (sitk.sitkInt64, sitk.sitkUInt64):
        view = sitk.GetArrayViewFromImage(image)
        fits = view.min() >= -(2**31) and view.max() < 2**31
        image = sitk.Cast(image, sitk.sitkInt32 if fits else sitk.sitkFloat32)
    part = path.with_name(f".part{os.getpid()}_{path.name}")  # ITK picks the format by the ending
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sitk.WriteImage(image, str(part), useCompression=True)
        except RuntimeError as error:
            os.stat(path.parent)  # a clearer error, if that is it
            raise OSError(str(error).strip().splitlines()[-1].strip()) from error
        _check_written(image, part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(explain_os_error(error, path)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_written(image: sitk.Image, path: Path) -> None:
    """Compare the size in the gzip trailer: ITK does not tell when the disk is full."""
    expected = 352 + image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
    with open(path, "r+b") as f:  # Windows flushes only what is open for writing
        f.seek(-4, os.SEEK_END)
        (size,) = struct.unpack("<I", f.read(4))
        os.fsync(f.fileno())
    if size != expected % 2**32:
        raise OSError("the file is incomplete; is the disk full? Free some space and start again")
