"""A small 3D data set, made from a seed, for the demo."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.random import Generator
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from nnunet_ssl.io import write_json

SHAPE = (32, 48, 48)  # voxels, z y x
SPACING = (1.0, 1.0, 1.5)  # mm, x y z
ORGANS = {"organ_1": 1, "organ_2": 2, "organ_3": 3}
# Centre and half-axes in parts of the volume; mean intensity, where background is 0.
ANATOMY = {
    1: ((0.50, 0.36, 0.40), (0.34, 0.20, 0.24), 1.0),
    2: ((0.46, 0.73, 0.32), (0.28, 0.17, 0.19), 1.6),
    3: ((0.56, 0.60, 0.74), (0.32, 0.19, 0.15), -0.7),
}
NOISE = 0.25  # standard deviation; texture, blur and bias come on top


def make_case(rng: Generator, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Draw one patient: three organs that vary in pose, size, outline and brightness.

    Returns:
        Image, float32 (z, y, x), and labels, uint8 (z, y, x), with all organs present.
    """
    size = np.array(shape, dtype=float)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = size.reshape(3, 1, 1, 1) / 2
    rotation = Rotation.from_euler("zyx", rng.normal(0, 8, 3), degrees=True).as_matrix()
    where = np.einsum("ij,jzyx->izyx", rotation, grid - centre) / rng.normal(1, 0.06) + centre
    where += rng.normal(0, 0.03, (3, 1, 1, 1)) * size.reshape(3, 1, 1, 1)
    where += np.stack([smooth_field(rng, shape, 8) for _ in range(3)]) * 1.6  # voxels

    labels = np.zeros(shape, dtype=np.uint8)
    image = 0.2 * smooth_field(rng, shape, 3)  # texture between the organs
    for label, (middle, axes, mean) in ANATOMY.items():
        position = (np.array(middle) + rng.normal(0, 0.015, 3)).reshape(3, 1, 1, 1) * size[
            :, None, None, None
        ]
        radii = np.array(axes) * rng.normal(1, 0.10, 3) * size
        inside = (((where - position) / radii.reshape(3, 1, 1, 1)) ** 2).sum(0) < 1
        inside &= labels == 0
        labels[inside] = label
        image[inside] += rng.normal(mean, 0.12)
    image = gaussian_filter(image, 0.6)  # partial volume
    bias = np.exp(0.15 * smooth_field(rng, shape, 14))
    image = (image + 1.0) * bias + rng.normal(0, NOISE, shape)
    return (image * 100).astype(np.float32), labels


def smooth_field(rng: Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Random field of unit standard deviation that varies over about `sigma` voxels."""
    coarse = rng.normal(size=[max(4, round(n / sigma) + 3) for n in shape])
    axes = [np.linspace(1, n - 2, m) for n, m in zip(coarse.shape, shape, strict=True)]
    field = map_coordinates(coarse, np.stack(np.meshgrid(*axes, indexing="ij")), order=3)
    return field / field.std()


def write_dataset(
    raw: Path,
    test: Path,
    seed: int,
    labeled: int = 4,
    unlabeled: int = 24,
    tests: int = 10,
    shape: tuple[int, ...] = SHAPE,
) -> None:
    """Write imagesTr, labelsTr, imagesUn and dataset.json, and a test set apart.

    Args:
        raw: the data set folder in nnUNet_raw; made here.
        test: gets `images` and `labels`, outside nnU-Net's folders.
        seed: of everything; the same seed gives the same voxels.
        labeled: annotated cases.
        unlabeled: cases in imagesUn; their masks are never written.
        tests: test cases.
        shape: voxels of each case, z y x.
    """
    folders = {
        "train": (raw / "imagesTr", raw / "labelsTr"),
        "unlabeled": (raw / "imagesUn", None),
        "test": (test / "images", test / "labels"),
    }
    counts = {"train": labeled, "unlabeled": unlabeled, "test": tests}
    rng = np.random.default_rng(seed)
    for group, (images, masks) in folders.items():
        images.mkdir(parents=True)
        if masks:
            masks.mkdir(parents=True)
        for i in range(counts[group]):
            image, labels = make_case(rng, shape)
            write_image(image, images / f"{group}_{i:03d}_0000.nii.gz")
            if masks:
                write_image(labels, masks / f"{group}_{i:03d}.nii.gz")
    write_json(
        {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, **ORGANS},
            "numTraining": labeled,
            "file_ending": ".nii.gz",
        },
        raw / "dataset.json",
    )


def write_image(array: np.ndarray, path: Path) -> None:
    """Write (z, y, x) with the data set's spacing."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path))
