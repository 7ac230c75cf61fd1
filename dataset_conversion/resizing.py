"""Images and masks at a lower resolution, by the areas that the new pixels cover. 2D only."""

import argparse
import re
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.reading import image_from_array
from nnunet_ssl.errors import UserError


def add_resize_option(parser: argparse.ArgumentParser) -> None:
    """Add --resize; None keeps the resolution."""
    parser.add_argument(
        "--resize",
        type=_size,
        metavar="HxW",
        help="reduce all images and masks to H rows and W columns, for quick experiments; the "
        "spacing grows accordingly, and the name tells it",
    )


def _size(text: str) -> list[int]:
    if not (match := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise argparse.ArgumentTypeError(f"{text} is no size; give rows x columns, as 108x160")
    return [int(match[1]), int(match[2])]


def reduce_image(image: sitk.Image, size: Sequence[int]) -> sitk.Image:
    """Give each new pixel the mean grey value of the area that it covers.

    Args:
        image: 2D, one component.
        size: new rows and columns, at most the old ones.

    Returns:
        Same number type (integers rounded) and same extent: the spacing is larger, and the origin
        is the centre of the new first pixel.

    Raises:
        UserError: not 2D, or smaller than asked for.
    """
    array = sitk.GetArrayViewFromImage(image)
    rows, columns = _shares(image, size)
    mean = rows @ array.astype(np.float64) @ columns.T
    if array.dtype.kind in "iu":
        mean = np.rint(mean)
    return _on_new_grid(mean.astype(array.dtype), image)


def reduce_mask(mask: sitk.Image, size: Sequence[int]) -> sitk.Image:
    """Give each new pixel the label that covers most of its area; of equal ones the lowest.

    So an outline moves by half a new pixel at most, and areas are kept on average.

    Args:
        mask: 2D, uint8.
        size: new rows and columns, at most the old ones.

    Returns:
        Mask on the grid of `reduce_image`.

    Raises:
        UserError: not 2D, smaller than asked for, or a label above 0 of which nothing is left.
    """
    array = sitk.GetArrayViewFromImage(mask)
    rows, columns = _shares(mask, size)
    labels = np.unique(array)
    areas = [(rows @ (array == label) @ columns.T).round(9) for label in labels]
    reduced = labels[np.argmax(areas, axis=0)]
    if lost := sorted(set(labels.tolist()) - {0} - set(np.unique(reduced).tolist())):
        raise UserError(
            f"Nothing is left of label {lost[0]} at {size[0]}x{size[1]}. Give a larger --resize."
        )
    return _on_new_grid(reduced, mask)


def _shares(image: sitk.Image, size: Sequence[int]) -> list[np.ndarray]:
    """For rows and columns, the share that each old pixel has in each new one, (new, old)."""
    if image.GetDimension() != 2:
        raise UserError(f"The image is {image.GetDimension()}D; --resize is for 2D. Leave it out.")
    old_size = image.GetSize()[::-1]
    if any(new > old for new, old in zip(size, old_size, strict=True)):
        raise UserError(
            f"--resize {size[0]}x{size[1]} is larger than the image, {old_size[0]}x{old_size[1]} "
            f"(rows x columns). Give less."
        )
    shares = []
    for new, old in zip(size, old_size, strict=True):
        edges, first = np.arange(new + 1) * (old / new), np.arange(old)
        overlap = np.minimum(edges[1:, None], first + 1) - np.maximum(edges[:-1, None], first)
        shares.append(overlap.clip(0) * (new / old))
    return shares


def _on_new_grid(array: np.ndarray, image: sitk.Image) -> sitk.Image:
    """Make an image of the same extent as another one."""
    old = np.array(image.GetSpacing())
    new = old * image.GetSize() / np.array(array.shape[::-1])
    reduced = image_from_array(array, new)
    direction = np.array(image.GetDirection()).reshape(2, 2)
    reduced.SetOrigin((image.GetOrigin() + direction @ (new - old) / 2).tolist())
    reduced.SetDirection(image.GetDirection())
    return reduced
