"""Plan and preprocess a data set with scans without masks."""

import glob
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nnunetv2
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error
from nnunet_ssl.planning.fingerprint import extract_fingerprint
from nnunet_ssl.planning.preprocessing import (
    preprocess_labeled,
    preprocess_unlabeled,
    warn_of_shared_folder,
)
from nnunet_ssl.planning.raw import (
    RawDataset,
    environment_folder,
    inspect_dataset,
    read_raw_dataset,
    silence,
)
from nnunet_ssl.planning.splits import copy_case_table, ensure_splits, read_splits
from nnunet_ssl.planning.workers import Workers


def plan_and_preprocess(
    dataset_id: int,
    configurations: Sequence[str],
    *,
    planner: str = "ExperimentPlanner",
    plan_on: str = "all",
    gpu_memory_target: float | None = None,
    preprocessor: str = "DefaultPreprocessor",
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
    num_processes: int | None = None,
    fingerprint_processes: int | None = None,
    keep_plans: bool = False,
    verify: bool = True,
) -> str:
    """Check, plan and preprocess annotated scans and those of imagesUn.

    Annotated cases go where stock nnU-Net puts them, the others into a sibling folder. Scripts
    that call this with several processes need `if __name__ == "__main__":`.

    Args:
        dataset_id: id below nnUNet_raw.
        configurations: "2d", "3d_fullres", "3d_lowres"; those not in the plans are skipped.
        planner: class name of nnU-Net's planner.
        plan_on: "all" plans on shapes, spacings and number of all scans, "labeled" on the
            annotated ones alone, as stock nnU-Net.
        gpu_memory_target: GB; None is the planner's default.
        preprocessor: class name of nnU-Net's preprocessor.
        overwrite_target_spacing: three numbers in mm, for 3d_fullres.
        overwrite_plans_name: name of the plans; None is the planner's default.
        num_processes: cases preprocessed at once; 1 works in this process; None is 4, at most the
            number of cores.
        fingerprint_processes: cases checked at once; None is 8, at most the number of cores.
        keep_plans: preprocess with the existing plans.
        verify: check the masks too (orientation, shape, spacing, values, number).

    Returns:
        Plans identifier, for nnU-Net's `-p`.

    Raises:
        UserError: bad input or full disk. What was complete before stays, nothing else.
    """
    if plan_on not in ("all", "labeled"):
        raise UserError(f"--plan-on is {plan_on!r}; give 'all' or 'labeled'.")
    if overwrite_target_spacing is not None and (
        len(overwrite_target_spacing) != 3 or min(overwrite_target_spacing) <= 0
    ):
        raise UserError(
            f"-overwrite_target_spacing is {list(overwrite_target_spacing)}; give three positive "
            f"numbers in mm."
        )
    raw = read_raw_dataset(dataset_id)
    if verify and raw.dataset_json["numTraining"] != len(raw.labeled):
        raise UserError(
            f"{raw.folder / 'dataset.json'} says numTraining {raw.dataset_json['numTraining']}, "
            f"but there are {len(raw.labeled)} annotated cases. Correct the number."
        )
    base = environment_folder("nnUNet_preprocessed") / raw.folder.name
    planner_class = _find_class("experiment_planning", planner, "-pl")
    _find_class("preprocessing", preprocessor, "-preprocessor_name")
    plans_name = overwrite_plans_name or _default_plans_name(planner_class)
    plans_path = base / f"{plans_name}.json"
    if keep_plans and not plans_path.is_file():
        raise UserError(f"{plans_path} does not exist, so it cannot be kept. Omit --keep_plans.")
    if not keep_plans:
        _refuse_if_trained(raw.folder.name, plans_path)
    read_splits(raw.folder, base, raw.labeled)

    cores = os.cpu_count() or 1
    with Workers(fingerprint_processes or num_processes or min(8, cores)) as workers:
        labeled, unlabeled = inspect_dataset(raw, workers, check_masks=verify)
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(explain_os_error(error, base)) from error
        if not keep_plans:
            counted = unlabeled if plan_on == "all" else {}
            fingerprint_path = base / "dataset_fingerprint.json"
            extract_fingerprint(raw, labeled, counted, workers, fingerprint_path)
    ensure_splits(raw.folder, base, list(raw.labeled))
    copy_case_table(raw.folder, base)
    if not keep_plans:
        options: dict[str, Any] = {"preprocessor_name": preprocessor, "plans_name": plans_name}
        if gpu_memory_target is not None:
            options["gpu_memory_target_in_gb"] = gpu_memory_target
        if overwrite_target_spacing is not None:
            options["overwrite_target_spacing"] = [float(s) for s in overwrite_target_spacing]
        _plan(raw, planner_class, options, len(labeled) + len(counted), plans_path)

    plans = load_json(str(plans_path))
    chosen = _available(plans, configurations, plans_path)
    with Workers(num_processes or min(4, cores)) as workers:
        for configuration in chosen:
            warn_of_shared_folder(base, plans, configuration)
            looks = preprocess_labeled(raw, base, plans, configuration, workers)
            preprocess_unlabeled(raw, unlabeled, base, plans, configuration, workers, looks)
    _summarize(dataset_id, raw, plans, chosen)
    return plans_name


def _find_class(package: str, name: str, option: str) -> type:
    folder = os.path.join(nnunetv2.__path__[0], package)
    found = recursive_find_python_class(folder, name, f"nnunetv2.{package}")
    if found is None:
        raise UserError(
            f"{option} {name}: nnU-Net has no such class in nnunetv2.{package}. Check the spelling."
        )
    return found


def plans_name_of(planner: str) -> str:
    """Return the name that a planner gives its plans, for nnU-Net's `-p`.

    Raises:
        UserError: nnU-Net has no such planner.
    """
    return _default_plans_name(_find_class("experiment_planning", planner, "-pl"))


def _default_plans_name(planner_class: type) -> str:
    return inspect.signature(planner_class).parameters["plans_name"].default


def _refuse_if_trained(dataset_name: str, plans_path: Path) -> None:
    results = os.environ.get("nnUNet_results")
    if not results or not plans_path.is_file():
        return
    models = Path(results) / dataset_name
    pattern = f"*__{glob.escape(plans_path.stem)}__*/fold_*/checkpoint_*.pth"
    trained = next(models.glob(pattern), None)
    if trained is not None:
        raise UserError(
            f"{plans_path} has results: {trained}. New plans would not fit them. Keep the plans "
            f"with --keep_plans, or make others beside them with -overwrite_plans_name NEW."
        )


def _plan(
    raw: RawDataset,
    planner_class: type[ExperimentPlanner],
    options: Mapping[str, Any],
    num_cases: int,
    plans_path: Path,
) -> None:
    """Run nnU-Net's planner as if `num_cases` cases were annotated (its batch size cap)."""
    old = plans_path.read_bytes() if plans_path.is_file() else None
    try:
        with silence(), _at_least_one_thread():
            planner = planner_class(raw.folder.name, **options)
            planner.dataset_json = {**planner.dataset_json, "numTraining": num_cases}
            planner.dataset = {  # its own list holds hidden files too (macOS: ._case_0000.nii.gz)
                case: {"images": [str(p) for p in paths], "label": str(raw.masks[case])}
                for case, paths in raw.labeled.items()
            }
            planner.plan_experiment()
    except OSError as error:
        plans_path.unlink(missing_ok=True)
        if old is not None:
            plans_path.write_bytes(old)
        raise UserError(explain_os_error(error, plans_path)) from error


@contextmanager
def _at_least_one_thread():
    """The planner hands nnUNet_n_proc_DA to torch.set_num_threads, which refuses 0."""
    old = os.environ.get("nnUNet_n_proc_DA")
    if old == "0":
        os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        if old is not None:
            os.environ["nnUNet_n_proc_DA"] = old


def read_plans(base: Path, plans: str, configuration: str) -> dict[str, Any]:
    """Return the plans of a data set.

    Args:
        base: its folder below nnUNet_preprocessed.
        plans: their name.
        configuration: that they must have.

    Raises:
        UserError: no such plans or configuration; names the command or the choices.
    """
    path = base / f"{plans}.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Run: "
            f"nnunet_ssl plan_and_preprocess -d {base.name[7:10]} -c {configuration}"
        )
    content = load_json(str(path))
    if configuration not in content["configurations"]:
        raise UserError(
            f"{path} has no configuration {configuration}. Give one of these with -c: "
            f"{', '.join(c for c in content['configurations'] if 'cascade' not in c)}"
        )
    return content


def _available(
    plans: Mapping[str, Any], configurations: Sequence[str], plans_path: Path
) -> list[str]:
    chosen = []
    for configuration in dict.fromkeys(configurations):
        if configuration == "3d_cascade_fullres":
            print("NOTE: 3d_cascade_fullres is not preprocessed; it uses the data of 3d_fullres.")
        elif configuration not in plans["configurations"]:
            print(f"NOTE: {plans_path.name} has no configuration {configuration}; skipped.")
        else:
            chosen.append(configuration)
    if not chosen:
        present = ", ".join(c for c in plans["configurations"] if "cascade" not in c)
        raise UserError(
            f"{plans_path} has none of the configurations {', '.join(configurations)}. Give some "
            f"of these with -c: {present}"
        )
    return chosen


def _summarize(
    dataset_id: int, raw: RawDataset, plans: Mapping[str, Any], configurations: Sequence[str]
) -> None:
    details = "; ".join(
        f"{c}: batch {plans['configurations'][c]['batch_size']}, patch "
        f"{'x'.join(str(int(i)) for i in plans['configurations'][c]['patch_size'])}"
        for c in configurations
    )
    name = plans["plans_name"]
    option = "" if name == "nnUNetPlans" else f" -p {name}"
    print(
        f"{raw.folder.name}: {len(raw.labeled)} annotated, {len(raw.unlabeled)} without masks. "
        f"{name}: {details}. Next: nnUNetv2_train {dataset_id} {configurations[0]} all "
        f"-tr SSLTrainer{option}"
    )
