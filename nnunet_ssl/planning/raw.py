"""The raw data set: which scans there are, and whether each can be used."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ssl.errors import MAX_LISTED, UserError
from nnunet_ssl.io import check_complete, environment_folder, has_nonfinite_nifti, silence
from nnunet_ssl.planning.workers import Workers

TOLERANCE = 0.1  # voxel; how far apart two headers may place one voxel by rounding
TURN_MASK = (
    "nnU-Net would train on a mirrored or turned mask. `nnunet_ssl convert folder` turns masks. If "
    "the voxels fit as they are and only the header is wrong, copy that of the image (SimpleITK: "
    "mask.CopyInformation(image))."
)
TURN_CHANNEL = (
    "nnU-Net would mix up their voxels. Turn one of them (SimpleITK: DICOMOrient), or copy the "
    "header of the other if only that is wrong."
)
MEND_DIRECTION = (
    "its direction matrix (sform/qform) is not orthonormal, so SimpleITK refuses it; the voxels "
    "are intact. Mend the header with nibabel: image.set_qform(image.affine), "
    "image.set_sform(image.get_qform()), and save it under a new name. A scan that is really "
    "sheared (tilted gantry) must be resampled"
)


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
            case name that ends with `_seg`, a channel missing or too many.
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
        _check_case_name(match[1], path)
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


def _check_case_name(case: str, path: Path) -> None:
    if case.endswith("_seg"):
        raise UserError(
            f"{path} names the case {case}, but nnU-Net keeps the preprocessed mask of a case X as "
            f"X_seg. Rename the case with all its files, e.g. to {case.removesuffix('_seg')}-seg."
        )


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
        for case in labeled:
            _check_case_name(case, folder / "dataset.json")
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
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object ({{...}}). Correct the file.")
    missing = [k for k in ("labels", "numTraining", "file_ending") if k not in content]
    if not _channel_names(content):
        missing.append("channel_names")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. Add what is missing.")
    channels = _channel_names(content)
    if not isinstance(channels, dict) or not all(isinstance(c, str) for c in channels.values()):
        key = "channel_names" if content.get("channel_names") else "modality"
        raise UserError(
            f"{path}: {key} is {json.dumps(channels)}. Write number and name of each channel: "
            f'{{"0": "T1", "1": "T2"}}'
        )
    _check_labels(path, content)
    return content


def _check_labels(path: Path, content: Mapping[str, Any]) -> None:
    """Apply the rules of nnU-Net's LabelManager and verify_dataset_integrity.

    Raises:
        UserError: names `path`, the key and the fix.
    """
    labels = content["labels"]
    if not isinstance(labels, dict) or "background" not in labels:
        raise UserError(
            f'{path}: labels does not name "background". Write names before values, and background '
            f'is 0: {{"background": 0, "liver": 1}}'
        )
    counted = {name: value for name, value in labels.items() if name != "ignore"}
    try:
        values = LabelManager(counted, content.get("regions_class_order")).all_labels
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: nnU-Net refuses labels or regions_class_order: {str(error).rstrip('.!')}. "
            f"Correct them."
        ) from error
    values = [int(i) for i in values]
    if labels.get("ignore") is not None:
        values.append(labels["ignore"])
    if values != list(range(len(values))):
        raise UserError(
            f"{path}: labels has the values {values}, but nnU-Net needs consecutive ones from 0 "
            f"on, the highest for ignore if there is one. Renumber them here and in the masks; "
            f"`nnunet_ssl convert folder --labels NAME=VALUE ...` does both."
        )


@dataclass(frozen=True)
class CaseInfo:
    """What planning needs to know of one case.

    Attributes:
        content: sha256 over shape and decoded float32 voxels of all channels.
        shape_after_crop: spatial shape of the non-zero region, in voxels.
        spacing: mm, in the order of the shape.
        relative_size: voxels after cropping / before, in (0, 1].
        is_2d: the image is one slice.
        misplaced: a file whose header places the voxels elsewhere than that of the image, and how
            far; empty if there is none.
        empty_mask: the mask holds background alone.
    """

    content: str
    shape_after_crop: tuple[int, ...]
    spacing: tuple[float, ...]
    relative_size: float
    is_2d: bool
    misplaced: str = ""
    empty_mask: bool = False


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
        UserError: unreadable or cut short; NaN or infinite values; channels that differ in
            orientation, shape or spacing; a mask that does, or one with unknown values.
    """
    arrays: list[np.ndarray] = []
    first: dict[str, Any] = {}
    misplaced: list[str] = []
    for path in paths:  # one by one, to name the file at fault
        array, properties = _read(path, reader_writer_class)
        if not np.isfinite(array).all() or has_nonfinite_nifti(path):
            raise UserError(f"{path} holds NaN or infinite values. Replace them, e.g. by 0.")
        if arrays:
            misplaced += _check_geometry(
                path, array, properties, paths[0], arrays[0], first, TURN_CHANNEL
            )
        else:
            first = properties
        arrays.append(array)
    image = np.concatenate(arrays)
    del arrays
    if len(image) != num_channels:
        fix = "Add the missing files (_0001, ...)"
        if len(image) > num_channels:
            fix = "If a file is 4D or in colour, store each of its channels in a file of its own,"
        raise UserError(
            f"{paths[0]} and its channels hold {len(image)} channel(s), dataset.json names "
            f"{num_channels}. {fix} or correct channel_names."
        )
    if mask is not None:
        array, properties = _read(mask, reader_writer_class)
        misplaced += _check_geometry(
            mask, array[:1], properties, paths[0], image[:1], first, TURN_MASK
        )
        present = set(np.unique(array).tolist())
        unknown = sorted(present - set(labels))
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
        spacing=tuple(float(i) for i in first["spacing"]),
        relative_size=float(np.prod(cropped) / np.prod(image.shape[1:])),
        is_2d=image.shape[1] == 1,
        misplaced=misplaced[0] if misplaced else "",
        empty_mask=mask is not None and present == {0},
    )


def _read(
    path: Path, reader_writer_class: type[BaseReaderWriter]
) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        check_complete(path)
        with silence():
            array, properties = reader_writer_class().read_images([str(path)])
    except MemoryError:
        raise
    except Exception as error:  # every reader library has its own errors
        if "orthonormal" in str(error):
            raise UserError(f"Cannot read {path}: {MEND_DIRECTION}.") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"Cannot read {path}: {reason}. The file is missing, damaged or cut short; copy or "
            f"export it again."
        ) from error
    return array.astype(np.float32, copy=False), properties


def _check_geometry(
    path: Path,
    array: np.ndarray,
    properties: Mapping[str, Any],
    other: Path,
    expected: np.ndarray,
    wanted: Mapping[str, Any],
    fix: str,
) -> list[str]:
    """Compare a file with the first image file of its case.

    Returns:
        What to warn of: the headers place the voxels apart. Empty if they agree, or tell nothing.

    Raises:
        UserError: another orientation (`fix` tells what to do about it), shape or spacing.
    """
    ours, theirs = _affine(properties), _affine(wanted)
    if ours is not None and theirs is not None and _is_turned(ours, theirs):
        here, there = (_axis_codes(affine) for affine in (ours, theirs))
        raise UserError(
            f"{path} has its axes turned (orientation {here}) against {other} ({there}): {fix}"
        )
    if array.shape != expected.shape:
        raise UserError(
            f"{path} has shape {array.shape[1:]}, but {other} has {expected.shape[1:]}. Resample "
            f"one of them to the grid of the other."
        )
    if not np.allclose(properties["spacing"], wanted["spacing"]):
        raise UserError(
            f"{path} has spacing {_mm(properties['spacing'])}, but {other} has "
            f"{_mm(wanted['spacing'])}. Correct the header or resample one of them."
        )
    if ours is None or theirs is None:
        return []
    ends = itertools.product(*((0, size - 1) for size in array.shape[:0:-1]), (1,))
    corners = np.array(list(ends), float).T
    apart = float(np.abs(np.linalg.solve(theirs, ours @ corners) - corners).max())
    return [f"{path} by {apart:.3g} voxels against {other}"] if apart > TOLERANCE else []


def _affine(properties: Mapping[str, Any]) -> np.ndarray | None:
    """Return the (4, 4) matrix from voxels (x, y, z) to mm (right, front, up).

    None where the reader tells none (PNG, TIFF) or the header makes no sense.
    """
    affine = np.eye(4)
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.array(stuff.get("reoriented_affine", stuff["original_affine"]), float)
    elif "sitk_stuff" in properties:
        spacing, origin, direction = (
            np.array(properties["sitk_stuff"][key]) for key in ("spacing", "origin", "direction")
        )
        used = min(len(spacing), 3)  # a fourth axis holds channels
        matrix = direction.reshape(len(spacing), -1) * spacing
        affine[:used, :used] = matrix[:used, :used]
        affine[:used, 3] = origin[:used]
        affine[:2] *= -1  # ITK counts to the left and to the back
    else:
        return None
    usable = np.isfinite(affine).all() and np.linalg.det(affine[:3, :3]) != 0
    return affine if usable else None


def _is_turned(affine: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether an axis runs nearest to another one of the other grid, or against its own."""
    ours, theirs = (a[:3, :3] / np.linalg.norm(a[:3, :3], axis=0) for a in (affine, other))
    cosines = theirs.T @ ours
    nearest = np.abs(cosines).argmax(axis=0)
    return bool((nearest != np.arange(3)).any() or (np.diag(cosines) <= 0).any())


def _axis_codes(affine: np.ndarray) -> str:
    import nibabel

    return "".join(map(str, nibabel.aff2axcodes(affine)))


def _mm(spacing: Iterable[float]) -> str:
    return "(" + ", ".join(f"{s:g}" for s in spacing) + ") mm"


def inspect_dataset(
    raw: RawDataset, workers: Workers, check_masks: bool = True
) -> tuple[dict[str, CaseInfo], dict[str, CaseInfo]]:
    """Inspect every case, annotated ones first.

    Headers that place the files of a case apart (another origin, a small rotation) give a warning.

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
    misplaced = [info.misplaced for info in infos.values() if info.misplaced]
    if misplaced:
        print(
            f"WARNING: In {len(misplaced)} case(s) the headers place mask and image, or two "
            f"channels, apart, e.g. {misplaced[0]}. Voxels are taken as they are stored: look at "
            f"some with nnUNetv2_plot_overlay_pngs, and correct the headers or the files."
        )
    empty = [case for case, info in infos.items() if info.empty_mask]
    if empty:
        print(
            f"WARNING: {len(empty)} of {len(raw.labeled)} masks mark nothing: "
            f"{', '.join(empty[:MAX_LISTED])}{', ...' if len(empty) > MAX_LISTED else ''}. They "
            f"teach that nothing is there. If they were only not drawn yet, move their images to "
            f"imagesUn."
        )
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
