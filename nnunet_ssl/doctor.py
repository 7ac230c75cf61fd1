"""`nnunet_ssl doctor`: what is set up, what is not, and the fix."""

import contextlib
import io
import json
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import VARIABLE, discovery_folder
from nnunet_ssl.version import __version__, check_nnunet_version

FOLDERS = {
    "nnUNet_raw": "your data sets",
    "nnUNet_preprocessed": "preprocessed data, on a fast disk",
    "nnUNet_results": "trained models",
}


class Check(NamedTuple):
    """One line of the report; `level` is OK, WARN or FAIL."""

    level: str
    text: str
    fix: str = ""


def trainer_path() -> str:
    """Value of `nnUNet_extTrainer` with our discovery folder added to what is already there."""
    paths = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p.strip()]
    ours = str(discovery_folder())
    return os.pathsep.join(paths if ours in paths else [*paths, ours])


def export_line() -> str:
    """The shell line that lets nnU-Net find our trainers."""
    return f"export {VARIABLE}={shlex.quote(trainer_path())}"


def run_doctor(
    dataset: str | None = None, configuration: str | None = None, plans: str = "nnUNetPlans"
) -> int:
    """Print all checks.

    Args:
        dataset: id or name of a data set to check too.
        configuration: check only this one, and fail if it is not ready to train.
        plans: plans identifier.

    Returns:
        1 if a check failed, else 0.
    """
    groups = {
        "versions": check_versions(),
        "folders": check_folders(),
        "trainers": check_discovery(),
        "device": check_device(),
    }
    if dataset is not None:
        groups["data set"] = check_dataset(dataset, configuration, plans)
    failed = False
    for name, checks in groups.items():
        print(f"\n{name}")
        for check in guarded(checks):
            failed |= check.level == "FAIL"
            print(f"  {check.level:<4}  {check.text}")
            if check.fix:
                print(f"        fix: {check.fix}")
    print("\nNot ready: see the lines marked FAIL." if failed else "\nReady.")
    return int(failed)


def guarded(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks, ended by a FAIL instead of a traceback."""
    try:
        yield from checks
    except Exception as error:
        yield Check("FAIL", f"{type(error).__name__}: {error}")


def check_versions() -> Iterator[Check]:
    """Python, torch, nnunetv2, nnunet_ssl."""
    yield Check("OK", f"nnunet_ssl {__version__}, Python {platform.python_version()}")
    try:
        yield Check("OK", f"nnunetv2 {check_nnunet_version()}")
    except UserError as error:
        text, _, fix = str(error).partition(" Run: ")
        yield Check("FAIL", text, fix)
    import torch

    yield Check("OK", f"torch {torch.__version__}")


def check_folders() -> Iterator[Check]:
    """nnU-Net's three folders: set, existing, writable, with space left."""
    for name, purpose in FOLDERS.items():
        value = os.environ.get(name)
        if not value:
            fix = f"export {name}=/path/to/folder ({purpose})"
            yield Check("FAIL", f"{name} is not set", fix)
            continue
        if not os.path.isdir(value):
            fix = f"mkdir -p {shlex.quote(value)}"
            yield Check("FAIL", f"{name}={value} does not exist", fix)
            continue
        if not os.access(value, os.W_OK):
            fix = f"chmod u+w {shlex.quote(value)}, or use another folder"
            yield Check("FAIL", f"{name}={value} is not writable", fix)
            continue
        free = shutil.disk_usage(value).free / 1e9
        text = f"{name}={value}, {free:.0f} GB free"
        if name == "nnUNet_raw" or free >= 10:
            yield Check("OK", text)
        else:
            yield Check("FAIL" if free < 1 else "WARN", text, "free some space on this disk")


def check_discovery() -> Iterator[Check]:
    """nnU-Net's own finder finds our trainer through the variable."""
    from nnunet_ssl.naming import discovery_folder

    value = os.environ.get(VARIABLE, "")
    if str(discovery_folder()) not in value.split(os.pathsep):
        state = f"{VARIABLE}={value} does not name our folder" if value else f"{VARIABLE} is unset"
        yield Check("FAIL", f"{state}: nnUNetv2_train cannot find our trainers", export_line())
        return
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            recursive_find_trainer_class_by_name("SSLTrainer")
    except Exception as error:
        fix = f"one file that fails to import hides all: remove its folder from {VARIABLE}"
        yield Check("FAIL", f"nnU-Net does not find SSLTrainer: {error}", fix)
    else:
        yield Check("OK", "nnU-Net finds SSLTrainer")


def check_device() -> Iterator[Check]:
    """GPU with its memory, or a word about the CPU."""
    import torch

    if not torch.cuda.is_available():
        text = f"no CUDA GPU; {os.cpu_count()} CPU cores"
        yield Check("WARN", text, "add -device cpu to train and predict; small plans only")
        return
    for i in range(torch.cuda.device_count()):
        free, total = (b / 1e9 for b in torch.cuda.mem_get_info(i))
        name = torch.cuda.get_device_name(i)
        text = f"GPU {i}: {name}, {free:.1f} of {total:.1f} GB free"
        if free < 4:
            yield Check("WARN", text, "end other programs on this GPU")
        else:
            yield Check("OK", text)


def check_dataset(dataset: str, configuration: str | None, plans: str) -> Iterator[Check]:
    """Raw folders, plans and preprocessed data of one data set."""
    raw_root = os.environ.get("nnUNet_raw")
    if not raw_root or not os.environ.get("nnUNet_preprocessed"):
        yield Check("FAIL", "not looked at", "set the folders above first")
        return
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
    found = sorted(p for p in Path(raw_root).glob(pattern) if p.is_dir())
    if len(found) != 1:
        what = f"{len(found)} folders named {pattern} in nnUNet_raw ({raw_root})"
        yield Check("FAIL", what, "there must be exactly one: imagesTr, labelsTr, imagesUn in it")
        return
    raw = found[0]
    try:
        dataset_json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        ending = dataset_json["file_ending"]
    except (OSError, ValueError, KeyError) as error:
        fix = "write it as nnU-Net's documentation/dataset_format.md says"
        yield Check("FAIL", f"{raw / 'dataset.json'} is missing or damaged ({error})", fix)
        return
    counts = {}
    for folder in ("imagesTr", "imagesUn"):
        counts[folder] = len(list((raw / folder).glob(f"*_0000{ending}")))
        text = f"{raw / folder}: {counts[folder]} scans"
        fix = f"put scans there, named CASE_0000{ending}"
        yield Check("OK", text) if counts[folder] else Check("FAIL", text, fix)
    yield from check_preprocessed(raw.name, counts, configuration, plans)


def check_preprocessed(
    name: str, counts: dict[str, int], configuration: str | None, plans: str
) -> Iterator[Check]:
    """Plans, splits, and labelled and unlabelled preprocessed cases of each configuration."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_ssl.data.unlabeled import read_manifest

    base = Path(os.environ["nnUNet_preprocessed"]) / name
    command = f"nnunet_ssl plan_and_preprocess -d {int(name[7:10])} -c {configuration or '2d'}"
    plans_file = base / f"{plans}.json"
    if not plans_file.is_file():
        yield Check("FAIL", f"{plans_file} is missing: not planned yet", command)
        return
    plan = json.loads(plans_file.read_text(encoding="utf-8"))
    available = [c for c, v in plan["configurations"].items() if "cascade" not in c and v]
    yield Check("OK", f"plans {plans}: {', '.join(available)}")
    if configuration is not None and configuration not in available:
        fix = f"use one of {', '.join(available)}"
        yield Check("FAIL", f"{plans_file} has no configuration {configuration}", fix)
        return

    for config in [configuration] if configuration else available:
        not_ready = "FAIL" if configuration else "WARN"
        command = f"nnunet_ssl plan_and_preprocess -d {int(name[7:10])} -c {config} --keep_plans"
        data_identifier = PlansManager(plan).get_configuration(config).data_identifier
        labeled = len(list((base / data_identifier).glob("*.pkl")))
        if labeled != counts["imagesTr"]:
            text = f"{config}: {labeled} of {counts['imagesTr']} annotated scans preprocessed"
            yield Check(not_ready, text, command)
            continue
        try:
            unlabeled = len(read_manifest(base, plan, config)["cases"])
        except UserError as error:
            text, _, fix = str(error).partition(" Run: ")
            yield Check(not_ready, f"{config}: {text}", fix or command)
            continue
        text = f"{config}: {labeled} annotated, {unlabeled} of {counts['imagesUn']} unlabelled"
        ready = unlabeled == counts["imagesUn"]
        yield Check("OK", text) if ready else Check(not_ready, text, command)

    splits = base / "splits_final.json"
    if splits.is_file():
        yield Check(
            "OK",
            f"{splits.name}: {len(json.loads(splits.read_text(encoding='utf-8')))} folds, and all",
        )
    else:
        yield Check("WARN", f"{splits} is missing: only fold all is safe", f"{command}")
