"""The drift gauge: what a labelling network does to a few fixed patches, epoch after epoch."""

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

NUM_PATCHES = 16
WINDOW = 10  # epochs that are compared with as many before them
LESS_AGREEMENT = 0.05  # Dice


class DriftGauge:
    """Compare the labels of fixed unlabelled patches with those of the epoch before.

    Needs no annotation, and nothing is learnt from it. Labels are not saved: a continued run labels
    the patches anew with the network it continues with.

    Args:
        x: patches without augmentation, (N, C, *), kept where they are.
        valid: (N, 1, *) bool, False on padding.
        num_classes: foreground classes, or regions.
        regions: labels are (N, R, *) bool instead of (N, 1, *).
        chunk: patches a pass.
        label: weak patches (b, C, *) and their validity -> labels and which of them count,
            without gradient.
        follow: the same -> labels of the trained network on a strong view, and the labels and
            validity of the first network moved as that view was.
    """

    def __init__(
        self,
        x: Tensor,
        valid: Tensor,
        num_classes: int,
        regions: bool,
        chunk: int,
        label: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        follow: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    ):
        self._x, self._valid = x, valid
        self._classes, self._regions, self._chunk = num_classes, regions, chunk
        self._label, self._follow = label, follow
        self._before = self._label_all()[0]

    def _chunks(self) -> list[slice]:
        return [slice(i, i + self._chunk) for i in range(0, len(self._x), self._chunk)]

    def _label_all(self) -> tuple[Tensor, Tensor]:
        parts = [self._label(self._x[c], self._valid[c]) for c in self._chunks()]
        labels, counted = (torch.cat(p) for p in zip(*parts, strict=True))
        return labels, counted

    @torch.no_grad()
    def measure(self) -> dict[str, float | list[float]]:
        """Return the epoch's numbers; all but "changed" per foreground class or region.

        changed: voxels whose label is another than an epoch ago, as a share of the voxels that
        are foreground now or were then. volume: share of all voxels. coverage: share of the class's
        voxels that count as sure. agreement: Dice of the trained network on the strong view with
        the labels. NaN where a class has no voxel.
        """
        labels, counted = self._label_all()
        followed = [self._follow(self._x[c], self._valid[c], labels[c]) for c in self._chunks()]
        result = drift(self._before, labels, counted, self._valid, self._classes, self._regions)
        student, teacher, valid = (torch.cat(p) for p in zip(*followed, strict=True))
        result["agreement"] = [
            _ratio(2 * (a & b & valid).sum(), (a & valid).sum() + (b & valid).sum())
            for a, b in zip(self._masks(student), self._masks(teacher), strict=True)
        ]
        self._before = labels
        return result

    def _masks(self, labels: Tensor) -> list[Tensor]:
        return class_masks(labels, self._classes, self._regions)


def class_masks(labels: Tensor, num_classes: int, regions: bool) -> list[Tensor]:
    """Return one (N, 1, *) bool mask per foreground class or region."""
    if regions:
        return [labels[:, k : k + 1].bool() for k in range(num_classes)]
    return [labels == k for k in range(1, num_classes + 1)]


@torch.no_grad()
def drift(
    before: Tensor, now: Tensor, counted: Tensor, valid: Tensor, num_classes: int, regions: bool
) -> dict[str, float | list[float]]:
    """Return "changed", "volume" and "coverage"; see `DriftGauge.measure`.

    Args:
        before: labels an epoch ago, (N, 1, *), or (N, R, *) bool.
        now: labels.
        counted: which of them count, (N, 1 or R, *).
        valid: (N, 1, *) bool.
        num_classes: foreground classes, or regions.
        regions: labels are one channel a region.
    """
    foreground = (before.bool().any(1, True) | now.bool().any(1, True)) & valid
    masks = [m & valid for m in class_masks(now, num_classes, regions)]
    return {
        "changed": _ratio(((before != now).any(1, True) & valid).sum(), foreground.sum()),
        "volume": [_ratio(m.sum(), valid.sum()) for m in masks],
        "coverage": [
            _ratio((m & (counted[:, k : k + 1] if regions else counted).bool()).sum(), m.sum())
            for k, m in enumerate(masks)
        ],
    }


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item()  # NaN for 0 / 0


def confirms_itself(coverage: Sequence[float], agreement: Sequence[float]) -> bool:
    """Tell whether sureness rises while the trained network follows less and less.

    That is what confirmation bias looks like from outside: over the last ten epochs coverage is no
    smaller than over the ten before, and agreement is lower by 0.05 or more.

    Args:
        coverage: one value an epoch, mean over classes, the last one newest.
        agreement: likewise.
    """
    if min(len(coverage), len(agreement)) < 2 * WINDOW:
        return False
    (old_c, new_c), (old_a, new_a) = (
        (sum(v[-2 * WINDOW : -WINDOW]) / WINDOW, sum(v[-WINDOW:]) / WINDOW)
        for v in (coverage, agreement)
    )
    return new_c >= old_c and new_a <= old_a - LESS_AGREEMENT


def confirmed_for(coverage: Sequence[float], agreement: Sequence[float]) -> int:
    """Return for how many epochs in a row, up to the last one, `confirms_itself` holds.

    Args:
        coverage: one value an epoch, mean over classes, the last one newest.
        agreement: likewise.
    """
    ends = range(len(coverage), 0, -1)
    return sum(1 for _ in takewhile(lambda n: confirms_itself(coverage[:n], agreement[:n]), ends))
