"""Labelling with nnU-Net's predictor."""

import errno
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_ssl.data.unlabeled import UnlabeledDataset
from nnunet_ssl.errors import UserError
from nnunet_ssl.offline import predict
from nnunet_ssl.offline.predict import Teacher, View, label_part, read_rows

from .conftest import copy_dataset, make_model, read


class Lopsided(nn.Module):
    """Adds a ramp along the first spatial axis."""

    def forward(self, x):
        return x + torch.arange(x.shape[2]).view(1, 1, -1, 1)


def test_a_view_turns_its_output_back():
    view, x = View(Lopsided()), torch.rand(2, 1, 4, 5)
    assert torch.equal(view(x), Lopsided()(x))
    view.axes = (0,)
    ramp = torch.arange(3, -1, -1.0).view(1, 1, -1, 1)
    assert torch.allclose(view(x), x + ramp)
    view.axes = (1,)
    assert torch.allclose(view(x), Lopsided()(x))


def load(base, case="un_000"):
    data, _, _, properties = UnlabeledDataset(
        str(base / "nnUNetPlans_2d_unlabeled"), [case]
    ).load_case(case)
    return torch.from_numpy(np.array(data[:])), properties


def test_teachers_mask_is_nnunets(own):
    model = make_model(own, "Dataset901_Toy", folds=("0", "1"))
    # folds that differ, so that averaging shows
    first = torch.load(model / "fold_0/checkpoint_final.pth", weights_only=False)
    for value in first["network_weights"].values():
        value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    torch.save(first, model / "fold_0/checkpoint_final.pth")
    teacher = Teacher(model, ["0", "1"], "cpu")
    data, properties = load(own / "nnUNet_preprocessed/Dataset901_Toy")
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), [0, 1], "checkpoint_final.pth")
    image = own / "nnUNet_raw/Dataset901_Toy/imagesUn/un_000_0000.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(image)))[None].astype(np.float32)
    expected = stock.predict_single_npy_array(array, {"spacing": [1, 1, 1]})
    assert (teacher.segment(data, properties) == expected).all() and expected.any()

    members = teacher.variants()
    assert list(members) == ["at_40", "at_70", "view", "view0", "view1", "fold0", "fold1"]
    masks = {name: teacher.segment(data, properties, **how) for name, how in members.items()}
    assert (masks["fold0"] != masks["fold1"]).any()
    stock.initialize_from_trained_model_folder(str(model), [1], "checkpoint_final.pth")
    stock.use_mirroring = False
    alone = stock.predict_single_npy_array(array, {"spacing": [1, 1, 1]})
    assert (masks["fold1"] == alone).all()
    # a member leaves nothing behind
    assert (teacher.segment(data, properties) == expected).all()


def options(root, dataset, model, cases, **more):
    raw, output = root / "nnUNet_raw" / dataset, root / "labels"
    output.mkdir(exist_ok=True)
    names = [n for n in read(raw / "dataset.json")["labels"] if n not in ("background", "ignore")]
    anatomy = {
        "label_sets": {n: [1] for n in names},
        "everywhere": [],
        "single": [],
        "volumes": {},
        "ellipses": {},
    }
    return {
        "model": str(model),
        "folds": ["all"],
        "configuration": "2d",
        "preprocessed": str(root / "nnUNet_preprocessed" / dataset),
        "cases": cases,
        "images": {c: [str(raw / f"imagesUn/{c}_0000.nii.gz")] for c in cases},
        "channels": 1,
        "output": str(output),
        "lines": str(output / "part_all_0of1.jsonl"),
        "ignore": 3,
        "anatomy": anatomy,
        "shapes": [],
        "device": "cpu",
        "mirroring": True,
    } | more


@pytest.mark.parametrize("dataset", ["Dataset902_Regions", "Dataset904_RegionsIgnore"])
def test_regions_and_ignore_label(nnunet, tmp_path, monkeypatch, dataset):
    copy_dataset(nnunet, tmp_path, monkeypatch, dataset)
    model = make_model(tmp_path, dataset)
    label_part(options(tmp_path, dataset, model, ["un_000"]))
    (row,) = read_rows(tmp_path / "labels")
    assert set(row["classes"]) == set(row["voxels"]) == {"whole", "core"}
    decision, target = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"labels/{name}/un_000.nii.gz")))
        for name in ("masks", "targets")
    )
    assert set(np.unique(decision)) <= {0, 1, 2}
    sure = target != 3
    assert (target[sure] == decision[sure]).all() and (~sure).sum() == row["unsure_voxels"] > 0
    assert row["voxels"]["core"] == (decision == 2).sum()
    assert row["voxels"]["whole"] == (decision > 0).sum()


def test_going_on_after_a_kill(own, segmenting):
    model = make_model(own, "Dataset901_Toy")
    cases = [f"un_{k:03d}" for k in range(5)]
    label_part(options(own, "Dataset901_Toy", model, cases[:2]))
    lines = own / "labels/part_all_0of1.jsonl"
    lines.write_text(lines.read_text() + '{"case": "un_002", "stab')  # torn by the kill
    before = {p.name: p.stat().st_mtime_ns for p in (own / "labels/masks").iterdir()}
    # other parts than before: what is done stays done
    second = {"lines": str(own / "labels/part_all_1of2.jsonl")}
    label_part(options(own, "Dataset901_Toy", model, cases[1::2], **second))
    label_part(options(own, "Dataset901_Toy", model, cases))
    assert [row["case"] for row in read_rows(own / "labels")] == cases
    after = {p.name: p.stat().st_mtime_ns for p in (own / "labels/masks").iterdir()}
    assert len(after) == 5 and before.items() <= after.items()
    assert len(lines.read_text().splitlines()) == 2 + 1 + 2  # two, the torn one, two more


def test_a_full_disk_is_told_and_leaves_no_half_mask(own, segmenting, monkeypatch):
    model = make_model(own, "Dataset901_Toy")
    asked = options(own, "Dataset901_Toy", model, ["un_000"])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predict.os, "replace", full)
    with pytest.raises(UserError, match=r"un_000.nii.gz: the disk is full"):
        label_part(asked)
    assert not list((own / "labels/masks").iterdir()) and not read_rows(own / "labels")
    monkeypatch.undo()


def test_checks_of_the_anatomy_are_asked(own, segmenting, monkeypatch):
    model = make_model(own, "Dataset901_Toy")

    def check(labels, spacing, anatomy):
        doubted = np.zeros(labels.shape, bool)
        doubted[0] = True
        return doubted, "too round"

    monkeypatch.setattr(predict, "find_check", lambda name: {"own": check}[name])
    label_part(options(own, "Dataset901_Toy", model, ["un_000"], shapes=["own"]))
    (row,) = read_rows(own / "labels")
    assert row["implausible"] == "too round"
    target = sitk.GetArrayFromImage(sitk.ReadImage(str(own / "labels/targets/un_000.nii.gz")))
    assert (target[0] == 3).all()
    assert json.loads((own / "labels/part_all_0of1.jsonl").read_text())["stability"] > 0
