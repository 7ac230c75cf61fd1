"""nnU-Net's training transforms, taken apart so that a loader can tell padding and make views."""

from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import (
    Convert2DTo3DTransform,
    Convert3DTo2DTransform,
)
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from torch import Tensor

_GEOMETRY = (SpatialTransform, MirrorTransform, Convert3DTo2DTransform, Convert2DTo3DTransform)

VIEWS = {
    "stock": "the same patch after nnU-Net's intensity augmentation",
    "second": "another patch of the same case, with its own place and geometry, weak; its padding "
    "mask is the view second_valid",
}


class Pipeline:
    """The transforms of one stream.

    Args:
        transforms: nnU-Net's training transforms.
        labeled: True applies all of them, in nnU-Net's order and with its random numbers; False
            only the geometric ones and masking (the weak view).
        views: further views of each unlabelled patch; see `VIEWS`.
        reproducible: choose the blur by size and not by a timing, which differs from run to run.
    """

    def __init__(
        self,
        transforms: ComposeTransforms,
        labeled: bool,
        views: Sequence[str] = (),
        reproducible: bool = False,
    ):
        steps: list[BasicTransform] = list(transforms.transforms)
        cut = next(i for i, t in enumerate(steps) if isinstance(t, RemoveLabelTansform))
        self.to_target = steps[cut:]
        masking = [t for t in steps[:cut] if isinstance(t, MaskImageTransform)]
        self.intensity = [
            t for t in steps[:cut] if not isinstance(t, (*_GEOMETRY, MaskImageTransform))
        ] + masking
        self.before_target = (
            steps[:cut]
            if labeled
            else [t for t in steps[:cut] if isinstance(t, _GEOMETRY)] + masking
        )
        self.labeled = labeled
        self.views = tuple(views)
        if reproducible:
            for step in self.intensity:
                inner = step.transform if isinstance(step, RandomTransform) else step
                if isinstance(inner, GaussianBlurTransform):
                    inner.benchmark = False

    def __call__(
        self, image: Tensor, segmentation: Tensor, z_map: Tensor | None = None
    ) -> tuple[dict, dict]:
        """Transform one sample.

        Args:
            image: (C, *) patch, larger than the final one.
            segmentation: (1, *), -1 on padding.
            z_map: (1, *) in [0, 1] inside the case, that travels with the voxels, or None.

        Returns:
            What nnU-Net's loader expects ("image", "segmentation"), and what it does not know:
            "valid" (1, *) bool, False on padding, "z_map", and one entry a view.
        """
        sample = {"image": image, "segmentation": segmentation}
        if z_map is not None:
            # the ones tell how much of a voxel was interpolated from outside the patch
            sample["regression_target"] = torch.cat([z_map, torch.ones_like(z_map)])
        for step in self.before_target:
            sample = step(**sample)
        extra = {"valid": sample["segmentation"][:1] != -1}
        if z_map is not None:
            z, share = sample["regression_target"].split(1)
            extra["z_map"] = torch.where(share > 0, z / share, 0.0).clamp(0, 1)
        if "stock" in self.views:
            view = {"image": sample["image"].clone(), "segmentation": sample["segmentation"]}
            for step in self.intensity:
                view = step(**view)
            extra["stock"] = view["image"]
        if self.labeled:
            for step in self.to_target:
                sample = step(**sample)
        else:
            sample["segmentation"] = sample["segmentation"].to(torch.int16)
        return sample, extra
