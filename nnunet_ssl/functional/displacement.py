"""Confidence-aware displacement: the largest unsure region gets a sure window of another view.

Searching runs on a coarse grid on the CPU, so `choose_windows` needs `coarse_maps` there; the rest
stays on the device.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from nnunet_ssl.functional.outputs import confidence

_TINY = 1e-12


class Windows(NamedTuple):
    """Where one sample of a view is overwritten and with what, in cells of the coarse grid.

    Attributes:
        target: first cell of the window that is overwritten.
        source: first cell of the window that is copied.
        size: of both windows, in cells.
        region: (*size) bool, cells of the target window that belong to the unsure region.
    """

    target: tuple[int, ...]
    source: tuple[int, ...]
    size: tuple[int, ...]
    region: Tensor


def coarse_maps(prob: Tensor, valid: Tensor, factor: Sequence[int], regions: bool) -> Tensor:
    """Average a view over the cells of a coarse grid.

    Args:
        prob: (B, K, *), in [0, 1].
        valid: (B, 1, *) bool, False on padding.
        factor: voxels per cell, one number per axis; voxels behind the last whole cell are left
            out.
        regions: channels are independent regions; the confidence is then that of the least sure.

    Returns:
        (B, 2 + K, *cells) float32: confidence, valid share, mean probabilities. No gradient.

    Raises:
        ValueError: a factor is larger than its axis.
    """
    if len(factor) != prob.ndim - 2 or any(
        f > s for f, s in zip(factor, prob.shape[2:], strict=True)
    ):
        raise ValueError(f"Cells of {tuple(factor)} do not fit a patch of {tuple(prob.shape[2:])}.")
    prob = prob.detach().float()
    sure = confidence(prob, regions).amin(1, keepdim=True)
    pool = avg_pool2d if prob.ndim == 4 else avg_pool3d
    return pool(torch.cat([sure, valid.float(), prob], 1), tuple(factor))  # type: ignore[operator]


def window_means(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return the mean of each window by a summed-area table.

    Args:
        values: (*S) or with leading dimensions, which are kept.
        size: of the window, for the last axes; at most S.

    Returns:
        (*S - size + 1) float64, entry i being the window that starts at i.

    Raises:
        ValueError: the window is empty or larger than S.

    Source: Crow 1984 (summed-area tables).
    """
    spatial = values.shape[-len(size) :]
    if any(not 1 <= n <= s for n, s in zip(size, spatial, strict=True)):
        raise ValueError(f"No window of {tuple(size)} in {tuple(spatial)}.")
    table = values.double()
    for axis, n in enumerate(size, start=values.ndim - len(size)):
        table = table.cumsum(axis)
        table = torch.cat([torch.zeros_like(table.narrow(axis, 0, 1)), table], axis)
        length = table.shape[axis] - n
        table = table.narrow(axis, n, length) - table.narrow(axis, 0, length)
    return table / math.prod(size)


def largest_region(mask: Tensor) -> Tensor:
    """Return the largest connected component, connected by faces.

    Args:
        mask: (*S) bool on the CPU, 2D or 3D.

    Returns:
        (*S) bool, empty if `mask` is; of components of the same size always the same one.
    """
    import cc3d  # comes with nnU-Net; imported where needed because few methods need it

    found = cc3d.connected_components(mask.numpy(), connectivity=4 if mask.ndim == 2 else 6)
    components = torch.from_numpy(found.astype(np.int64))
    sizes = torch.bincount(components.flatten())[1:]
    return components == sizes.argmax() + 1 if len(sizes) else torch.zeros_like(mask)


def choose_windows(
    target: Tensor,
    source: Tensor,
    *,
    threshold: float,
    limit: Sequence[int],
    min_region: int = 8,
    candidates: int = 4,
    regions: bool = False,
    oversized: Literal["clip", "skip"] = "clip",
) -> Windows | None:
    """Choose where one sample of a view is overwritten, and with which window of the other view.

    The largest connected region of confidence below the threshold is bounded by a box; of the
    windows in that box, of its size but at most `limit`, the least confident one is the target.
    Sources are the most confident windows of that size that do not overlap; the one whose mean
    probabilities are closest to the target's wins.

    Args:
        target: (2 + K, *S) of `coarse_maps` on the CPU, the view that is overwritten.
        source: the same of the view that is copied from.
        threshold: cells of a lower confidence are unsure.
        limit: largest window in cells, per axis.
        min_region: smaller regions, in cells, are left as they are.
        candidates: sources to choose from by KL(target || source); 1 takes the most confident.
        regions: channels are independent regions; the divergence is summed over them.
        oversized: a region that exceeds `limit` along an axis is clipped to its least confident
            window, or left as it is.

    Returns:
        The windows; None if there is no region to replace, or no window that is mostly inside the
        image.

    Source: Xiao et al. 2025 (CAD), arXiv:2502.00536, as far as its abstract tells; divergence and
        number of sources from Chi et al. 2024 (ABD), code.
    """
    inside = target[1] >= 0.5
    region = largest_region((target[0] < threshold) & inside)
    if not region.any() or int(region.sum()) < min_region:
        return None
    cells = region.nonzero()
    low, high = cells.amin(0).tolist(), (cells.amax(0) + 1).tolist()
    extent = [b - a for a, b in zip(low, high, strict=True)]
    size = tuple(min(e, most) for e, most in zip(extent, limit, strict=True))
    if oversized == "skip" and size != tuple(extent):
        return None
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    unsure = torch.where(inside, target[0], 1.0)[box]  # padding attracts no window
    place = _position(window_means(unsure, size).argmin(), unsure.shape, size)
    start = tuple(a + p for a, p in zip(low, place, strict=True))
    if _window(target[1], start, size).mean() < 0.5:
        return None

    mean = _mean_prob(target, start, size)
    found: list[tuple[float, tuple[int, ...]]] = []
    means = window_means(torch.where(source[1] >= 0.5, source[0], 0.0), size)
    for _ in range(candidates):
        best = means.argmax()
        if means.flatten()[best] <= 0:
            break  # all windows overlap the chosen ones
        other = _position(best, source.shape[1:], size)
        if _window(source[1], other, size).mean() >= 0.5:
            found.append((_divergence(mean, _mean_prob(source, other, size), regions), other))
        overlap = tuple(slice(max(o - n + 1, 0), o + n) for o, n in zip(other, size, strict=True))
        means[overlap] = 0
    if not found:
        return None
    return Windows(start, min(found)[1], size, _window(region, start, size).clone())


def displace(
    x: Tensor,
    source: Tensor,
    windows: Sequence[Windows | None],
    factor: Sequence[int],
    shape: Literal["box", "region"] = "box",
) -> Tensor:
    """Overwrite a window of each sample with one of another view; voxels are copied, not mixed.

    Args:
        x: (B, C, *) images or masks; not modified.
        source: same shape, the other view as it is.
        windows: one per sample, None leaves it as it is.
        factor: voxels per cell of the windows, per axis.
        shape: overwrite the whole window, or only the cells of its unsure region.

    Raises:
        ValueError: shapes or numbers differ.
    """
    if x.shape != source.shape or len(windows) != len(x):
        raise ValueError(
            f"Views {tuple(x.shape)} and {tuple(source.shape)} need the same shape, and a window "
            f"for each sample; got {len(windows)}."
        )
    x = x.clone()
    for image, other, window in zip(x, source, windows, strict=True):
        if window is None:
            continue
        to, of, size = (
            [f * n for f, n in zip(factor, cells, strict=True)]
            for cells in (window.target, window.source, window.size)
        )
        written, copied = _window(image, to, size), _window(other, of, size)
        if shape == "region":
            region = window.region.to(x.device, non_blocking=True)
            for axis, f in enumerate(factor):
                region = region.repeat_interleave(f, axis)
            copied = torch.where(region, copied, written)
        written.copy_(copied)
    return x


def _window(values: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    place = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    return values[(slice(None),) * (values.ndim - len(place)) + place]


def _position(index: Tensor, spatial: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Return the start of the window with this flat index."""
    shape = tuple(s - n + 1 for s, n in zip(spatial, size, strict=True))
    return tuple(int(i) for i in torch.unravel_index(index, shape))


def _mean_prob(view: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    return _window(view[2:], start, size).double().flatten(1).mean(1)


def _divergence(p: Tensor, q: Tensor, regions: bool) -> float:
    """KL(p || q) of class probabilities (K,), or summed over regions."""
    if regions:
        p, q = torch.cat([p, 1 - p]), torch.cat([q, 1 - q])
    return float((p * (p.clamp_min(_TINY) / q.clamp_min(_TINY)).log()).sum())
