"""The raw data set: which scans there are, and whether each can be used."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.errors import MAX_LISTED, UserError
from nnunet_ssl.io import check_complete, environment_folder, has_nonfinite_nifti, silence
from nnunet_ssl.planning.workers import Workers


def list_cases(folder: Path, file_ending: str, num_channels: int) -> dict[str, list[Path]]:
    """List the scans of a folder.

    Args:
        folder: imagesTr or imagesUn.
        file_ending: as in dataset.json, with the dot.
        num_channels: files per case, `<case>_0000` to `<case>_000N`.

    Returns:
        Case name -> its files in channel order; sorted by name. Hidden files do not count, nor do
        `.json` files (spacings of TIFF images).

    Raises:
        UserError: folder missing or empty, another file ending, a name without channel number, a
            channel missing or too many.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Put the scans there.")
    found: dict[str, set[int]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or path.is_dir() or name.endswith(".json"):
            continue
        if not name.endswith(file_ending):
            raise UserError(
                f"{path} does not end with {file_ending}, the file_ending in dataset.json. Convert "
                f"the file to {file_ending} or move it out of {folder.name}."
            )
        match = re.fullmatch(r"(.+)_(\d{4})", name.removesuffix(file_ending))
        if match is None:
            stem = name.removesuffix(file_ending)
            raise UserError(
                f"{path} has no channel number. Rename it to {stem}_0000{file_ending} (channel 0)."
            )
        found.setdefault(match[1], set()).add(int(match[2]))
    if not found:
        raise UserError(f"{folder} is empty. Put scans named <case>_0000{file_ending} there.")
    for case, channels in found.items():
        for missing in sorted(set(range(num_channels)) - channels):
            raise UserError(
                f"{folder / f'{case}_{missing:04d}{file_ending}'} is missing: each case needs "
                f"{num_channels} channel(s), as in dataset.json. Add the file or remove the case."
            )
        for extra in sorted(channels - set(range(num_channels))):
            raise UserError(
                f"{folder / f'{case}_{extra:04d}{file_ending}'} is one channel too many: "
                f"dataset.json names {num_channels} channel(s). Remove the file."
            )
    return {
        case: [folder / f"{case}_{i:04d}{file_ending}" for i in range(num_channels)]
        for case in sorted(found)
    }


@dataclass
class RawDataset:
    """A data set below nnUNet_raw.

    Attributes:
        folder: `<nnUNet_raw>/DatasetXXX_NAME`.
        dataset_json: content of its dataset.json.
        labeled: case -> image files, of the annotated cases.
        masks: case -> mask file, same keys.
        unlabeled: case -> image files, of imagesUn; empty if not asked for.
    """

    folder: Path
    dataset_json: dict
    labeled: dict[str, list[Path]]
    masks: dict[str, Path]
    unlabeled: dict[str, list[Path]]

    @property
    def num_channels(self) -> int:
        """Channels that dataset.json names."""
        return len(_channel_names(self.dataset_json))

    @property
    def file_ending(self) -> str:
        """File ending that dataset.json names."""
        return self.dataset_json["file_ending"]

    def reader_writer(self) -> type[BaseReaderWriter]:
        """Return the class with which nnU-Net reads this data set.

        Raises:
            UserError: none of its readers opens the first annotated image.
        """
        example = str(next(iter(self.labeled.values()))[0])
        try:
            with silence():
                return determine_reader_writer_from_dataset_json(self.dataset_json, example)
        except RuntimeError as error:
            raise UserError(
                f"Cannot read {example}: no reader of nnU-Net opens it as {self.file_ending}. The "
                f"file is damaged or cut short; copy or export it again."
            ) from error


def find_raw_dataset(dataset_id: int) -> Path:
    """Return `<nnUNet_raw>/DatasetXXX_NAME` of an id.

    Raises:
        UserError: nnUNet_raw unset, no folder of that id, or several.
    """
    raw = environment_folder("nnUNet_raw")
    pattern = f"Dataset{dataset_id:03d}_*"
    found = sorted(p for p in raw.glob(pattern) if p.is_dir())
    if not found:
        present = ", ".join(sorted(p.name for p in raw.glob("Dataset*"))[:MAX_LISTED]) or "none"
        raise UserError(
            f"No data set with id {dataset_id}: {raw / pattern} does not exist. Check -d and "
            f"nnUNet_raw. Data sets there: {present}."
        )
    names = {p.name for p in found}
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        if os.environ.get(variable):
            names |= {p.name for p in Path(os.environ[variable]).glob(pattern) if p.is_dir()}
    if len(names) > 1:
        raise UserError(
            f"Id {dataset_id} has several names: {', '.join(sorted(names))} (in nnUNet_raw, "
            f"nnUNet_preprocessed or nnUNet_results). Rename or remove all but one."
        )
    return found[0]


def read_raw_dataset(source: int | Path, unlabeled: bool = True) -> RawDataset:
    """Read the file lists of a data set and check them; no image is opened.

    Args:
        source: data set id, or the folder itself.
        unlabeled: require and list imagesUn.

    Raises:
        UserError: whatever is missing or does not fit; the message names the file.
    """
    folder = find_raw_dataset(source) if isinstance(source, int) else Path(source)
    dataset_json = _read_dataset_json(folder)
    ending, num_channels = dataset_json["file_ending"], len(_channel_names(dataset_json))

    if "dataset" in dataset_json:
        listed = get_filenames_of_train_images_and_targets(
            str(folder), json.loads(json.dumps(dataset_json))
        )
        labeled = {k: [Path(p) for p in v["images"]] for k, v in listed.items()}
        masks = {k: Path(v["label"]) for k, v in listed.items()}
        for path in (p for paths in labeled.values() for p in paths):
            if not path.is_file():
                raise UserError(f"{path} is missing, but {folder / 'dataset.json'} lists it.")
    else:
        # one file may hold all channels (RGB, 4D): then the annotated cases show it
        if num_channels > 1 and not _has_second_channel(folder / "imagesTr"):
            num_channels = 1
        labeled = list_cases(folder / "imagesTr", ending, num_channels)
        masks = {case: folder / "labelsTr" / f"{case}{ending}" for case in labeled}
    if not labeled:
        raise UserError(f"{folder / 'dataset.json'} lists no annotated case under 'dataset'.")
    for case, mask in masks.items():
        if not mask.is_file():
            raise UserError(
                f"{mask} is missing. Add the mask of {case}, or move its images to "
                f"{folder / 'imagesUn'}."
            )
    scans = _list_unlabeled(folder, ending, num_channels) if unlabeled else {}
    for case in sorted(set(labeled) & set(scans)):
        raise UserError(
            f"Case {case} is in imagesTr and in imagesUn ({scans[case][0]}). Remove or rename one."
        )
    return RawDataset(folder, dataset_json, labeled, masks, scans)


def _list_unlabeled(folder: Path, ending: str, num_channels: int) -> dict[str, list[Path]]:
    images = folder / "imagesUn"
    has_files = images.is_dir() and any(not p.name.startswith(".") for p in images.iterdir())
    if not has_files:
        state = "is empty" if images.is_dir() else "does not exist"
        raise UserError(
            f"{images} {state}. Put scans without masks there, named like those of imagesTr: "
            f"<case>_0000{ending}"
        )
    return list_cases(images, ending, num_channels)


def _has_second_channel(folder: Path) -> bool:
    return any(glob.iglob(os.path.join(glob.escape(str(folder)), "*_0001.*")))


def _channel_names(dataset_json: dict) -> dict:
    return dataset_json.get("channel_names") or dataset_json.get("modality") or {}


def _read_dataset_json(folder: Path) -> dict:
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing. nnU-Net's documentation (dataset_format.md) tells what is in it."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Correct the file.") from error
    missing = [k for k in ("labels", "numTraining", "file_ending") if k not in content]
    if not _channel_names(content):
        missing.append("channel_names")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. Add what is missing.")
    return content


@dataclass(frozen=True)
class CaseInfo:
    """What planning needs to know of one case.

    Attributes:
        content: sha256 over shape and decoded float32 voxels of all channels.
        shape_after_crop: spatial shape of the non-zero region, in voxels.
        spacing: mm, in the order of the shape.
        relative_size: voxels after cropping / before, in (0, 1].
        is_2d: the image is one slice.
    """

    content: str
    shape_after_crop: tuple[int, ...]
    spacing: tuple[float, ...]
    relative_size: float
    is_2d: bool


def inspect_case(
    paths: Sequence[Path],
    reader_writer_class: type[BaseReaderWriter],
    num_channels: int,
    mask: Path | None = None,
    labels: Sequence[int] = (),
) -> CaseInfo:
    """Read one case and check it.

    Args:
        paths: image files in channel order.
        reader_writer_class: nnU-Net's reader.
        num_channels: channels that all files together must hold.
        mask: mask to check against the image, if any.
        labels: values that the mask may hold.

    Raises:
        UserError: unreadable or cut short; NaN or infinite values; channels that differ in shape
            or spacing; a mask of another shape or spacing or with unknown values.
    """
    arrays: list[np.ndarray] = []
    first_spacing: list[float] = []
    for path in paths:  # one by one, to name the file at fault
        array, spacing = _read(path, reader_writer_class)
        if not np.isfinite(array).all() or has_nonfinite_nifti(path):
            raise UserError(f"{path} holds NaN or infinite values. Replace them, e.g. by 0.")
        if arrays:
            _check_geometry(path, array, spacing, paths[0], arrays[0], first_spacing)
        else:
            first_spacing = spacing
        arrays.append(array)
    image = np.concatenate(arrays)
    del arrays
    if len(image) != num_channels:
        raise UserError(
            f"{paths[0]} and its channels hold {len(image)} channel(s), dataset.json names "
            f"{num_channels}. Add the missing files (_0001, ...) or correct channel_names."
        )
    if mask is not None:
        array, spacing = _read(mask, reader_writer_class)
        _check_geometry(mask, array[:1], spacing, paths[0], image[:1], first_spacing)
        unknown = sorted(set(np.unique(array).tolist()) - set(labels))
        if unknown:
            raise UserError(
                f"{mask} holds values {unknown[:MAX_LISTED]} that dataset.json does not name under "
                f"labels. Correct the mask or add the labels."
            )
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    cropped = crop_to_nonzero(image)[0].shape[1:]
    return CaseInfo(
        content=digest.hexdigest(),
        shape_after_crop=tuple(int(i) for i in cropped),
        spacing=tuple(float(i) for i in first_spacing),
        relative_size=float(np.prod(cropped) / np.prod(image.shape[1:])),
        is_2d=image.shape[1] == 1,
    )


def _read(path: Path, reader_writer_class: type[BaseReaderWriter]) -> tuple[np.ndarray, list]:
    try:
        check_complete(path)
        with silence():
            array, properties = reader_writer_class().read_images([str(path)])
    except MemoryError:
        raise
    except Exception as error:  # every reader library has its own errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"Cannot read {path}: {reason}. The file is missing, damaged or cut short; copy or "
            f"export it again."
        ) from error
    return array.astype(np.float32, copy=False), list(properties["spacing"])


def _check_geometry(
    path: Path, array: np.ndarray, spacing: list, other: Path, expected: np.ndarray, wanted: list
) -> None:
    if array.shape != expected.shape:
        raise UserError(
            f"{path} has shape {array.shape[1:]}, but {other} has {expected.shape[1:]}. Resample "
            f"one of them to the grid of the other."
        )
    if not np.allclose(spacing, wanted):
        raise UserError(
            f"{path} has spacing {_mm(spacing)}, but {other} has {_mm(wanted)}. Correct the header "
            f"or resample one of them."
        )


def _mm(spacing: Iterable[float]) -> str:
    return "(" + ", ".join(f"{s:g}" for s in spacing) + ") mm"


def inspect_dataset(
    raw: RawDataset, workers: Workers, check_masks: bool = True
) -> tuple[dict[str, CaseInfo], dict[str, CaseInfo]]:
    """Inspect every case, annotated ones first.

    Returns:
        Case -> info, of the annotated cases and of those without masks.

    Raises:
        UserError: one message for all bad cases; or a scan is in both folders under two names.
    """
    reader = raw.reader_writer()
    labels = _mask_values(raw)
    jobs = [
        (paths, reader, raw.num_channels, raw.masks[case] if check_masks else None, labels)
        for case, paths in raw.labeled.items()
    ] + [(paths, reader, raw.num_channels) for paths in raw.unlabeled.values()]
    names = [*raw.labeled, *raw.unlabeled]
    paths_of = raw.labeled | raw.unlabeled
    results = workers.map(_inspect, jobs, "Checking scans")

    problems = [r for r in results if isinstance(r, str)]
    infos = {c: r for c, r in zip(names, results, strict=True) if isinstance(r, CaseInfo)}
    if infos:
        first = next(iter(infos))
        kind = {True: "2D", False: "3D"}
        problems += [
            f"{paths_of[case][0]} is {kind[info.is_2d]}, but the first annotated case, {first}, is "
            f"{kind[infos[first].is_2d]}. Move it to a data set of its own."
            for case, info in infos.items()
            if info.is_2d != infos[first].is_2d
        ]
    by_content = {infos[c].content: c for c in raw.labeled if c in infos}
    problems += [
        f"{raw.unlabeled[case][0]} holds the same image as {raw.labeled[twin][0]}. Remove one."
        for case in raw.unlabeled
        if case in infos and (twin := by_content.get(infos[case].content))
    ]
    if problems:
        shown = problems[:MAX_LISTED]
        if len(problems) > MAX_LISTED:
            shown.append(f"and {len(problems) - MAX_LISTED} more.")
        raise UserError("\n".join(shown))
    return {c: infos[c] for c in raw.labeled}, {c: infos[c] for c in raw.unlabeled}


def _inspect(*args) -> CaseInfo | str:
    try:
        return inspect_case(*args)
    except UserError as error:
        return str(error)


def _mask_values(raw: RawDataset) -> list[int]:
    manager = LabelManager(raw.dataset_json["labels"], raw.dataset_json.get("regions_class_order"))
    values = [int(i) for i in manager.all_labels]
    return values + ([int(manager.ignore_label)] if manager.has_ignore_label else [])
