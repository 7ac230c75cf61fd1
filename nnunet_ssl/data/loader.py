"""The two-stream loader: labelled and unlabelled patches from one worker pool."""

import csv
import math
from collections.abc import Mapping, Sequence
from multiprocessing import Value
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_ssl.data.foreground import ForegroundPlaces, Places
from nnunet_ssl.data.views import Pipeline
from nnunet_ssl.errors import UserError

CASE_TABLE = "cases.csv"  # in the preprocessed data set folder
META = {
    "case": "index of the case in the sorted list of its stream, int64 (B,)",
    "position": "centre of the patch in its case, each axis in [0, 1], float32 (B, 3); the first "
    "one in the direction of the scanner's axis, however a case is stored",
    "z_map": "position along the first axis, per voxel, in [0, 1], in the same direction, float32 "
    "(B, 1, *)",
}


class PatchLoader(nnUNetDataLoader):
    """nnU-Net's loader for one stream; it also tells padding, forced foreground, views and meta.

    Args:
        data: the cases; for the unlabelled stream an `UnlabeledDataset`.
        batch_size: patches a batch.
        initial_patch_size: size cut from the case, before the spatial transforms, in voxels.
        patch_size: size that the network gets, in voxels.
        label_manager: nnU-Net's.
        pipeline: the transforms of this stream.
        oversample_foreground_percent: share of patches with forced foreground.
        probabilistic_oversampling: as in nnU-Net.
        meta: names from `META`, or columns of `table`.
        table: case -> column -> value, for further columns.
        slice_axis: axis of the stored image that became the first one (`transpose_forward[0]`).
        places: where foreground is in unlabelled cases. As soon as it tells some, each patch is
            with probability `oversample_foreground_percent` one around such a place: of a random
            one of these cases, a random one of its classes, a random voxel.
    """

    def __init__(
        self,
        data: nnUNetBaseDataset,
        batch_size: int,
        initial_patch_size: Sequence[int],
        patch_size: Sequence[int],
        label_manager: LabelManager,
        pipeline: Pipeline,
        oversample_foreground_percent: float = 0.0,
        probabilistic_oversampling: bool = False,
        meta: Sequence[str] = (),
        table: Mapping[str, Mapping[str, float]] | None = None,
        slice_axis: int = 0,
        places: ForegroundPlaces | None = None,
    ):
        super().__init__(
            data,
            batch_size,
            initial_patch_size,
            patch_size,
            label_manager,
            oversample_foreground_percent=oversample_foreground_percent,
            probabilistic_oversampling=probabilistic_oversampling,
            transforms=self._transform,
        )
        self.indices = np.array(data.identifiers)  # a list would be converted in each draw
        self.pipeline = pipeline
        self.meta = tuple(meta)
        self.table = table or {}
        self.slice_axis = slice_axis
        self._backwards: dict[str, bool] = {}
        if not pipeline.labeled:
            self.has_ignore = False  # there is no annotated region to look for
        self._fixed_keys: np.ndarray | None = None
        self.places = places
        self._known: Places = {}  # of this batch
        self._guided = np.zeros(batch_size, bool)
        if places is not None:
            self.get_do_oversample = self._is_guided
        self._samples: list[dict[str, Any]] = []
        self._forced: list[bool] = []

    def get_indices(self) -> np.ndarray:
        """Return the case ids of the next batch."""
        if self._fixed_keys is not None:
            return self._fixed_keys
        keys = super().get_indices()
        if self.places is not None:
            self._known = self.places.now()
        if self._known:
            self._guided = np.random.uniform(size=len(keys)) < self.oversample_foreground_percent
            # Deviates: nnU-Net keeps the case; of a large pool few have been searched
            keys[self._guided] = np.random.choice(sorted(self._known), self._guided.sum())
        self._drawn_keys = keys
        return keys

    def _is_guided(self, sample: int) -> bool:
        return bool(self._guided[sample])

    def get_bbox(self, data_shape, force_fg, class_locations, **kwargs):  # noqa: D102
        if self.places is not None:
            class_locations = self._known.get(self._drawn_keys[len(self._forced)])
        lower, upper = super().get_bbox(data_shape, force_fg, class_locations, **kwargs)
        self._forced.append(bool(force_fg))
        self._box = (np.array(lower), np.array(upper), np.array(data_shape))
        return lower, upper

    def _transform(self, image: Tensor, segmentation: Tensor) -> dict:
        sample, extra = self.pipeline(
            image, segmentation, self._z_map(image) if "z_map" in self.meta else None
        )
        lower, upper, shape = self._box
        extra["position"] = torch.as_tensor((lower + upper) / 2 / shape, dtype=torch.float32)
        self._samples.append(extra)
        return sample

    def _z_map(self, image: Tensor) -> Tensor:
        lower, upper, shape = self._box
        z = (torch.arange(lower[0], upper[0], dtype=torch.float32) + 0.5) / float(shape[0])
        if self.patch_size_was_2d:
            return z.expand(1, *image.shape[1:]).clone()
        return z.view(1, -1, 1, 1).expand(1, *image.shape[1:]).clone()

    def generate_train_batch(self) -> dict[str, Any]:
        """Return nnU-Net's batch with "valid", "forced_fg", "views" and "meta" added."""
        batch = self._draw()
        if "second" in self.pipeline.views:
            self._fixed_keys = batch["keys"]
            second = self._draw()
            batch["views"] |= {"second": second["data"], "second_valid": second["valid"]}
            self._fixed_keys = None
        return batch

    def _draw(self) -> dict[str, Any]:
        self._samples, self._forced = [], []
        batch = super().generate_train_batch()
        samples = self._samples
        batch["valid"] = torch.stack([s["valid"] for s in samples])
        batch["forced_fg"] = torch.tensor(self._forced)
        batch["views"] = {
            name: torch.stack([s[name] for s in samples])
            for name in self.pipeline.views
            if name != "second"
        }
        batch["meta"] = {name: self._meta(name, batch["keys"], samples) for name in self.meta}
        return batch

    def _meta(self, name: str, keys: Sequence[str], samples: list[dict[str, Any]]) -> Tensor:
        if name in ("position", "z_map"):
            values = torch.stack([s[name] for s in samples])
            turned = [i for i, key in enumerate(keys) if self._is_backwards(key)]
            along = values[:, :1]  # the first axis, or the map itself
            along[turned] = 1 - along[turned]
            return values
        if name == "case":
            return torch.as_tensor(np.searchsorted(self.indices, keys))
        return torch.tensor([self.table[k][name] for k in keys], dtype=torch.float32)

    def _is_backwards(self, case: str) -> bool:
        if case not in self._backwards:
            *_, properties = self._data.load_case(case)
            self._backwards[case] = runs_backwards(properties, self.slice_axis)
        return self._backwards[case]


def runs_backwards(properties: Mapping[str, Any], axis: int) -> bool:
    """Tell whether an axis of the stored image runs against the scanner's axis.

    Args:
        properties: what nnU-Net's reader tells of a case. A direction that it does not tell, or has
            turned into a common one, does not run backwards.
        axis: of the array as it was read.
    """
    geometry: Any = properties.get("sitk_stuff", {}).get("direction", ())
    if len(geometry) != 9:
        stuff = properties.get("nibabel_stuff", {})
        if "original_affine" not in stuff or "reoriented_affine" in stuff:
            return False
        geometry = stuff["original_affine"][:3, :3]
    along = np.reshape(geometry, (3, 3))[:, 2 - axis]  # images count their axes the other way
    return bool(along[np.abs(along).argmax()] < 0)


class TwoStreamLoader:
    """Labelled patches, with unlabelled ones beside them once `active` is set.

    Args:
        labeled: loader of the labelled stream.
        unlabeled: loader of the unlabelled stream; None for methods that use none.
        active: shared flag; worker processes see it change.
    """

    def __init__(
        self, labeled: PatchLoader, unlabeled: PatchLoader | None = None, active: Any = None
    ):
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.active = active if active is not None else Value("b", unlabeled is not None)

    def __iter__(self) -> "TwoStreamLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self.labeled)
        if self.unlabeled is not None and self.active.value:
            batch["unlabeled"] = next(self.unlabeled)
            del batch["unlabeled"]["target"]  # the padding mask, told by "valid"
        return batch

    def set_thread_id(self, thread_id: int) -> None:
        """Tell both streams which worker they run in."""
        self.labeled.set_thread_id(thread_id)
        if self.unlabeled is not None:
            self.unlabeled.set_thread_id(thread_id)


def read_case_table(
    path: Path, columns: Sequence[str], cases: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Read numbers per case from a CSV file with a column `case`.

    Raises:
        UserError: no such file, a column or case is missing, or a value is not a number.
    """
    table: dict[str, dict[str, float]] = {}
    for case, row in _read_rows(path, columns, cases).items():
        try:
            values = {c: float(row[c]) for c in columns}
        except (TypeError, ValueError):
            values = {}
        if not values or not all(map(math.isfinite, values.values())):
            raise UserError(
                f"{path}, case {case!r}: columns {', '.join(columns)} must hold numbers."
            )
        table[case] = values
    return table


def read_case_labels(
    path: Path, columns: Sequence[str], cases: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Read labels per case from a CSV file with a column `case`; any text is a label.

    Returns:
        case -> column -> whole number, equal for equal texts of a column: 0, 1, ... in the order of
        the texts, -1 where the cell is empty.

    Raises:
        UserError: no such file, or a column or case is missing.
    """
    rows = _read_rows(path, columns, cases)
    texts = {case: {c: (row[c] or "").strip() for c in columns} for case, row in rows.items()}
    codes = {c: sorted({text[c] for text in texts.values()} - {""}) for c in columns}
    return {
        case: {c: float(codes[c].index(text[c]) if text[c] else -1) for c in columns}
        for case, text in texts.items()
    }


def has_column(path: Path, column: str) -> bool:
    """Tell whether a CSV file exists and has this column."""
    return path.is_file() and column in (read_csv(path).fieldnames or [])


def read_csv(path: Path) -> csv.DictReader:
    """Return a reader of a CSV file.

    Raises:
        UserError: it is no UTF-8 text.
    """
    try:  # with or without a byte order mark
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text. Save it as CSV in UTF-8.") from error
    return csv.DictReader(lines)


def _read_rows(
    path: Path, columns: Sequence[str], cases: Sequence[str]
) -> dict[str, dict[str, Any]]:
    if not columns:
        return {}
    if not path.is_file():
        raise UserError(f"{path} is missing. Write it with the columns case, {', '.join(columns)}.")
    reader = read_csv(path)
    found = reader.fieldnames or []
    rows: dict[Any, dict[str, Any]] = {row.get("case"): row for row in reader}
    missing = [c for c in ("case", *columns) if c not in found]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}, only {', '.join(found)}. Add it; columns are "
            f"separated by commas."
        )
    for case in cases:
        if case not in rows:
            raise UserError(f"{path} has no row for case {case!r}. Add it.")
    return {case: rows[case] for case in cases}
