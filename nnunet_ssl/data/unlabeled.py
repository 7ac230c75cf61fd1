"""Where preprocessed scans without masks live, and the manifest that ties them to their plans."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.errors import UserError

MANIFEST_FORMAT = 1


def unlabeled_folder(preprocessed_base: Path, data_identifier: str) -> Path:
    """Folder of the preprocessed scans without masks, a sibling of the labelled ones."""
    return Path(preprocessed_base) / f"{data_identifier}_unlabeled"


def manifest_path(preprocessed_base: Path, data_identifier: str) -> Path:
    """The manifest beside that folder."""
    return Path(preprocessed_base) / f"{data_identifier}_unlabeled.json"


def preprocessing_key(plans: Mapping[str, Any], configuration: str) -> str:
    """Hash of all in the plans that changes a preprocessed voxel.

    Plans of different planners may share a folder name (`nnUNetPlans_2d`); equal keys mean equal
    preprocessed data, whatever the plans are called. Patch size and network do not count.

    Args:
        plans: the whole plans dictionary.
        configuration: "2d", "3d_fullres", ...

    Returns:
        64 hexadecimal digits.
    """
    manager = PlansManager(dict(plans))
    config = dict(manager.get_configuration(configuration).configuration)
    relevant = (
        "preprocessor_name",
        "spacing",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_seg",
        "resampling_fn_data_kwargs",
        "resampling_fn_seg_kwargs",
    )
    parts = {
        "configuration": {k: config.get(k) for k in relevant},
        "transpose_forward": plans["transpose_forward"],
        "image_reader_writer": plans["image_reader_writer"],
        "intensities": plans["foreground_intensity_properties_per_channel"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_manifest(preprocessed_base: Path, plans: Mapping[str, Any], configuration: str) -> dict:
    """Read the manifest of the unlabelled cases and check that it belongs to these plans.

    Returns:
        The manifest; its "cases" maps case ids to {"content": hash}.

    Raises:
        UserError: not preprocessed, preprocessed for other plans or another configuration, or
            files missing. The message names the file and the command that mends it.
    """
    base = Path(preprocessed_base)
    data_identifier = PlansManager(dict(plans)).get_configuration(configuration).data_identifier
    path = manifest_path(base, data_identifier)
    fix = f"Run: nnunet_ssl plan_and_preprocess -d {base.name[7:10]} -c {configuration}"
    if not path.is_file():
        raise UserError(
            f"The scans in imagesUn are not preprocessed for configuration {configuration}: "
            f"{path} is missing. {fix}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        cases = manifest["cases"]
        key = manifest["preprocessing"]
        written_format = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged. {fix}") from error
    if written_format != MANIFEST_FORMAT:
        raise UserError(
            f"{path} was written by another version of nnunet_ssl (format {written_format}, this "
            f"one reads {MANIFEST_FORMAT}). {fix}"
        )
    if key != preprocessing_key(plans, configuration):
        raise UserError(
            f"{path} belongs to plans {manifest.get('plans_name')!r}, configuration "
            f"{manifest.get('configuration')!r}, which preprocess differently from plans "
            f"{plans['plans_name']!r}, configuration {configuration!r}. {fix} with the planner "
            f"options of these plans"
        )
    if not cases:
        raise UserError(f"{path} lists no scans. Put scans without masks into imagesUn. {fix}")
    folder = unlabeled_folder(base, data_identifier)
    present = set(os.listdir(folder)) if folder.is_dir() else set()  # one look for any number
    for case in cases:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            if case + ending not in present:
                raise UserError(f"{folder / (case + ending)} is missing. {fix}")
    return manifest


class UnlabeledDataset(nnUNetDatasetBlosc2):
    """Preprocessed scans without masks, opened one at a time.

    `seg` of a case is nnU-Net's padding mask: -1 outside the non-zero region, 0 inside.
    """

    def load_case(self, identifier: str) -> tuple:
        """Return data (C, *), padding mask (1, *), None and the properties of one case."""
        data, seg, seg_prev, properties = super().load_case(identifier)
        properties["class_locations"] = None  # nnU-Net's loader asks for the key
        return data, seg, seg_prev, properties
