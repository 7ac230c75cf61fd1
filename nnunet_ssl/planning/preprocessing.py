"""Preprocess annotated cases and scans without masks with nnU-Net's preprocessor."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import (
    load_json,
    load_pickle,
    write_pickle,
)
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.appearance import Appearance, appearance, describe_unlike, unlike
from nnunet_ssl.data.unlabeled import (
    MANIFEST_FORMAT,
    manifest_path,
    preprocessing_key,
    unlabeled_folder,
)
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error, write_json
from nnunet_ssl.planning.raw import CaseInfo, RawDataset, silence
from nnunet_ssl.planning.workers import Workers

CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")  # .pkl moves last: a case with .pkl is complete
LOOK = "nnunet_ssl_appearance"  # key of the properties
PROBE_BYTES = 1 << 24  # more than any chunk that blosc2 writes at once


def preprocess_labeled(
    raw: RawDataset, base: Path, plans: dict, configuration: str, workers: Workers
) -> list[Appearance]:
    """Preprocess the annotated cases anew and copy their masks, as stock nnU-Net does.

    The folder appears when it is complete: training on fold `all` takes whatever lies there.

    Returns:
        How the annotated cases look.

    Raises:
        UserError: disk full or a worker died; the former folder is unchanged.
    """
    folder = base / _data_identifier(plans, configuration)
    part = base / f".{folder.name}.part"
    with _removed_afterwards(part), explained(base):
        part.mkdir()
        jobs = [
            (part / case, paths, raw.masks[case], plans, configuration, raw.dataset_json)
            for case, paths in raw.labeled.items()
        ]
        looks = workers.map(preprocess_labeled_case, jobs, f"{configuration}, annotated")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)

        masks = base / "gt_segmentations"
        masks.mkdir(exist_ok=True)
        for case, mask in raw.masks.items():
            copy = masks / f"{case}{raw.file_ending}"
            if not copy.is_file() or copy.stat().st_mtime < mask.stat().st_mtime:
                shutil.copy2(mask, copy)
    return looks


def preprocess_labeled_case(
    output: Path,
    images: Sequence[Path],
    mask: Path,
    plans: dict,
    configuration: str,
    dataset_json: dict,
) -> Appearance:
    """Let nnU-Net preprocess an annotated case, see `preprocess_case`; return how it looks."""
    preprocess_case(output, images, mask, plans, configuration, dataset_json)
    return _look_at(output.parent, output.name)


def preprocess_unlabeled(
    raw: RawDataset,
    infos: Mapping[str, CaseInfo],
    base: Path,
    plans: dict,
    configuration: str,
    workers: Workers,
    annotated: Sequence[Appearance] = (),
) -> None:
    """Preprocess the scans without masks into their own folder and write its manifest.

    Cases already there for the same plans and content are kept; others are replaced or removed.
    Without a manifest the folder is not complete. It also lists the scans that look unlike all
    of `annotated`; a warning names them.

    Raises:
        UserError: disk full or a worker died. Finished cases stay; the same command continues.
    """
    identifier = _data_identifier(plans, configuration)
    folder, manifest = unlabeled_folder(base, identifier), manifest_path(base, identifier)
    key = preprocessing_key(plans, configuration)
    stamps = {
        case: {"content": info.content, "spacing": list(info.spacing), "preprocessing": key}
        for case, info in infos.items()
    }
    with explained(folder):
        folder.mkdir(exist_ok=True)
        _remove_stale(folder, stamps)
        todo = [case for case, stamp in stamps.items() if not _is_done(folder, case, stamp)]
        if todo:
            manifest.unlink(missing_ok=True)
    if len(todo) < len(stamps):
        print(f"{configuration}: {len(stamps) - len(todo)} scans are preprocessed already.")
    jobs = [
        (folder, case, raw.unlabeled[case], plans, configuration, raw.dataset_json, stamps[case])
        for case in todo
    ]
    try:
        workers.map(preprocess_unlabeled_case, jobs, f"{configuration}, without masks")
    finally:
        for part in folder.glob(".*.part"):  # of a worker that died
            shutil.rmtree(part, ignore_errors=True)
    unlike_cases = {}
    for case in infos if annotated else ():
        why = unlike(Appearance(**read_properties(folder, case)[LOOK]), annotated)
        if why:
            unlike_cases[case] = why
    if unlike_cases:
        print(describe_unlike(unlike_cases, len(infos)))
    write_json(
        {
            "format": MANIFEST_FORMAT,
            "plans_name": plans["plans_name"],
            "configuration": configuration,
            "preprocessing": key,
            "cases": {case: {"content": info.content} for case, info in infos.items()},
            "unlike": unlike_cases,
        },
        manifest,
    )


def preprocess_unlabeled_case(
    folder: Path,
    case: str,
    images: Sequence[Path],
    plans: dict,
    configuration: str,
    dataset_json: dict,
    stamp: Mapping[str, Any],
) -> None:
    """Preprocess one scan in a hidden sub-folder, then move its files into place."""
    part = folder / f".{case}.part"
    with _removed_afterwards(part), explained(folder):
        part.mkdir()
        preprocess_case(part / case, images, None, plans, configuration, dataset_json)
        properties = load_pickle(str(part / f"{case}.pkl"))
        properties["nnunet_ssl"] = dict(stamp)
        properties[LOOK] = vars(_look_at(part, case))
        write_pickle(properties, str(part / f"{case}.pkl"))
        (folder / f"{case}.pkl").unlink(missing_ok=True)
        for ending in CASE_FILES:
            os.replace(part / f"{case}{ending}", folder / f"{case}{ending}")


def preprocess_case(
    output: Path,
    images: Sequence[Path],
    mask: Path | None,
    plans: dict,
    configuration: str,
    dataset_json: dict,
) -> None:
    """Let nnU-Net preprocess one case into `<output>.b2nd`, `<output>_seg.b2nd`, `<output>.pkl`.

    Without a mask the `_seg` file holds nnU-Net's padding mask (-1 outside the non-zero region).
    """
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    preprocessor = config.preprocessor_class(verbose=False)
    with silence():
        preprocessor.run_case_save(
            str(output),
            [str(p) for p in images],
            None if mask is None else str(mask),
            manager,
            config,
            dataset_json,
        )


def warn_of_shared_folder(base: Path, plans: Mapping[str, Any], configuration: str) -> None:
    """Print which other plans lose their preprocessed data: some planners share folder names."""
    identifier = _data_identifier(plans, configuration)
    key = preprocessing_key(plans, configuration)
    for path in sorted(base.glob("*.json")):
        other = load_json(str(path))
        if not isinstance(other, dict) or configuration not in other.get("configurations", {}):
            continue
        if (
            other["plans_name"] != plans["plans_name"]
            and _data_identifier(other, configuration) == identifier
            and preprocessing_key(other, configuration) != key
        ):
            print(
                f"WARNING: {path.name} keeps its {configuration} data in {base / identifier} too, "
                f"but preprocesses differently. The data are now those of {plans['plans_name']}; "
                f"preprocess again with --keep_plans before you train with {path.stem}."
            )


def _data_identifier(plans: Mapping[str, Any], configuration: str) -> str:
    return PlansManager(dict(plans)).get_configuration(configuration).data_identifier


def _remove_stale(folder: Path, cases: Iterable[str]) -> None:
    wanted = {f"{case}{ending}" for case in cases for ending in CASE_FILES}
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in wanted:
            path.unlink()


def _is_done(folder: Path, case: str, stamp: Mapping[str, Any]) -> bool:
    if not all((folder / f"{case}{ending}").is_file() for ending in CASE_FILES):
        return False
    try:
        properties = read_properties(folder, case)
        return LOOK in properties and properties.get("nnunet_ssl") == stamp
    except Exception:  # a damaged pickle raises almost anything; the case is then made anew
        return False


def read_properties(folder: Path, case: str) -> dict[str, Any]:
    """Return what nnU-Net and we keep beside a preprocessed scan."""
    return load_pickle(str(folder / f"{case}.pkl"))


def _look_at(folder: Path, case: str) -> Appearance:
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return appearance(data[:], seg[:][0] != -1, properties["spacing"])


@contextmanager
def _removed_afterwards(part: Path):
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def explained(folder: Path):
    """Turn errors of writing into `folder` into a UserError that names it.

    blosc2 hides the system's error behind a bare RuntimeError; writing a probe brings it out.
    """
    try:
        yield
    except OSError as error:
        raise UserError(explain_os_error(error, folder)) from error
    except RuntimeError as error:
        probe = folder / ".probe.part"
        try:
            with open(probe, "wb") as f:
                f.write(bytes(PROBE_BYTES))
                os.fsync(f.fileno())
        except OSError as cause:
            raise UserError(explain_os_error(cause, folder)) from error
        finally:
            probe.unlink(missing_ok=True)
        raise
