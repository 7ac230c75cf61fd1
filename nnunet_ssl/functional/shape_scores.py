"""How regular a predicted shape is, and which samples of a batch are regular enough. 2D only.

All scores: small is good.
"""

import math

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn.functional import conv2d, pad

COARSE = 128  # pixels a side; distance maps of larger ones take too long
WORST = 1e6  # the score of what has no shape


@torch.no_grad()
def boundary_excess(prob: Tensor, valid: Tensor) -> Tensor:
    """Return by how much the outline of a soft mask is longer than that of a disc of its area.

    TV(p) / (2 sqrt(pi sum p)) - 1, at least 0; TV is the sum of Sobel gradients. The same at every
    place and size.

    Args:
        prob: (B, 1, H, W), in [0, 1].
        valid: (B, 1, H, W) bool, pixels that count.

    Returns:
        (B,) float32.

    Source: corrects the boundary consistency of Zhou et al. 2025 (ERSR), code, which grows with
        the size of the head.
    """
    prob = prob.float()
    length = (_sobel(prob, "replicate") * valid).flatten(1).sum(1)
    area = (prob * valid).flatten(1).sum(1)
    return (length / (2 * torch.sqrt(math.pi * area)).clamp_min(1e-6) - 1).clamp(0, WORST)


@torch.no_grad()
def contour_roughness(mask: Tensor, valid: Tensor) -> Tensor:
    """Return how much the distance to the outline of a mask bends, for its size.

    sum |Laplacian(signed distance)| / (2 pi r), r the radius of a disc of that area. Outside, the
    distance bends all over the patch: a smooth mask that is small for its patch scores as much as a
    rough large one. On a grid of at most 128 pixels a side, since distances are exact and slow.
    Waits for the device.

    Args:
        mask: (B, 1, H, W) bool.
        valid: (B, 1, H, W) bool, pixels that count.

    Returns:
        (B,) float32, on the device of the mask; 1e6 for empty and full masks.

    Source: corrects the contour regularity of Zhou et al. 2025 (ERSR), code, which an artefact at
        the frame of the image rules.
    """
    step = math.ceil(max(mask.shape[2:]) / COARSE)
    both = torch.cat([mask, valid], 1)[:, :, step // 2 :: step, step // 2 :: step].cpu()
    scores = []
    for inside, counted in both.numpy():
        if not inside.any() or inside.all():
            scores.append(WORST)
            continue
        signed = distance_transform_edt(~inside) - distance_transform_edt(inside)
        bend = np.abs(_laplacian(signed, "edge"))[counted].sum()
        scores.append(float(bend / (2 * math.sqrt(math.pi * inside.sum()))))
    return torch.tensor(scores).to(mask.device, non_blocking=True)


@torch.no_grad()
def released_scores(prob: Tensor) -> Tensor:
    """Return both scores as released; kept to compare with.

    Mean Sobel gradient, and mean |Laplacian| of the distance to the mask outside of it. With zeros
    around the image the second one is largest at the frame, and empty and full masks score best.

    Args:
        prob: (B, 1, H, W), in [0, 1].

    Returns:
        (B, 2) float32. Waits for the device.

    Source: Zhou et al. 2025 (ERSR), code, with an exact distance.
    """
    gradient = (_sobel(prob.float(), "constant") ** 2 + 1e-6).sqrt().flatten(1).mean(1)
    bends = []
    for inside in (prob > 0.5)[:, 0].cpu().numpy():
        distance = distance_transform_edt(~inside) if inside.any() else np.zeros(inside.shape)
        bends.append(float(np.abs(_laplacian(distance, "constant")).mean()))
    return torch.stack([gradient, torch.tensor(bends).to(prob.device, non_blocking=True)], 1)


@torch.no_grad()
def select_best(
    scores: Tensor,
    past: Tensor,
    seen: Tensor,
    *,
    keep: float,
    min_keep: float,
    share: float,
    ranked: bool,
) -> Tensor:
    """Choose samples of a batch by two scores, among all that were seen.

    Kept are those among the best part of past and present together, and at least the best
    `min_keep` of the batch, one in any case.

    Args:
        scores: of the batch, (B, 2).
        past: (N, 2), scores of earlier samples.
        seen: (N,) bool, which of them exist.
        keep: part that is good enough, in [0, 1].
        min_keep: part of the batch that stays in any case.
        share: alpha, of the first score; 1 - alpha is that of the second.
        ranked: add the ranks of both scores, not the scores, which differ in scale.

    Returns:
        (B,) bool; ties stay together.

    Source: Zhou et al. 2025 (ERSR), code.
    """
    values = torch.cat([past, scores])
    counted = torch.cat([seen, torch.ones(len(scores), dtype=torch.bool, device=seen.device)])
    if ranked:
        values = torch.stack([_places(v, counted) for v in values.unbind(1)], 1)
    total = share * values[:, 0] + (1 - share) * values[:, 1]
    limit = (keep * counted.sum() + 1e-6).floor()
    good = _places(total, counted)[-len(scores) :] < limit
    own = total[-len(scores) :]
    least = max(1, math.floor(min_keep * len(scores) + 1e-6))
    return good | (_places(own, torch.ones_like(good)) < least)


def _places(values: Tensor, counted: Tensor) -> Tensor:
    """Return how many of the counted values are smaller than each."""
    order = torch.where(counted, values, torch.inf).sort().values
    return torch.searchsorted(order, values.contiguous()).float()


def _sobel(prob: Tensor, mode: str) -> Tensor:
    """Return the length of the gradient, (B, 1, H, W); a straight edge sums to its length."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([kernel, kernel.T])[:, None].to(prob.device, non_blocking=True)
    with torch.autocast(prob.device.type, enabled=False):
        return conv2d(pad(prob, (1, 1, 1, 1), mode=mode), kernels).norm(dim=1, keepdim=True)


def _laplacian(distance: np.ndarray, mode: str) -> np.ndarray:
    d = np.pad(distance, 1, mode=mode)  # type: ignore[call-overload]
    neighbors = d[:-2, 1:-1] + d[2:, 1:-1] + d[1:-1, :-2] + d[1:-1, 2:]
    return neighbors - 4 * distance
