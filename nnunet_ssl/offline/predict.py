"""Labels scans without masks with nnU-Net's predictor, and tells how stable each label is.

One case at a time: memory does not grow with their number, and no probabilities reach the disk.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from nnunet_ssl.checkpoint import load_checkpoint
from nnunet_ssl.data.unlabeled import UnlabeledDataset, read_manifest, unlabeled_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.history import read_log
from nnunet_ssl.io import explain_os_error
from nnunet_ssl.offline.anatomy import Anatomy, find_check
from nnunet_ssl.offline.stability import Committee, stability
from nnunet_ssl.planning.raw import inspect_case, silence
from nnunet_ssl.two_stages import FINAL

MASKS, TARGETS = "masks", "targets"
KEEP_AT = (0.4, 0.7)  # of training, beside its end


class View(nn.Module):
    """A network that sees its input mirrored and turns its output back.

    Args:
        network: (B, C, *) -> (B, K, *).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.axes: tuple[int, ...] = ()  # spatial axes, 0 the first

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of this view, in the geometry of the input."""
        if not self.axes:
            return self.network(x)
        axes = [axis + 2 for axis in self.axes]
        return self.network(x.flip(axes)).flip(axes)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load weights of the network itself; the predictor does so for each fold."""
        return getattr(self.network, "_orig_mod", self.network).load_state_dict(*args, **kwargs)


class Teacher:
    """Segments preprocessed scans with a trained model, and with less sure variants of it.

    Args:
        model: folder with plans.json and fold folders.
        folds: whose networks are averaged.
        device: "cuda", "cpu" or "mps".
        mirroring: average over mirrored views, as nnU-Net predicts by default.

    Raises:
        UserError: a checkpoint is damaged.
    """

    def __init__(self, model: Path, folds: Sequence[str], device: str, mirroring: bool = True):
        self.mirroring = mirroring
        places = [model / f"fold_{fold}" for fold in folds]
        for place in places:
            load_checkpoint(place / FINAL)  # a damaged one is named
        self.predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
        with silence():
            self.predictor.initialize_from_trained_model_folder(
                str(model), [fold if fold == "all" else int(fold) for fold in folds], FINAL
            )
        self.view = View(self.predictor.network)
        self.predictor.network = self.view
        self.final = self.predictor.list_of_parameters
        self.earlier = {
            name: [load_checkpoint(place / name)["network_weights"] for place in places]
            for name in kept_checkpoints(places)
        }

    @property
    def label_sets(self) -> dict[str, tuple[int, ...]]:
        """Labels of each foreground class or region, by name."""
        return label_sets_of(self.predictor.dataset_json)

    def segment(
        self,
        data: Tensor,
        properties: dict,
        weights: Sequence[Mapping[str, Tensor]] | None = None,
        mirroring: bool = True,
        axes: tuple[int, ...] = (),
    ) -> np.ndarray:
        """Return the segmentation in the geometry of the image file.

        Args:
            data: preprocessed, (C, *).
            properties: nnU-Net's, of the case.
            weights: state dicts to average over; None takes the final ones.
            mirroring: average over mirrored views, if the model does.
            axes: predict the view mirrored along these.
        """
        p = self.predictor
        p.list_of_parameters = self.final if weights is None else list(weights)
        p.use_mirroring = mirroring and self.mirroring
        self.view.axes = axes
        logits = p.predict_logits_from_preprocessed_data(data)
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, p.plans_manager, p.configuration_manager, p.label_manager, properties
        )

    def variants(self) -> dict[str, dict[str, Any]]:
        """Return by name what `segment` takes for each member of the committee.

        Checkpoints from before the end of training, the single views that mirroring averages, and
        the single folds if there are several; all but the label itself without mirroring.
        """
        members: dict[str, dict[str, Any]] = {
            name.removesuffix(".pth").removeprefix("checkpoint_"): {"weights": weights}
            for name, weights in self.earlier.items()
        }
        mirrored = self.predictor.allowed_mirroring_axes if self.mirroring else None
        if mirrored:
            views = [(), *((axis,) for axis in mirrored)]
            members |= {f"view{''.join(map(str, axes))}": {"axes": axes} for axes in views}
        if len(self.final) > 1:
            members |= {f"fold{k}": {"weights": [one]} for k, one in enumerate(self.final)}
        return {name: {"mirroring": False, **how} for name, how in members.items()}


def kept_checkpoints(places: Sequence[Path]) -> list[str]:
    """Return the names of the checkpoints on the way that all folds kept."""
    names = [f"checkpoint_at_{100 * fraction:g}.pth" for fraction in KEEP_AT]
    return [name for name in names if all((place / name).is_file() for place in places)]


def label_sets_of(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the labels of each foreground class or region, in the order of the network's heads."""
    found = {
        name: tuple(int(v) for v in (values if isinstance(values, list | tuple) else [values]))
        for name, values in dataset_json["labels"].items()
        if name not in ("background", "ignore")
    }
    if all(len(values) == 1 for values in found.values()):  # no regions
        found = dict(sorted(found.items(), key=lambda item: item[1]))
    return found


def label_part(options: Mapping[str, Any]) -> dict[str, Any]:
    """Label the cases of a part that are not labelled yet.

    Writes masks, targets (masks in which unsure voxels carry the ignore label) and a line a case
    with its scores. A case that cannot be read gets a line that says so.

    Args:
        options: of the task, see `command.label_task`.

    Returns:
        Facts for the task's state.

    Raises:
        UserError: the model is damaged, or the output cannot be written.
    """
    output, lines = Path(options["output"]), Path(options["lines"])
    done = {row["case"] for row in read_rows(output)}
    cases = [case for case in options["cases"] if case not in done]
    if not cases:
        return {"labeled": 0}
    teacher = Teacher(
        Path(options["model"]), options["folds"], options["device"], options["mirroring"]
    )
    base = Path(options["preprocessed"])
    plans = teacher.predictor.plans_manager.plans
    manifest = read_manifest(base, plans, options["configuration"])
    identifier = teacher.predictor.configuration_manager.data_identifier
    scans = UnlabeledDataset(str(unlabeled_folder(base, identifier)), cases)
    anatomy = Anatomy(**options["anatomy"])
    for name in (MASKS, TARGETS):
        (output / name).mkdir(parents=True, exist_ok=True)
    if lines.is_file() and not lines.read_bytes().endswith(b"\n"):
        add_line(None, lines)  # ends the line that a kill tore off
    for case in cases:
        try:
            scan = read_scan(
                [Path(p) for p in options["images"][case]],
                scans,
                case,
                manifest["cases"][case]["content"],
                teacher.predictor.plans_manager.image_reader_writer_class,
                options["channels"],
            )
        except UserError as error:
            row: dict[str, Any] = {"error": str(error)}
        else:
            row = label_case(teacher, case, scan, anatomy, options, output)
        add_line({"case": case, **row}, lines)
    return {"labeled": len(cases)}


def read_scan(
    images: Sequence[Path],
    scans: UnlabeledDataset,
    case: str,
    content: str,
    reader: type,
    channels: int,
) -> dict[str, Any]:
    """Return data, properties and what identifies a case.

    Raises:
        UserError: image or preprocessed data unreadable, or the image is not the one that was
            preprocessed.
    """
    info = inspect_case(images, reader, channels)
    if info.content != content:
        raise UserError(f"{images[0]} has changed since it was preprocessed.")
    try:
        data, _, _, properties = scans.load_case(case)
        array = np.array(data[:])
    except MemoryError:
        raise
    except Exception as error:  # blosc2 and pickle raise almost anything for damaged files
        raise UserError(f"The preprocessed scan {case} cannot be read ({error}).") from error
    return {"data": torch.from_numpy(array), "properties": properties, "info": info}


def label_case(
    teacher: Teacher,
    case: str,
    scan: Mapping[str, Any],
    anatomy: Anatomy,
    options: Mapping[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Write mask and target of a case; return its scores."""
    data, properties, info = scan["data"], scan["properties"], scan["info"]
    labels = teacher.segment(data, properties)
    members = teacher.variants()
    committee = Committee(labels, teacher.label_sets)
    for how in members.values():
        committee.add(teacher.segment(data, properties, **how))
    by_class, unsure = committee.by_class(), committee.unsure
    voxels = committee.voxels()
    refused = None
    for name in options["shapes"]:
        doubted, why = find_check(name)(labels, properties["spacing"], anatomy)
        if doubted is not None:
            unsure |= doubted
        refused = refused or why
    target = np.where(unsure, np.array(options["ignore"], labels.dtype), labels)
    writer = teacher.predictor.plans_manager.image_reader_writer_class()
    ending = teacher.predictor.dataset_json["file_ending"]
    for name, array in ((MASKS, labels), (TARGETS, target)):
        write_mask(array, output / name / f"{case}{ending}", properties, writer)
    shown = labels != 0
    return {
        "stability": stability(by_class),
        "classes": by_class,
        "voxels": voxels,
        # of the voxels that any member calls foreground
        "unsure": int(unsure.sum()) / max(1, int((unsure | shown).sum())),
        "unsure_voxels": int(unsure.sum()),
        "foreground_voxels": int(shown.sum()),
        "members": list(members),
        "implausible": refused,
        "content": info.content,
        "spacing": list(info.spacing),
    }


def write_mask(array: np.ndarray, path: Path, properties: dict, writer: Any) -> None:
    """Write a mask with nnU-Net's writer; it appears when it is whole.

    Raises:
        UserError: disk full or not writable.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".part", dir=path.parent) as part:
            writer.write_seg(array, str(Path(part) / path.name), properties)
            files = sorted(Path(part).iterdir(), key=lambda p: p.name == path.name)
            if not any(p.name == path.name and p.stat().st_size for p in files):
                raise OSError(f"{writer.__class__.__name__} wrote nothing")
            for file in files:  # TIFF masks have their spacing beside them
                os.replace(file, path.parent / file.name)
    except (OSError, RuntimeError) as error:  # the latter: how SimpleITK reports a full disk
        raise UserError(explain_write_error(error, path)) from error


def explain_write_error(error: OSError | RuntimeError, path: Path) -> str:
    """Return one line for an error of writing, also where a library hides the system's."""
    if isinstance(error, OSError):
        return explain_os_error(error, path)
    left = shutil.disk_usage(path.parent).free
    return (
        f"Cannot write {path} ({str(error).strip().splitlines()[-1]}); {left / 2**20:.0f} MB are "
        f"free. Make room and run the same command again."
    )


def add_line(row: Mapping[str, Any] | None, path: Path) -> None:
    """Add a case to the lines of a part."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(explain_os_error(error, path)) from error


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Return what all parts wrote of their cases, by name; torn lines are left out."""
    rows = {
        row["case"]: row
        for path in sorted(output.glob("part_*.jsonl"))
        for row in read_log(path)
        if row
    }
    return [rows[case] for case in sorted(rows)]
