"""All images of a data set, annotated or not, without their masks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import Tensor

from nnunet_ssl.data.loader import PatchLoader, runs_backwards

OUTSIDE = 1e-3  # nnU-Net sets voxels outside its mask to 0, and resampling rings a little


class ImageDataset(nnUNetDatasetBlosc2):
    """Preprocessed images of several folders; no file with a mask is opened.

    Args:
        folders: case -> folder of its preprocessed files.
    """

    def __init__(self, folders: Mapping[str, str | Path]):
        super().__init__(str(next(iter(folders.values()))), sorted(folders))
        self.folders = {case: str(folder) for case, folder in folders.items()}

    def load_case(self, identifier: str) -> tuple:
        """Return data (C, *), zeros (1, *) for the mask, None, and the properties of one case.

        What the properties know of the mask is left out.
        """
        base = Path(self.folders[identifier])
        data = blosc2.open(
            urlpath=str(base / f"{identifier}.b2nd"),
            mode="r",
            dparams={"nthreads": 1},
            **self.mmap_kwargs,
        )
        properties = load_pickle(str(base / f"{identifier}.pkl"))
        properties["class_locations"] = None
        return data, np.broadcast_to(np.int8(0), (1, *data.shape[1:])), None, properties


class ContrastLoader(PatchLoader):
    """Patches of many cases and of all parts of each, in several views.

    A 2D batch takes some cases and from each a slice of each part; a 3D batch takes one patch a
    case. All views come in one batch, view after view. The views of a sample share their slice (3D:
    the range of slices); its place within the slice and the transforms are drawn for each.

    Args:
        *args: as for `PatchLoader`; the batch size counts all views, the data is an `ImageDataset`.
        parts: of a scan, S.
        num_views: of each sample.
        masked: for each channel whether nnU-Net normalised inside a mask and set the rest to 0.
        **kwargs: as for `PatchLoader`.
    """

    def __init__(
        self,
        *args: Any,
        parts: int,
        num_views: int = 2,
        masked: Sequence[bool] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.num_views = num_views
        self.samples = self.batch_size // num_views
        self.parts = parts if self.patch_size_was_2d else 1
        self.masked = [c for c, m in enumerate(masked) if m]
        self._chosen_parts = np.zeros(0, int)
        self._first_slices: list[int] = []

    def get_indices(self) -> np.ndarray:
        """Return the case ids of the next batch."""
        count = max(min(2, self.samples), -(-self.samples // self.parts))
        slices = -(-self.samples // count)  # of a case
        rounds = -(-count // len(self.indices))
        drawn = np.concatenate([np.random.permutation(self.indices) for _ in range(rounds)])
        chosen = [np.random.permutation(self.parts)[:slices] for _ in range(count)]
        self._chosen_parts = np.concatenate(chosen)
        return np.tile(np.repeat(drawn[:count], slices)[: self.samples], self.num_views)

    def get_bbox(self, data_shape, force_fg, class_locations, **kwargs):  # noqa: D102
        lower, upper = super().get_bbox(data_shape, force_fg, class_locations, **kwargs)
        i = len(self._forced) - 1
        if i == 0:
            self._first_slices = []
        if i < self.samples:
            if self.patch_size_was_2d:
                place = (self._chosen_parts[i] + np.random.uniform()) / self.parts
                lower[0] = int(place * data_shape[0])
            self._first_slices.append(lower[0])
        lower[0] = self._first_slices[i % self.samples]
        upper[0] = lower[0] + self.patch_size[0]
        self._box = (np.array(lower), np.array(upper), np.array(data_shape))
        return lower, upper

    def _transform(self, image: Tensor, segmentation: Tensor) -> dict:
        if self.masked:
            outside = (image[self.masked].abs() < OUTSIDE).all(0)
            segmentation = segmentation.masked_fill(outside, -1)
        return super()._transform(image, segmentation)

    def generate_train_batch(self) -> dict[str, Any]:
        """Return the batch; its data are the view "stock" where the pipeline makes it."""
        batch = super().generate_train_batch()
        batch["data"] = batch["views"].pop("stock", batch["data"])
        return batch


class NoPatches:
    """An empty labelled batch, for methods without masks.

    Args:
        channels: of the images.
        patch_size: that the network gets.
    """

    def __init__(self, channels: int, patch_size: Sequence[int]):
        self.channels, self.patch_size = channels, tuple(patch_size)

    def __next__(self) -> dict[str, Any]:
        def empty(channels: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((0, channels, *self.patch_size), dtype=dtype)

        return {
            "data": empty(self.channels, torch.float32),
            "target": empty(1, torch.int16),
            "valid": empty(1, torch.bool),
            "forced_fg": torch.empty(0, dtype=torch.bool),
            "keys": [],
            "views": {},
            "meta": {},
        }

    def set_thread_id(self, thread_id: int) -> None:
        """Nothing is drawn here."""


def regular_patches(
    dataset: ImageDataset, patch_size: Sequence[int], most: int, slice_axis: int = 0
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield patches from the middle of each scan, spread evenly along its first axis.

    Args:
        dataset: the cases.
        patch_size: that the network gets; two numbers take slices.
        most: patches of a case; no more than it takes to see every slice once.
        slice_axis: as for `PatchLoader`.

    Yields:
        Case id, image (C, *), and for each slice of it its position in [0, 1]: (1,) in 2D, (D,) in
        3D, below 0 or above 1 where the patch reaches out of the scan.
    """
    size = (1,) * (len(patch_size) == 2) + tuple(patch_size)
    for case in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case)
        turned = runs_backwards(properties, slice_axis)
        shape = data.shape[1:]
        middle = [(n - s) // 2 for n, s in zip(shape, size, strict=True)]
        count = min(most, -(-shape[0] // size[0]))
        room = shape[0] - size[0]
        for i in range(count):
            first = middle[0] if count == 1 else round(i * room / (count - 1))
            lower = [first, *middle[1:]]
            box = [[a, a + s] for a, s in zip(lower, size, strict=True)]
            image = torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()
            z = (torch.arange(first, first + size[0]) + 0.5) / shape[0]
            yield case, image[:, 0] if len(patch_size) == 2 else image, 1 - z if turned else z
