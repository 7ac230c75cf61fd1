"""Boxes of other patches, as CutMix pastes them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cutmix_boxes(
    batch: int,
    spatial: Sequence[int],
    low: float,
    high: float,
    *,
    count: int = 1,
    aspect: float = 3.3,
    probability: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw boxes by the share of the patch that they fill together, for each sample.

    Random numbers come from PyTorch's CPU generator, whatever the device.

    Args:
        batch: number of samples.
        spatial: patch size in voxels, 2D or 3D.
        low: smallest share of the patch's area or volume,
        high: largest share; uniform between them, before sides are rounded to voxels.
        count: boxes a sample, of equal size each in another place and of another shape; where they
            overlap less is filled.
        aspect: two sides of a box, in parts of the patch's sides, differ at most by this factor.
        probability: of a sample to get boxes at all.
        device: where the mask is made.

    Returns:
        (batch, 1, *spatial) bool, True inside the boxes; positions uniform.

    Raises:
        ValueError: not 0 < low <= high <= 1, or a value below 1 of `count` or `aspect`.

    Source: Yun et al. 2019, arXiv:1905.04899; French et al. 2020, arXiv:1906.01916 (several boxes);
        Yang et al. 2023, arXiv:2208.09910 (share and aspect). In 3D the share is one of volume.
    """
    if not 0 < low <= high <= 1 or count < 1 or aspect < 1:
        raise ValueError(
            f"Boxes need 0 < low <= high <= 1, count >= 1 and aspect >= 1; got {low}, {high}, "
            f"{count} and {aspect}."
        )
    axes = len(spatial)
    chosen = (torch.rand(batch) < probability).tolist()
    share = (low + (high - low) * torch.rand(batch, 1, 1, dtype=torch.float64)) / count
    tilt = math.log(aspect) * torch.rand(batch, count, axes, dtype=torch.float64)
    tilt = tilt - tilt.mean(2, keepdim=True)  # of the log sides; the volume stays
    room = -share.log() / axes  # no side may outgrow the patch
    tilt = tilt * (room / tilt.amax(2, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    sides = (share.log() / axes + tilt).exp()
    places = torch.rand(batch, count, axes, dtype=torch.float64)
    inside = torch.zeros((batch, 1, *spatial), dtype=torch.bool, device=device)
    for sample, wanted, *boxes in zip(inside, chosen, sides.tolist(), places.tolist(), strict=True):
        for side, place in zip(*boxes, strict=True) if wanted else ():
            extent = [min(max(round(s * n), 1), n) for s, n in zip(side, spatial, strict=True)]
            start = [
                math.floor(u * (n - e + 1)) for u, n, e in zip(place, spatial, extent, strict=True)
            ]
            sample[0][tuple(slice(a, a + e) for a, e in zip(start, extent, strict=True))] = True
    return inside


def random_partners(batch: int) -> Tensor:
    """Draw for each sample another one of the batch: (batch,) indices, each used once.

    Raises:
        ValueError: the batch holds one sample.
    """
    if batch < 2:
        raise ValueError(f"A sample to mix with needs a batch of 2 or more; got {batch}.")
    return torch.arange(batch).roll(int(torch.randint(1, batch, ())))


def cutmix(inside: Tensor, partners: Tensor, *maps: Tensor) -> list[Tensor]:
    """Paste the partners' boxes into images and all that belongs to them.

    Args:
        inside: (B, 1, *) bool, True where the partner's voxels go.
        partners: (B,) indices into the batch, e.g. from `random_partners`.
        maps: images, labels, masks, (B, C, *) each.

    Returns:
        The mixed maps; voxels are moved, never interpolated. Empty boxes leave a sample as it is.
    """
    partners = partners.to(inside.device, non_blocking=True)
    return [torch.where(inside, m.index_select(0, partners), m) for m in maps]
