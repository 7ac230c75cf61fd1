"""Checks of plausibility, each on shapes whose answer is known."""

import numpy as np
import pytest
from make_data import write_image

from nnunet_ssl.errors import UserError
from nnunet_ssl.offline.anatomy import Anatomy, ellipse, find_check, largest, study, volume
from nnunet_ssl.planning.raw import read_raw_dataset
from nnunet_ssl.planning.workers import Workers

GRID = np.indices((1, 60, 80))


def disc(row, column, long, short):
    return ((GRID[1] - row) / long) ** 2 + ((GRID[2] - column) / short) ** 2 <= 1


def anatomy(**changes):
    facts = {
        "label_sets": {"head": [1, 2], "spot": [2]},
        "everywhere": ["head"],
        "single": ["head"],
        "volumes": {"head": [100.0, 200.0]},
        "ellipses": {"head": 0.98},
    }
    return Anatomy(**facts | changes)


def test_largest_doubts_the_smaller_pieces():
    labels = disc(30, 30, 15, 20).astype(np.uint8)
    labels[0, 0:4, 70:75] = 1
    labels[0, 30, 30] = 2  # inside; a spot comes in any number
    labels[0, 50, 60] = 2
    doubted, why = largest(labels, (1, 1, 1), anatomy())
    assert why is None and doubted.sum() == 21
    assert doubted[0, 0:4, 70:75].all() and doubted[0, 50, 60] and not doubted[0, 30, 30]
    assert not largest(labels, (1, 1, 1), anatomy(single=[]))[0].any()


def test_volume_is_that_of_annotated_cases():
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[0, :10, :10] = 1
    assert volume(labels, (1, 1, 1), anatomy()) == (None, None)
    assert volume(labels, (3, 1, 1), anatomy())[1] is None  # 300 = 1.5 times the largest
    assert "head has an unusual volume: 400 mm³" in volume(labels, (4, 1, 1), anatomy())[1]
    assert "head has an unusual volume: 50 mm³" in volume(labels, (0.5, 1, 1), anatomy())[1]
    assert volume(labels * 0, (1, 1, 1), anatomy())[1] is None  # missing: another rule


def test_ellipse_doubts_what_differs_and_refuses_other_shapes():
    labels = disc(30, 40, 15, 25).astype(np.uint8)
    doubted, why = ellipse(labels, (1, 1, 1), anatomy())
    assert why is None and doubted.sum() < 0.03 * labels.sum()
    labels[0, 30, 66:70] = 1  # a thorn
    doubted, why = ellipse(labels, (1, 1, 1), anatomy())
    assert why is None and doubted[0, 30, 68:70].all() and not doubted[0, 25:35, 30:50].any()
    labels[0, :, :40] = 0
    labels[0, 50:, :] = 1
    assert "head is no ellipse" in ellipse(labels, (1, 1, 1), anatomy())[1]


def test_what_annotated_cases_show(nnunet, tmp_path):
    folder = tmp_path / "Dataset960_Heads"
    sizes = [(12, 20), (14, 24), (16, 22)]
    for k, (long, short) in enumerate(sizes):
        mask = disc(30, 40, long, short).astype(np.uint8)
        if k:
            mask[0, 30, 30] = mask[0, 30, 50] = 2
        write_image(np.ones_like(mask, np.float32), folder / f"imagesTr/c{k}_0000.nii.gz")
        write_image(mask, folder / f"labelsTr/c{k}.nii.gz", (0.5, 0.5, 1))
    (folder / "dataset.json").write_text(
        '{"channel_names": {"0": "US"}, "file_ending": ".nii.gz", "numTraining": 3,'
        '"labels": {"background": 0, "head": [1, 2], "spot": [2]}, "regions_class_order": [1, 2]}'
    )
    raw = read_raw_dataset(folder, unlabeled=False)
    found = study(raw, {"head": [1, 2], "spot": [2]}, Workers(1))
    assert found.everywhere == ["head"] and found.single == ["head"]
    areas = [disc(30, 40, *size).sum() / 4 for size in sizes]
    assert found.volumes["head"] == [min(areas), max(areas)]
    assert found.volumes["spot"] == [0.5, 0.5]
    assert found.ellipses["head"] > 0.97 and Anatomy(**found.as_json()) == found


def test_own_checks():
    assert find_check("nnunet_ssl.offline.anatomy:volume") is volume
    for name in ("round", "no.such.module:f", "nnunet_ssl.offline.anatomy:none"):
        with pytest.raises(UserError, match=f"--shape {name}: .*largest, ellipse, volume"):
            find_check(name)


def test_ellipse_doubts_what_is_missing_too():
    row, column = np.indices((60, 80))
    labels = ((((row - 30) / 15) ** 2 + ((column - 40) / 25) ** 2 <= 1)[None]).astype(np.uint8)
    labels[0, 28:32, 60:70] = 0  # a notch at the rim
    facts = Anatomy({"head": [1]}, [], ["head"], {}, {"head": 0.98})
    doubted, why = ellipse(labels, (1, 1, 1), facts)
    assert why is None and doubted[0, 29:31, 61:63].all()
