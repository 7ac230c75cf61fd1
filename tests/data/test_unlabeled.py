"""The manifest of the scans without masks, and what ties it to plans."""

import copy
import json

import pytest

from nnunet_ssl.data.unlabeled import (
    MANIFEST_FORMAT,
    manifest_path,
    preprocessing_key,
    read_manifest,
    unlabeled_folder,
)
from nnunet_ssl.errors import UserError

COMMAND = "nnunet_ssl plan_and_preprocess -d 901 -c"
ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")


def configuration(spacing, patch_size):
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": f"nnUNetPlans_{'2d' if len(spacing) == 2 else '3d_fullres'}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch_size,
        "median_image_size_in_voxels": [16.0, 32.0, 32.0],
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": kwargs,
        "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": kwargs,
        "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {"n_stages": 3}},
        "batch_dice": True,
    }


@pytest.fixture
def plans():
    return {
        "dataset_name": "Dataset901_Toy",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration([1.0, 1.0], [32, 32]),
            "3d_fullres": configuration([1.0, 1.0, 1.0], [16, 32, 32]),
        },
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 100.0, "std": 10.0, "percentile_00_5": 1.0, "percentile_99_5": 200.0}
        },
    }


@pytest.fixture
def base(tmp_path, plans):
    """Preprocessed folder with two scans and a manifest that fits."""
    base = tmp_path / "Dataset901_Toy"
    folder = unlabeled_folder(base, "nnUNetPlans_3d_fullres")
    folder.mkdir(parents=True)
    for case in ("a", "b"):
        for ending in ENDINGS:
            (folder / f"{case}{ending}").touch()
    write(base, plans)
    return base


def write(base, plans, **changes):
    manifest = {
        "format": MANIFEST_FORMAT,
        "plans_name": plans["plans_name"],
        "configuration": "3d_fullres",
        "preprocessing": preprocessing_key(plans, "3d_fullres"),
        "cases": {"a": {"content": "0"}, "b": {"content": "1"}},
        **changes,
    }
    manifest_path(base, "nnUNetPlans_3d_fullres").write_text(json.dumps(manifest))


def test_reads_what_belongs_to_the_plans(base, plans):
    assert sorted(read_manifest(base, plans, "3d_fullres")["cases"]) == ["a", "b"]


def fails_with(base, plans, configuration="3d_fullres"):
    with pytest.raises(UserError) as error:
        read_manifest(base, plans, configuration)
    message = str(error.value)
    assert f"{COMMAND} {configuration}" in message
    return message


def test_not_preprocessed(base, plans):
    message = fails_with(base, plans, "2d")
    assert str(manifest_path(base, "nnUNetPlans_2d")) in message
    assert "not preprocessed for configuration 2d" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "cases": {"a"',
        b"[]",
        b"3",
        b"{}",
        b'{"cases": {}}',
        b'{"format": 1, "preprocessing": "x"}',
        b"\x93NUMPY\xff\x00",
    ],
)
def test_damaged(content, base, plans):
    path = manifest_path(base, "nnUNetPlans_3d_fullres")
    path.write_bytes(content)
    assert f"{path} is damaged" in fails_with(base, plans)


def test_written_by_another_version(base, plans):
    write(base, plans, format=MANIFEST_FORMAT + 1)
    message = fails_with(base, plans)
    assert str(manifest_path(base, "nnUNetPlans_3d_fullres")) in message
    assert f"format {MANIFEST_FORMAT + 1}" in message


def test_other_preprocessing(base, plans):
    other = copy.deepcopy(plans)
    other["plans_name"] = "nnUNetResEncUNetMPlans"
    other["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    message = fails_with(base, other)
    assert str(manifest_path(base, "nnUNetPlans_3d_fullres")) in message
    assert "'nnUNetPlans'" in message and "'nnUNetResEncUNetMPlans'" in message


def test_other_plans_that_preprocess_alike_may_share_the_folder(base, plans):
    other = copy.deepcopy(plans)
    other["plans_name"] = "nnUNetSmallPlans"
    other["configurations"]["3d_fullres"]["patch_size"] = [8, 16, 16]
    assert read_manifest(base, other, "3d_fullres")["cases"]


def test_other_configuration(base, plans):
    write(base, plans, configuration="2d", preprocessing=preprocessing_key(plans, "2d"))
    assert "configuration '2d'" in fails_with(base, plans)


def test_no_scans(base, plans):
    write(base, plans, cases={})
    message = fails_with(base, plans)
    assert str(manifest_path(base, "nnUNetPlans_3d_fullres")) in message
    assert "lists no scans" in message and "imagesUn" in message


@pytest.mark.parametrize("ending", ENDINGS)
def test_missing_file(ending, base, plans):
    path = unlabeled_folder(base, "nnUNetPlans_3d_fullres") / f"b{ending}"
    path.unlink()
    assert f"{path} is missing" in fails_with(base, plans)


def at(plans, *keys):
    for key in keys:
        plans = plans[key]
    return plans


CONFIG = ("configurations", "3d_fullres")


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (CONFIG, "spacing", [1.0, 1.0, 1.5]),
        (CONFIG, "normalization_schemes", ["ZScoreNormalization"]),
        (CONFIG, "use_mask_for_norm", [True]),
        (CONFIG, "preprocessor_name", "MyPreprocessor"),
        (CONFIG, "resampling_fn_data", "resample_torch_fornnunet"),
        ((*CONFIG, "resampling_fn_data_kwargs"), "order", 1),
        ((*CONFIG, "resampling_fn_seg_kwargs"), "order", 0),
        (("foreground_intensity_properties_per_channel", "0"), "mean", 100.5),
        (("foreground_intensity_properties_per_channel", "0"), "percentile_99_5", 150.0),
        ((), "transpose_forward", [1, 0, 2]),
        ((), "image_reader_writer", "NibabelIO"),
    ],
)
def test_key_changes_with_all_that_changes_a_voxel(where, key, value, plans):
    before = preprocessing_key(plans, "3d_fullres")
    at(plans, *where)[key] = value
    assert preprocessing_key(plans, "3d_fullres") != before


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (CONFIG, "patch_size", [32, 64, 64]),
        (CONFIG, "batch_size", 12),
        (CONFIG, "batch_dice", False),
        (CONFIG, "data_identifier", "other"),
        (CONFIG, "median_image_size_in_voxels", [1, 2, 3]),
        (CONFIG, "architecture", {"network_class_name": "ResidualEncoderUNet"}),
        (("configurations", "2d"), "spacing", [3.0, 3.0]),
        ((), "plans_name", "other"),
        ((), "dataset_name", "other"),
    ],
)
def test_key_stays_with_all_else(where, key, value, plans):
    before = preprocessing_key(plans, "3d_fullres")
    at(plans, *where)[key] = value
    assert preprocessing_key(plans, "3d_fullres") == before


def test_key_does_not_depend_on_order_and_survives_json(plans):
    key = preprocessing_key(plans, "3d_fullres")
    assert len(key) == 64
    turned = dict(reversed(json.loads(json.dumps(plans)).items()))
    assert preprocessing_key(turned, "3d_fullres") == key


def test_key_follows_inherited_configurations(plans):
    own = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_big"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": own["data_identifier"],
        "patch_size": [64, 64, 64],
    }
    assert preprocessing_key(plans, "3d_big") == preprocessing_key(plans, "3d_fullres")
    plans["configurations"]["3d_big"]["spacing"] = [2.0, 2.0, 2.0]
    assert preprocessing_key(plans, "3d_big") != preprocessing_key(plans, "3d_fullres")
