"""Preprocessed cases, transforms and loaders made up for the tests of the loader."""

from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ssl.data.loader import PatchLoader
from nnunet_ssl.data.unlabeled import UnlabeledDataset
from nnunet_ssl.data.views import Pipeline

SHAPE = (12, 14, 16)
PLAIN = LabelManager({"background": 0, "a": 1, "b": 2}, None)
IGNORE = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
REGIONS = LabelManager({"background": 0, "all": (1, 2), "b": 2}, [1, 2])
REGIONS_IGNORE = LabelManager({"background": 0, "all": (1, 2), "b": 2, "ignore": 3}, [1, 2])


def save(folder: Path, name: str, data: np.ndarray, seg: np.ndarray, locations=None) -> None:
    folder.mkdir(exist_ok=True)
    properties = {} if locations is None else {"class_locations": locations}
    nnUNetDatasetBlosc2.save_case(
        data.astype(np.float32),
        seg.astype(np.int8),
        properties,
        str(folder / name),
        chunks=data.shape,
        blocks=data.shape,
        chunks_seg=seg.shape,
        blocks_seg=seg.shape,
    )
    write_pickle(properties, str(folder / f"{name}.pkl"))


def coordinates(shape=SHAPE, case: int = 0) -> np.ndarray:
    """Channels z, y, x (voxel index + 1, so that padding alone is 0), case + 1, and ones."""
    grid = np.stack(np.meshgrid(*[np.arange(s) + 1.0 for s in shape], indexing="ij"))
    return np.concatenate([grid, np.full((1, *shape), case + 1.0), np.ones((1, *shape))])


def unlabeled_cases(folder: Path, number: int = 3, shape=SHAPE, hole: bool = False):
    """Cases whose voxels tell where they are; `hole` is a part that nnU-Net would mask."""
    for i in range(number):
        seg = np.zeros((1, *shape))
        if hole:
            seg[:, :, : shape[1] // 2] = -1
        save(folder, f"un_{i:03d}", coordinates(shape, i), seg)
    return UnlabeledDataset(str(folder))


def labeled_cases(folder: Path, labels: LabelManager, number: int = 3, channels: int = 2):
    rng = np.random.default_rng(0)
    for i in range(number):
        seg = np.zeros((1, *SHAPE), np.int8)
        seg[0, 3:9, 3:9, 4 + i : 10 + i] = 1
        seg[0, 5:7, 5:8, 6:9] = 2
        seg[0, :, :, :2] = -1
        if labels.has_ignore_label:
            seg[0, :, :, -3:] = 3
        wanted = labels.foreground_regions if labels.has_regions else labels.foreground_labels
        wanted = list(wanted) + ([(-1, *labels.all_labels)] if labels.has_ignore_label else [])
        locations = DefaultPreprocessor._sample_foreground_locations(seg, wanted, seed=1)
        save(folder, f"tr_{i:03d}", rng.normal(size=(channels, *SHAPE)), seg, locations)
    return nnUNetDatasetBlosc2(str(folder))


def transforms(patch, labels=PLAIN, scales=None, mask=None, mirror=True, dummy_2d=False):
    """nnU-Net's training transforms, with a blur that does not depend on a timing."""
    made = nnUNetTrainer.get_training_transforms(
        patch,
        (-0.5, 0.5),
        scales,
        tuple(range(len(patch))) if mirror else None,
        dummy_2d,
        use_mask_for_norm=mask,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    for step in made.transforms:
        if isinstance(step, RandomTransform) and isinstance(step.transform, GaussianBlurTransform):
            step.transform.benchmark = False
    return made


def still(patch, **options):
    """The same without rotation, scaling and mirroring."""
    made = transforms(patch, mirror=False, **options)
    for step in made.transforms:
        if isinstance(step, SpatialTransform):
            step.p_rotation = step.p_scaling = 0
    return made


def swap_intensity(made, new=()):
    """Put other transforms in place of all intensity transforms."""
    keep = (SpatialTransform, MirrorTransform, RemoveLabelTansform)
    kept = [t for t in made.transforms if not isinstance(t, RandomTransform)]
    assert any(isinstance(t, keep) for t in kept)
    cut = next(i for i, t in enumerate(kept) if isinstance(t, SpatialTransform)) + 1
    made.transforms = [*kept[:cut], *new, *kept[cut:]]
    return made


def unlabeled_loader(cases, patch, made, views=(), meta=(), table=None, initial=None, labels=PLAIN):
    return PatchLoader(
        cases,
        3,
        initial or patch,
        patch,
        labels,
        Pipeline(made, labeled=False, views=views),
        meta=meta,
        table=table,
    )


def draw_in_child(loader, queue) -> None:
    """What a spawned worker does: unpickle a loader and draw from it."""
    batch = next(loader)
    unlabeled = batch.get("unlabeled")
    queue.put((list(batch["keys"]), None if unlabeled is None else list(unlabeled["keys"])))
