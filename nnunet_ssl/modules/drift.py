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
        follow: the same and the labels -> labels of the trained network on a strong view, and the
            labels and validity of the first network moved as that view was.
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
        self._patches = list(zip(x.split(chunk), valid.split(chunk), strict=True))
        self._classes, self._regions = num_classes, regions
        self._label, self._follow = label, follow
        self._before = [_kept(label(x, valid)[0]) for x, valid in self._patches]

    @torch.no_grad()
    def measure(self) -> dict[str, float | list[float]]:
        """Return the epoch's numbers; all but "changed" per foreground class or region.

        changed: voxels whose label is another than an epoch ago, as a share of the voxels that
        are foreground now or were then. volume: share of all voxels. coverage: share of the class's
        voxels that count as sure. agreement: Dice of the trained network on the strong view with
        the labels. NaN where a class has no voxel.
        """
        counts, labels = [], []
        for (x, valid), before in zip(self._patches, self._before, strict=True):
            now, counted = self._label(x, valid)
            counts.append(
                self._count(
                    before.to(now.device, non_blocking=True),
                    now,
                    counted,
                    valid.to(now.device, non_blocking=True),
                )
            )
            counts[-1] |= self._compare(*self._follow(x, valid, now))
            labels.append(_kept(now))
        self._before = labels
        total = {name: torch.stack([c[name] for c in counts]).sum(0) for name in counts[0]}
        shares = {
            "changed": total["changed"] / total["foreground"],
            "volume": total["volume"] / total["voxels"],
            "coverage": total["sure"] / total["volume"],
            "agreement": 2 * total["both"] / total["either"],  # NaN for 0 / 0
        }
        return {name: share.tolist() for name, share in shares.items()}

    def _count(
        self, before: Tensor, now: Tensor, counted: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        """Return numbers of voxels of some patches, on their device."""
        foreground = (before.bool().any(1, True) | now.bool().any(1, True)) & valid
        sure = counted.bool() & valid
        return {
            "changed": ((before != now).any(1, True) & valid).sum(),
            "foreground": foreground.sum(),
            "voxels": valid.sum(),
            "volume": self._sizes(now, valid),
            "sure": self._sizes(now, sure),
        }

    def _compare(self, student: Tensor, teacher: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return for each class the voxels that both networks call so, and the sum of both."""
        either = self._sizes(student, valid) + self._sizes(teacher, valid)
        if self._regions:
            return {"both": self._sizes(student & teacher, valid), "either": either}
        return {"both": self._sizes(student, valid & (student == teacher)), "either": either}

    def _sizes(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Return the valid voxels of each foreground class or region, (K,) int64."""
        if self._regions:
            return (labels & valid).transpose(0, 1).flatten(1).sum(1)
        return torch.stack([((labels == k) & valid).sum() for k in range(1, self._classes + 1)])


def _kept(labels: Tensor) -> Tensor:
    """Return labels on the host, small."""
    return labels.cpu() if labels.dtype == torch.bool else labels.to(torch.int16).cpu()


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
