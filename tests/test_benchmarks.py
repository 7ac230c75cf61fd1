"""The arithmetic of the measuring scripts, and what they measure beside our trainers."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nnunet_ssl.data.unlabeled import (
    manifest_path,
    preprocessing_key,
    read_manifest,
    unlabeled_folder,
)
from nnunet_ssl.naming import trainer_classes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pool_scaling
    import step_cost

    return step_cost, pool_scaling


@pytest.fixture
def loop(scripts):
    torch.manual_seed(0)

    def network():
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def loss(logits, target):
        return cross_entropy(logits, target[:, 0])

    loop = scripts[0].ResearchLoop(network(), network(), loss, torch.device("cpu"))
    loop.threshold = 0.4
    return loop


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    views = torch.randn(4, 2, 8, 8, generator=generator)
    target = (x > 0).long() + (x > 1).long()
    return {"data": x, "target": target}, {"data": views}


def test_ratios_do_not_see_a_machine_that_slows_down(scripts):
    step_cost, _ = scripts
    twin, method = [1.0, 1.2, 1.1, 0.9], [2.0, 2.6, 2.1, 1.9]
    slow = [1, 4, 2, 9]
    expected = step_cost.ratios(method, twin)
    drifted = step_cost.ratios(
        [t * s for t, s in zip(method, slow, strict=True)],
        [t * s for t, s in zip(twin, slow, strict=True)],
    )
    assert drifted == expected
    middle, low, high = expected
    assert low < middle < high
    assert step_cost.ratios(twin, twin, scale=2) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "samples", "share"),
    [
        ("SSLTrainerSupervised", 1, 0),
        ("SSLTrainer", 2, 1 / 2),
        ("SSLTrainerMeanTeacher", 2, 1 / 2),
        ("SSLTrainerFixMatch", 2, 1 / 2),
        ("SSLTrainerBCP", 1, 1),
        ("SSLTrainerCPS", 4, 1 / 4),
    ],
)
def test_declared_costs_are_the_bound(name, samples, share, scripts):
    assert trainer_classes()[name].step_cost == pytest.approx(scripts[0].bound(samples, share))


def test_the_research_loop_learns_and_its_teacher_follows(loop):
    old = [p.detach().clone() for p in loop.teacher.parameters()]
    first = loop.train_step(batches())
    for before, now, student in zip(
        old, loop.teacher.parameters(), loop.student.parameters(), strict=True
    ):
        assert torch.allclose(now, loop.decay * before + (1 - loop.decay) * student)
        assert now.grad is None
    for _ in range(60):
        last = loop.train_step(batches())
    assert last["supervised"] < 0.8 * first["supervised"]
    assert last["loss"] == pytest.approx(last["supervised"] + loop.weight * last["unsupervised"])


def test_pseudo_labels_of_the_research_loop_teach_where_they_count(scripts):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    label, mask = torch.randint(3, (2, 4, 4)), torch.zeros(2, 4, 4)
    mask[:, :2] = 1
    loss = scripts[0].pseudo_label_loss(logits, label, mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:, :, :2].abs().sum(1) > 0).all()
    assert (gradient[:, :, 2:] == 0).all()
    sure = 100 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    assert scripts[0].pseudo_label_loss(sure, label, mask).item() == pytest.approx(0, abs=1e-5)
    nothing = scripts[0].pseudo_label_loss(logits, label, torch.zeros_like(mask))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing.isfinite() and gradient.isfinite().all()


def test_a_made_pool_is_a_valid_one(scripts, tmp_path, monkeypatch):
    _, pool_scaling = scripts
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    base = tmp_path / "preprocessed" / "Dataset901_Toy"
    identifier = "nnUNetPlans_3d_fullres"
    plans = {
        "plans_name": "nnUNetPlans",
        "dataset_name": "Dataset901_Toy",
        "transpose_forward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"3d_fullres": {"architecture": {}, "data_identifier": identifier}},
    }
    folder = unlabeled_folder(base, identifier)
    images = tmp_path / "raw" / base.name / "imagesUn"
    for place in (folder, images):
        place.mkdir(parents=True)
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (folder / f"un_000{ending}").write_text(ending)
    (images / "un_000_0000.nii.gz").write_text("image")
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    key = preprocessing_key(plans, "3d_fullres")
    manifest = {"format": 1, "preprocessing": key, "cases": {"un_000": {"content": "x"}}}
    manifest_path(base, identifier).write_text(json.dumps(manifest))

    made = pool_scaling.make_pool(base, 902, 7)
    made_plans = json.loads((made / "nnUNetPlans.json").read_text(encoding="utf-8"))
    assert made_plans["dataset_name"] == made.name
    cases = read_manifest(made, made_plans, "3d_fullres")["cases"]
    assert len(cases) == 7
    raw = tmp_path / "raw" / made.name / "imagesUn"
    assert {p.name.removesuffix("_0000.nii.gz") for p in raw.iterdir()} == set(cases)


def test_half_of_a_pool_is_inverted_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import spoil_pool

    source, target = tmp_path / "Dataset001_A", tmp_path / "Dataset002_B"
    (source / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {f"c{i}": rng.integers(3, 256, (2, 3, 4)).astype(np.uint8) for i in range(6)}
    for case, image in images.items():
        path = source / "imagesTr" / f"{case}_0000.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(image), str(path))
    listed = tmp_path / "list.txt"
    listed.write_text("# in their order\nc5\nc0\nc1\n\nc2\nc3\nc4\n")
    pool = spoil_pool.pool_of(listed, 1, 2)
    assert pool == ["c0", "c1", "c2"]
    spoil_pool.spoil(source, target, pool[::2])
    for case, image in images.items():
        read = {}
        for folder in (source, target):
            path = folder / "imagesTr" / f"{case}_0000.nii.gz"
            read[folder] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert (read[source] == image).all()
        change = int(image.max()) + int(image.min()) - image.astype(int)
        assert (read[target] == (change if case in ("c0", "c2") else image)).all()


def test_blocks_become_their_mean_and_their_most_frequent_label(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import shrink_dataset

    source, target = tmp_path / "Dataset001_A", tmp_path / "Dataset002_ABy2"
    rng = np.random.default_rng(0)
    image = rng.normal(size=(4, 7, 6)).astype(np.float32)
    mask = rng.choice([0, 1, 3], (4, 7, 6)).astype(np.uint8)
    for folder, array in (("imagesTr", image), ("labelsTr", mask)):
        (source / folder).mkdir(parents=True)
        written = sitk.GetImageFromArray(array)
        written.SetSpacing((0.5, 1.0, 2.0))
        name = "c_0000.nii.gz" if folder == "imagesTr" else "c.nii.gz"
        sitk.WriteImage(written, str(source / folder / name))
    (source / "dataset.json").write_text('{"file_ending": ".nii.gz"}')
    (source / "conversion.json").write_text("{}")
    (source / "cases.csv").write_text("case,patient\nc,1\n")
    shrink_dataset.shrink(source, target, [2, 2, 1])

    assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}
    small = sitk.ReadImage(str(target / "imagesTr" / "c_0000.nii.gz"))
    labels = sitk.ReadImage(str(target / "labelsTr" / "c.nii.gz"))
    assert small.GetSpacing() == labels.GetSpacing() == (1.0, 2.0, 2.0)
    assert small.GetOrigin() == labels.GetOrigin()
    small, labels = sitk.GetArrayFromImage(small), sitk.GetArrayFromImage(labels)
    assert small.shape == labels.shape == (4, 3, 3)
    for z, y, x in np.ndindex(small.shape):
        block = (z, slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
        assert abs(small[z, y, x] - image[block].mean()) < 1e-6
        assert labels[z, y, x] == np.bincount(mask[block].ravel()).argmax()

    told = tmp_path / "Dataset003_ABy2"
    shrink_dataset.shrink(source, told, [2, 2, 1], spacing=[3.0, 3.0, 10.0])
    for path in (told / "imagesTr" / "c_0000.nii.gz", told / "labelsTr" / "c.nii.gz"):
        assert sitk.ReadImage(str(path)).GetSpacing() == (3.0, 3.0, 10.0)


# PSFHS of entry 5, made by an earlier version: other test images and other draws
OLDER_DATA = {"psfhs_cpu"}


def test_results_of_one_data_set_share_their_test_cases():
    """Else rows of two folders must not stand beside each other (journal, entry 12)."""
    cases_of: dict[str, dict[frozenset[str], list[str]]] = {}
    for path in sorted((BENCHMARKS / "results").glob("*/runs.json")):
        if path.parent.name in OLDER_DATA:
            continue
        source = json.loads(path.read_text(encoding="utf-8"))["dataset"]
        with gzip.open(path.with_name("results.csv.gz"), "rt", encoding="utf-8") as file:
            cells: dict[str, set[str]] = {}
            for row in csv.DictReader(file):
                cells.setdefault(row["cell"], set()).add(row["case"])
        for cell, cases in cells.items():
            places = cases_of.setdefault(source, {}).setdefault(frozenset(cases), [])
            places.append(f"{path.parent.name}/{cell}")
    assert len(cases_of) > 5
    for source, groups in cases_of.items():
        assert len(groups) == 1, (source, [places[:3] for places in groups.values()])
