"""Small synthetic data sets in nnU-Net's layout."""

import json
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.planning.api import plan_and_preprocess
from nnunet_ssl.planning.small import shrink_plans

# name -> what make_raw_dataset gets
TOYS = {
    "Toy": {"dataset_id": 901},
    "Regions": {"dataset_id": 902, "regions": True},
    "Ignore": {"dataset_id": 903, "ignore": True},
    "RegionsIgnore": {"dataset_id": 904, "regions": True, "ignore": True},
    "Channels": {"dataset_id": 905, "channels": 2, "classes": 3},
}


def make_raw_dataset(
    raw_root: Path,
    dataset_id: int = 901,
    name: str = "Toy",
    dim: int = 3,
    num_labeled: int = 3,
    num_unlabeled: int = 5,
    num_test: int = 0,
    channels: int = 1,
    classes: int = 2,
    regions: bool = False,
    ignore: bool = False,
    shape: tuple[int, ...] = (16, 32, 32),
    seed: int = 0,
    ending: str = ".nii.gz",
) -> Path:
    """Write a data set with `classes` foreground classes; return its raw folder.

    `dim=2` writes images of one slice. Test cases go to `raw_root.parent / "heldout"`.
    """
    shape = (1, *shape[-2:]) if dim == 2 else tuple(shape)
    folder = Path(raw_root) / f"Dataset{dataset_id:03d}_{name}"
    heldout = Path(raw_root).parent / "heldout"
    rng = np.random.default_rng(seed)
    parts = [
        ("tr", num_labeled, folder / "imagesTr", folder / "labelsTr"),
        ("un", num_unlabeled, folder / "imagesUn", None),
        ("ts", num_test, heldout / "imagesTs", heldout / "labelsTs"),
    ]
    for prefix, number, images, masks in parts:
        for i in range(number):
            image, mask = make_case(rng, shape, channels, classes)
            if ignore:
                mask[..., : shape[-1] // 8] = classes + 1
            for c in range(channels):
                write_image(image[c], images / f"{prefix}_{i:03d}_{c:04d}{ending}")
            if masks is not None:
                write_image(mask, masks / f"{prefix}_{i:03d}{ending}")

    labels: dict = {"background": 0}
    if regions:
        labels |= {"whole": list(range(1, classes + 1)), "core": classes}
    else:
        labels |= {f"organ{c}": c for c in range(1, classes + 1)}
    if ignore:
        labels["ignore"] = classes + 1
    dataset_json = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": labels,
        "numTraining": num_labeled,
        "file_ending": ending,
    }
    if regions:
        dataset_json["regions_class_order"] = [1, classes]
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=2))
    return folder


def make_case(
    rng: np.random.Generator, shape: tuple[int, ...], channels: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return image (channels, *shape) and mask (*shape): one ellipsoid per class, side by side."""
    grid = np.meshgrid(*[np.arange(s) for s in shape], indexing="ij")
    mask = np.zeros(shape, np.uint8)
    image = rng.normal(100, 10, (channels, *shape))
    for c in range(1, classes + 1):
        center = np.array([s / 2 for s in shape])
        center[-1] = shape[-1] * c / (classes + 1)
        center += rng.uniform(-0.05, 0.05, 3) * shape
        radii = np.array([max(s / 3, 1) for s in shape]) * rng.uniform(0.8, 1.1, 3)
        radii[-1] = shape[-1] / (2.5 * classes + 1)
        distance = sum(((g - m) / r) ** 2 for g, m, r in zip(grid, center, radii, strict=True))
        mask[distance <= 1] = c
        image[:, distance <= 1] += 60 * c
    return image.astype(np.float32), mask


def write_image(
    array: np.ndarray, path: Path, spacing: tuple[float, float, float] = (1, 1, 1)
) -> None:
    """Write a (D, H, W) array; spacing in mm as (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def preprocess_toy(
    raw_root: Path,
    preprocessed_root: Path,
    dataset_id: int,
    configurations: tuple[str, ...] = ("3d_fullres",),
    small: bool = True,
    plan_on: str = "all",
    planner: str = "ExperimentPlanner",
) -> str:
    """Plan and preprocess in this process; `small` gives each network three stages of 4-8 features.

    Returns the plans identifier. The environment variables keep the two folders afterwards.
    """
    os.environ["nnUNet_raw"] = str(raw_root)
    os.environ["nnUNet_preprocessed"] = str(preprocessed_root)
    plans_name = plan_and_preprocess(
        dataset_id, configurations, planner=planner, plan_on=plan_on, num_processes=1
    )
    if small:
        (path,) = Path(preprocessed_root).glob(f"Dataset{dataset_id:03d}_*/{plans_name}.json")
        plans = json.loads(path.read_text(encoding="utf-8"))
        for configuration in configurations:
            patch = (32, 32) if configuration == "2d" else (16, 32, 32)
            plans = shrink_plans(plans, configuration, (4, 8, 8), patch, batch_size=2)
        path.write_text(json.dumps(plans, indent=2))
    return plans_name
