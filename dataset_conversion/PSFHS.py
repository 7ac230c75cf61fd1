"""PSFHS: pubic symphysis and fetal head in 2D ultrasound; 1358 images.

Reads image_mha/XXXXX.mha and label_mha/XXXXX.mha, at any depth; also the training set of the
challenge FH-PS-AOP 2023, which has the same form (4000 images, numbers up to 03743). The images
are stored as volumes of three equal slices, the colours, of which one is taken. Their spacing (1)
is made up: distances are in voxels.

Splits: none is published for the 1358, and nothing tells which frames are of one patient or of one
video. Near-identical frames stay together: two images are of one group if their correlation, at
64 x 64 pixels, is above 0.9, or if a chain of such images joins them. Why 0.9: seen on 700 images,
99 % of the pairs above it are at most 25 numbers apart, which says one video, and their masks are
nearly equal (Dice 0.90 of the symphysis, 0.95 of the head, or more); of the pairs at 0.85-0.9 it
is 78 %. Frames of one video that differ more can still be on both sides. The order is by hash of
the group, random and the same for the same images; --list gives another. --labeled counts images
of whole groups, as many as fit: 136 (10 %) or 272 (20 %) of the 1358. --test N counts groups.

Test cases that --test FILE names stay what they are, since others measure likeness otherwise
(above 0.95, for example): groups that are then on both sides are reported, not refused, and only
equal images leave the training set.

--resize 128x128 (half of 256x256) makes a small data set for quick experiments.

Examples:
  nnunet_ssl convert PSFHS -i PSFHS -d 40 --test 120 --labeled 100
  nnunet_ssl convert PSFHS -i PSFHS -d 41 --test 120 --labeled 100 --draw 1
  nnunet_ssl convert PSFHS -i PSFHS -d 42 --list train.list --test test.list --labeled 70

Source: https://zenodo.org/records/10969427 (CC BY 4.0 as copies state it); Chen et al. 2024,
doi:10.1038/s41597-024-03266-4
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from nnunet_ssl.dataset_conversion.core import Case, Release, Scan, add_split_options, run_script
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    one_plane,
    read_image,
)
from nnunet_ssl.dataset_conversion.resizing import add_resize_option
from nnunet_ssl.dataset_conversion.selection import by_group, by_hash
from nnunet_ssl.errors import UserError

ALIKE = 0.9  # correlation
SIDE = 64  # pixels of the reduced images


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits and resolution."""
    add_split_options(parser)
    add_resize_option(parser)


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the pairs by hash of their group, for which all images are looked at."""
    images = [p for p in files_below(source, ".mha") if p.parent.name.lower() == "image_mha"]
    if not images:
        raise UserError(
            f"{source} holds no image_mha/XXXXX.mha, but {describe_folder(source)}. Give the "
            f"folder with image_mha and label_mha."
        )
    masks = {p: p.parent.with_name("label_mha") / p.name for p in images}
    without = [p.stem for p, mask in masks.items() if not mask.is_file()]
    if without:
        raise UserError(
            f"{masks[images[0]].parent} lacks the masks of {listed(without)}. Unpack the release "
            f"again."
        )
    groups = dict(zip(images, group_frames(images), strict=True))
    members = by_group(images, groups)
    return Release(
        name="PSFHS",
        cases=[Case(p.stem, (p,), masks[p], g) for g in by_hash(members) for p in members[g]],
        channels=["US"],
        labels={"background": 0, "pubic symphysis": 1, "fetal head": 2},
        list_name="by hash of the group (none is published)",
        counts="images",
        inferred=True,
        spacing_known=False,
        about={
            "reference": "Chen et al. 2024, doi:10.1038/s41597-024-03266-4",
            "licence": "CC BY 4.0 as copies of the data state it",
        },
    )


def group_frames(paths: Sequence[Path]) -> list[str]:
    """Tell for each image the group of near-identical frames, named like its first image."""
    small = np.empty((len(paths), SIDE * SIDE), np.float32)
    for row, path in zip(small, tqdm(paths, "Comparing frames", leave=False), strict=True):
        frame = sitk.GetArrayFromImage(one_plane(read_image(path))[0]).astype(np.float32)
        height, width = (n // SIDE for n in frame.shape)
        if not height or not width:
            raise UserError(f"{path} is smaller than {SIDE} x {SIDE} pixels. Unpack it again.")
        blocks = frame[: height * SIDE, : width * SIDE].reshape(SIDE, height, SIDE, width)
        row[:] = blocks.mean(axis=(1, 3)).ravel()
    small -= small.mean(axis=1, keepdims=True)
    small /= np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    _, group = connected_components(csr_array(small @ small.T > ALIKE), directed=False)
    first: dict[int, str] = {}
    return [first.setdefault(int(g), p.stem) for g, p in zip(group, paths, strict=True)]


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one pair."""
    image, grey = one_plane(read_image(case.images[0]))
    mask = None if case.mask is None else read_image(case.mask)
    return Scan([image], mask, {} if grey else {"image": "planes differ, mean taken"})


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
