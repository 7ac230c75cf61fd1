"""Where the teacher sees foreground in scans without masks, so that patches can be drawn there."""

import itertools
import math
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor
from tqdm import tqdm

from nnunet_ssl.data.unlabeled import UnlabeledDataset
from nnunet_ssl.io import atomic_path

MOST_CASES = 200  # of one search
MOST_VOXELS = 1000  # kept per class and case
FILE_NAME = "unlabeled_foreground_{}.npz"

Places = dict[str, dict[int, np.ndarray]]


class ForegroundPlaces:
    """What the last search found; worker processes of a loader see each new search.

    Args:
        folder: holds a file a search, so that a training that goes on an epoch earlier finds the
            search before.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._number = RawValue("i", 0)  # shared between processes, written by one
        self._read = 0
        self._places: Places = {}

    @property
    def number(self) -> int:
        """How many searches there were; 0 before the first one."""
        return self._number.value

    @number.setter
    def number(self, number: int) -> None:
        self._number.value = number

    def path(self, number: int) -> Path:
        """Return the file of a search, counted from 1."""
        return self.folder / FILE_NAME.format(number)

    def now(self) -> Places:
        """Return case -> class -> voxels, (N, 4) as nnU-Net's `class_locations`.

        Only cases in which something was found; empty before the first search.
        """
        number = self.number
        if number != self._read:
            self._places = read_places(self.path(number)) if number else {}
            self._read = number
        return self._places


def write_places(places: Places, path: Path) -> None:
    """Write the places of a search atomically."""
    blocks = [(c, label, v) for c, found in sorted(places.items()) for label, v in found.items()]
    with atomic_path(path) as part, open(part, "wb") as f:
        np.savez_compressed(
            f,
            case=np.array([case for case, *_ in blocks], np.str_),
            label=np.array([label for _, label, _ in blocks], np.int32),
            end=np.cumsum([len(v) for *_, v in blocks], dtype=np.int64),
            voxel=np.concatenate([np.empty((0, 4), np.int32), *(v for *_, v in blocks)]),
        )


def read_places(path: Path) -> Places:
    """Read what `write_places` wrote."""
    with np.load(path) as saved:
        case, label, end, voxel = (saved[name] for name in ("case", "label", "end", "voxel"))
    places: Places = {}
    # without any block, split still gives an empty one
    for name, k, voxels in zip(case, label, np.split(voxel, end[:-1]), strict=False):
        places.setdefault(str(name), {})[int(k)] = voxels
    return places


def places_of(
    labels: Tensor, num_classes: int, regions: bool, rng: np.random.Generator
) -> dict[int, np.ndarray]:
    """Return class -> some of its voxels, at most `MOST_VOXELS`, in random order.

    Args:
        labels: of a whole case, (1, *) integers, or (R, *) bool for regions.
        num_classes: classes with background, or regions.
        regions: the channels of `labels` are regions; they are counted from 1.
        rng: draws the voxels.

    Returns:
        (N, 4) int32 arrays, 0 before the three coordinates; no entry for a class without voxels.
    """
    found = {}
    for k in range(1, num_classes + regions):
        voxels = (labels[k - 1] if regions else labels[0] == k).flatten().nonzero()[:, 0]
        if len(voxels):
            some = rng.choice(len(voxels), min(MOST_VOXELS, len(voxels)), replace=False)
            flat = voxels.cpu().numpy()[some]
            where = np.unravel_index(flat, labels.shape[1:])
            found[k] = np.stack([np.zeros_like(flat), *where], 1).astype(np.int32)
    return found


def search(
    cases: UnlabeledDataset,
    decide: Callable[[Tensor], Tensor],
    patch_size: Sequence[int],
    batch_size: int,
    passes: int,
    num_classes: int,
    regions: bool,
    rng: np.random.Generator,
    process: tuple[int, int] = (0, 1),
) -> Places:
    """Segment random cases and return where foreground is.

    Args:
        cases: preprocessed scans.
        decide: patches (B, C, *) -> (B, 1, *) labels, or (B, R, *) bool for regions.
        patch_size: of the network, in voxels; two numbers if it sees slices.
        batch_size: B.
        passes: patches that may be segmented; at least one case is.
        num_classes: classes with background, or regions.
        regions: `decide` returns regions.
        rng: chooses cases and voxels, the same in all processes.
        process: this one's number, and how many share the work.

    Returns:
        One entry a case of this process; an empty one where nothing was seen.
    """
    number, processes = process
    order = [str(case) for case in rng.permutation(cases.identifiers)[:MOST_CASES]]
    found: Places = {}
    for case in tqdm(order[number::processes], "looking for foreground", disable=number > 0):
        data, padding, *_ = cases.load_case(case)
        passes -= tiles(data.shape[1:], patch_size)
        if found and passes < 0:
            break
        labels = segment(torch.from_numpy(data[:]), decide, patch_size, batch_size)
        inside = torch.from_numpy(padding[:] != -1)
        found[case] = places_of(labels * inside, num_classes, regions, rng)
    return found


def segment(
    data: Tensor, decide: Callable[[Tensor], Tensor], patch_size: Sequence[int], batch_size: int
) -> Tensor:
    """Return the decisions for a whole case, patch by patch, on the CPU.

    Patches lie side by side and overlap only where they do not fit; no logits are kept.

    Args:
        data: (C, z, y, x).
        decide: patches (B, C, *) -> (B, 1, *) labels, or (B, R, *) bool.
        patch_size: of three axes, or of two: slices, then.
        batch_size: B, of each pass.

    Returns:
        (1, z, y, x) int16, or (R, z, y, x) bool.
    """
    flat = len(patch_size) == 2
    patch = (1, *patch_size) if flat else tuple(patch_size)
    size = data.shape[1:]
    padded = F.pad(
        data, [v for p, n in zip(patch, size, strict=True) for v in (max(p - n, 0), 0)][::-1]
    )
    boxes = [
        (slice(None), *(slice(i, i + p) for i, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(
            *compute_steps_for_sliding_window(padded.shape[1:], patch, 1)
        )
    ]
    parts = []
    for i in range(0, len(boxes), batch_size):
        part = boxes[i : i + batch_size]
        filled = part + part[-1:] * (batch_size - len(part))  # a compiled network sees one shape
        x = torch.stack([padded[box] for box in filled])
        decided = decide(x[:, :, 0] if flat else x)[: len(part)].cpu()
        parts.append(decided if decided.dtype == torch.bool else decided.to(torch.int16))
    decisions = torch.cat(parts)
    labels = decisions.new_zeros(decisions.shape[1], *padded.shape[1:])
    for box, decided in zip(boxes, decisions, strict=True):
        labels[box] = decided[:, None] if flat else decided
    return labels[:, : size[0], : size[1], : size[2]]


def tiles(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Return how many patches `segment` takes for an image; slice by slice for 2D ones."""
    patch = (1,) * (len(shape) - len(patch_size)) + tuple(patch_size)
    return math.prod(math.ceil(n / p) for n, p in zip(shape, patch, strict=True))
