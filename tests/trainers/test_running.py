"""A run from its start to its end: data checks, logs, old runs, checkpoints, phases."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_trainers import next_batch, start, values
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn

from nnunet_ssl import base
from nnunet_ssl.base import Phase, SemiSupervisedTrainer
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import full_res
from nnunet_ssl.history import read_log
from nnunet_ssl.naming import resolve
from nnunet_ssl.trainers import SSLTrainer


@pytest.fixture
def own_data(nnunet, tmp_path, monkeypatch):
    """A copy of the toy data that a test may spoil: raw and preprocessed dataset folders."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(nnunet / name / "Dataset901_Toy", tmp_path / name / "Dataset901_Toy")
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw/Dataset901_Toy", tmp_path / "nnUNet_preprocessed/Dataset901_Toy"


def nothing_written(trainer):
    return not list(Path(trainer.output_folder).glob("*.pth"))


# ---------------------------------------------------------------- bad input


def test_not_preprocessed_at_all(own_data, make_trainer):
    _, preprocessed = own_data
    (preprocessed / "nnUNetPlans_3d_fullres_unlabeled.json").unlink()
    trainer = make_trainer("SSLTrainer")
    with pytest.raises(
        UserError, match=r"not preprocessed.*unlabeled\.json is missing.*Run: nnunet"
    ):
        trainer.on_train_start()
    assert nothing_written(trainer)


def test_twin_does_not_need_unlabeled_data(own_data, make_trainer):
    _, preprocessed = own_data
    (preprocessed / "nnUNetPlans_3d_fullres_unlabeled.json").unlink()
    shutil.rmtree(preprocessed / "nnUNetPlans_3d_fullres_unlabeled")
    make_trainer("SSLTrainerSupervised").on_train_start()


def test_preprocessed_for_other_plans(own_data, make_trainer):
    _, preprocessed = own_data
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    path.write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"belongs to plans.*preprocess differently"):
        make_trainer("SSLTrainer").on_train_start()


def test_case_of_both_kinds(own_data, make_trainer):
    _, preprocessed = own_data
    folder = preprocessed / "nnUNetPlans_3d_fullres"
    case = next(p.name.removesuffix(".pkl") for p in folder.glob("*.pkl"))
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(folder / (case + ending), f"{folder}_unlabeled/{case}{ending}")
    manifest = Path(f"{folder}_unlabeled.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["cases"][case] = {"content": "x"}
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"Case '{case}' is in imagesTr and in imagesUn"):
        make_trainer("SSLTrainer").on_train_start()


@pytest.mark.parametrize("change", ["new in", "gone from"])
def test_images_changed_since_preprocessing(own_data, make_trainer, change):
    raw, _ = own_data
    some = sorted((raw / "imagesUn").iterdir())[0]
    if change == "new in":
        shutil.copy(some, some.with_name("another_0000.nii.gz"))
    else:
        some.unlink()
    with pytest.raises(
        UserError, match=rf"{change}.*imagesUn since preprocessing.*Run: nnunet_ssl"
    ):
        make_trainer("SSLTrainer").on_train_start()


def test_scans_that_do_not_belong_are_named_again_at_the_start(own_data, make_trainer, monkeypatch):
    manifest = next(own_data[1].glob("*3d_fullres_unlabeled.json"))
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["unlike"] = {"un_001": ["layout"]}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    trainer = make_trainer("SSLTrainer")
    said = []
    monkeypatch.setattr(
        trainer, "print_to_log_file", lambda *a, **k: said.append(" ".join(map(str, a)))
    )
    trainer.check_data()
    assert "un_001 (layout)" in said[0] and "1 of 5" in said[0]
    said.clear()
    twin = make_trainer("SSLTrainerSupervised")
    monkeypatch.setattr(twin, "print_to_log_file", lambda *a, **k: said.append(a))
    twin.check_data()
    assert said == []


def test_fold_not_in_the_splits(nnunet, make_trainer, tmp_path):
    with pytest.raises(UserError, match=r"splits_final\.json has folds 0 to 2, not 4"):
        make_trainer("SSLTrainer", fold=4)
    assert not (tmp_path / "results").exists()


def test_split_names_a_case_without_mask(own_data, make_trainer):
    raw, preprocessed = own_data
    unlabeled = sorted(p.name for p in (raw / "imagesUn").iterdir())[0].removesuffix("_0000.nii.gz")
    path = preprocessed / "splits_final.json"
    splits = json.loads(path.read_text(encoding="utf-8"))
    splits[0]["train"].append(unlabeled)
    path.write_text(json.dumps(splits))
    with pytest.raises(UserError, match=rf"splits_final\.json, fold 0, names '{unlabeled}'"):
        make_trainer("SSLTrainer", fold=0).on_train_start()


def test_folds_train_on_their_own_cases(nnunet, make_trainer):
    trainer = make_trainer("SSLTrainer", fold=0)
    trainer.run_training()
    train, val = trainer.do_split()
    assert len(train) == 2 and len(val) == 1 and not set(train) & set(val)


def test_results_folder_not_writable(nnunet, make_trainer, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Cannot write .*file"):
        make_trainer("SSLTrainer")


def test_disk_full_while_saving_keeps_the_old_checkpoint(nnunet, make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainer")
    trainer.run_training()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint_final\.pth: the disk is full"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("spoil", ["other trainer", "no state", "cut short"])
def test_checkpoint_that_cannot_be_continued(nnunet, make_trainer, spoil):
    trainer = make_trainer("SSLTrainerMeanTeacher")
    trainer.run_training()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    name = "SSLTrainerMeanTeacher"
    if spoil == "other trainer":
        name, match = "SSLTrainer", "written by trainer SSLTrainerMeanTeacher"
    elif spoil == "no state":
        saved = torch.load(path, weights_only=False)
        del saved["ssl_state"]
        torch.save(saved, path)
        match = "no semi-supervised state"
    else:
        path.write_bytes(path.read_bytes()[:-2000])
        match = "damaged or cut short"
    with pytest.raises(UserError, match=match):
        make_trainer(name).load_checkpoint(str(path))


@pytest.mark.parametrize(
    ("feature", "change"),
    [
        ("the cascade", lambda c: c.update(previous_stage="3d_lowres")),
        ("3d configurations", None),
    ],
)
def test_unsupported_is_refused_before_a_folder_is_made(
    nnunet, make_trainer, monkeypatch, tmp_path, feature, change
):
    preprocessed = tmp_path / "pre" / "Dataset901_Toy"
    shutil.copytree(nnunet / "nnUNet_preprocessed" / "Dataset901_Toy", preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    if change is None:
        monkeypatch.setattr(SemiSupervisedTrainer, "dims", ("2d",))
    else:
        path = preprocessed / "nnUNetPlans.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        change(plans["configurations"]["3d_fullres"])
        path.write_text(json.dumps(plans))
    with pytest.raises(NotImplementedError, match=rf"SSLTrainer.* does not support {feature}"):
        make_trainer("SSLTrainer", configuration="3d_fullres")
    assert not (tmp_path / "results").exists()


def test_a_network_of_two_stages_is_refused_under_deep_supervision(
    nnunet, make_trainer, monkeypatch, tmp_path
):
    """nnU-Net gives the lowest scale no weight; the loss of the only other one would be 0 / 0."""
    preprocessed = tmp_path / "pre" / "Dataset901_Toy"
    shutil.copytree(nnunet / "nnUNet_preprocessed" / "Dataset901_Toy", preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["n_stages"], kwargs["n_conv_per_stage_decoder"] = 2, [1]
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[name] = kwargs[name][:2]
    path.write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"2d has 2 stages.*\+enable_deep_supervision=false"):
        make_trainer("SSLTrainer", configuration="2d")
    assert not (tmp_path / "results").exists()
    trainer = make_trainer("SSLTrainer+enable_deep_supervision=false", configuration="2d")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()


# ---------------------------------------------------------------- start, end, logs


def test_a_fresh_run_sets_an_old_one_aside(nnunet, make_trainer):
    first = make_trainer("SSLTrainerSupervised")
    first.run_training()
    folder = Path(first.output_folder)
    final = (folder / "checkpoint_final.pth").read_bytes()
    second = make_trainer("SSLTrainerSupervised")
    second.on_train_start()
    assert not list(folder.glob("checkpoint_*.pth"))
    assert (folder / "previous_run_1" / "checkpoint_final.pth").read_bytes() == final
    assert len(read_log(folder / "previous_run_1" / "ssl_log.jsonl")) == 4


def test_seed_makes_a_run_repeat_itself(nnunet, make_trainer):
    ends = []
    for _ in range(2):
        trainer = make_trainer("SSLTrainer+warmup=0+rampup_end=0")
        trainer.run_training()
        ends.append([p.detach().clone() for p in trainer.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_log_tells_terms_weight_coverage_shares_and_dice(nnunet, make_trainer, monkeypatch):
    told = []

    class External:
        def log(self, key, value, step):
            told.append((key, step))

        update_config = log_summary = lambda self, *args: None

    trainer = make_trainer("SSLTrainer+warmup=0+rampup_end=0")
    trainer.logger.loggers.append(External())
    trainer.run_training()
    records = read_log(Path(trainer.output_folder) / "ssl_log.jsonl")
    assert [r["epoch"] for r in records] == [0, 1, 2, 3]
    last = records[-1]
    assert last["terms"].keys() == {"sup", "unsup"}
    assert last["pseudo_labels"]["weight"] == 1
    for name in ("coverage", "confidence", "agreement", "brake"):
        assert 0 <= last["pseudo_labels"][name] <= 1
    assert len(last["shares"]["pseudo"]) == len(last["shares"]["labels"]) == 2
    assert last["pseudo_dice"].keys() == {"student", "teacher"}
    keys = {key for key, _ in told}
    assert {"ssl_terms/unsup", "ssl_pseudo_labels/coverage", "ssl_shares/pseudo/class_1"} <= keys
    assert {"ssl_pseudo_dice/teacher/class_2", "mean_fg_dice"} <= keys


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_what_the_student_does_not_know_teaches_nothing(dataset, nnunet, make_trainer):
    name = "SSLTrainer+warmup=0+rampup_end=0+threshold_low=0+ready_low=0.6+ready_high=0.8"
    trainer = start(make_trainer(f"{name}+labeled_mix=0", dataset, "2d"))
    readiness, batch = trainer.companions["readiness"], next_batch(trainer)

    def unsup(dice):
        readiness.hit.fill_(dice)
        readiness.size.fill_(1)
        torch.manual_seed(1)
        return values(trainer.losses(batch))["unsup"]

    full = unsup(0.8)
    assert unsup(0.6) == 0 and full != 0
    assert unsup(0.65) == pytest.approx(full / 4, rel=1e-4)
    readiness.hit.zero_()
    readiness.size.zero_()
    # what a step observes is the Dice of the student's decisions
    raw = next(trainer.dataloader_train)
    with torch.no_grad():
        logits = full_res(trainer.student(raw["data"]))
    trainer.train_step(raw)
    labels = logits > 0 if trainer.regions else logits.argmax(1, keepdim=True)
    target, known = trainer.known_labels(Batch.from_loader(raw, trainer.device))
    dices = []
    for k in range(labels.shape[1]) if trainer.regions else (1, 2):
        a, b = ((x[:, k : k + 1] > 0) if trainer.regions else x == k for x in (labels, target))
        a, b = a & known, b & known
        if a.any() or b.any():
            dices.append(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    assert readiness.dice().item() == pytest.approx(sum(dices) / len(dices), rel=1e-5)


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_mixed_patches_take_their_labels_along(configuration, dataset, make_trainer):
    trainer = start(make_trainer("SSLTrainer", dataset, configuration))
    batch = next_batch(trainer)
    batch.valid_l = batch.x_l[:, :1] > 0
    inside = torch.rand(batch.valid_l.shape) < 0.3
    inside[0] = False
    mixed = trainer.mix_labeled(batch, inside)
    for of in ("x_l", "target", "valid_l"):
        expected = getattr(batch, of).clone()
        for i, box in enumerate(inside[:, 0]):
            expected[i][:, box] = getattr(batch, of)[i - 1][:, box]
        assert torch.equal(getattr(mixed, of), expected)
    for after, before in zip(mixed.y_l, batch.y_l, strict=True):
        assert torch.equal(after[0], before[0])  # nothing was put into it: as nnU-Net scaled it
        assert not torch.equal(after, before)
    assert mixed.mixed_l and not batch.mixed_l


def test_one_patch_has_none_to_mix_with(nnunet, make_trainer):
    with pytest.raises(UserError, match=r"labeled_mix=0\.5 must be 0: a batch"):
        make_trainer("SSLTrainer+labeled_mix=0.5", batch=1)
    make_trainer("SSLTrainer", batch=1)


@pytest.mark.parametrize(
    ("configuration", "patch", "slices", "cases", "batch", "share"),
    [
        ("2d", (16, 16), 13, 5, 2, 0.5),  # a patch is half of one of 13 slices: 130 patches
        ("2d", (16, 15), 13, 5, 2, 0),
        ("2d", (16, 16), 13, 6, 2, 0),
        ("2d", (16, 16), 13, 5, 1, 0),  # no other patch to take a box from
        ("2d", (16, 32), 2, 4, 2, 0.5),
        ("2d", (16, 32), 1, 4, 2, 0),  # single images
        ("3d_fullres", (13, 16, 16), 13, 65, 2, 0.5),  # half a case
        ("3d_fullres", (13, 16, 16), 13, 66, 2, 0),
        ("3d_fullres", (40, 40, 40), 13, 130, 2, 0.5),  # larger than a case
    ],
)
def test_auto_mixes_where_annotated_scans_hold_few_patches(
    configuration, patch, slices, cases, batch, share, make_trainer, monkeypatch
):
    trainer = make_trainer("SSLTrainerSupervised+labeled_mix=auto", configuration=configuration)
    case = [slices, 16, 32]
    plan = {"median_image_size_in_voxels": case[-len(patch) :], "patch_size": patch}
    trainer.configuration_manager.configuration.update(plan)
    trainer.plans_manager.plans["original_median_shape_after_transp"] = case
    monkeypatch.setattr(trainer, "do_split", lambda: ([str(i) for i in range(cases)], []))
    trainer.batch_size = batch
    said: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", said.append)
    assert trainer.mix_share() == trainer.mix_share() == share
    assert len(said) == 1 and f"in {share:.0%} of the steps" in said[0]


@pytest.mark.parametrize(("share", "times"), [(0, 0), (0.5, 2), (0.95, 4)])
def test_so_many_steps_mix_their_annotated_patches(share, times, make_trainer, monkeypatch):
    trainer = start(make_trainer(f"SSLTrainer+labeled_mix={share}", configuration="2d"))
    seen, losses = [], trainer.losses

    def watched(batch):
        seen.append(batch)
        return losses(batch)

    trainer._phases[0].losses = watched
    draws = iter([0.1, 0.6, 0.4, 0.9])
    monkeypatch.setattr(trainer, "draw", lambda: next(draws))
    size = trainer.companions["readiness"].size
    for _ in range(4):
        before = size.clone()
        trainer.train_step(next(trainer.dataloader_train))
        # readiness is scaled for patches as scans have them
        assert torch.equal(size, before) == seen[-1].mixed_l
    assert sum(batch.mixed_l for batch in seen) == times


def test_readiness_needs_patches_without_boxes(make_trainer):
    with pytest.raises(UserError, match=r"labeled_mix=1\.0 must be auto"):
        make_trainer("SSLTrainer+labeled_mix=1+ready_low=0.7+ready_high=0.9")
    make_trainer("SSLTrainer+labeled_mix=1+ready_low=0+ready_high=0")
    make_trainer("SSLTrainerSupervised+labeled_mix=1")


def test_a_training_too_short_for_unlabeled_scans_says_so(nnunet, make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainer+ready_low=0.98+ready_high=0.99")
    said = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *a, **k: said.append(str(a[0])))
    trainer.run_training()
    # once when they should count fully, once at the end
    first, last = (line for line in said if "unlabelled scans d" in line)
    assert "do not count yet" in first and "did not count" in last
    assert "Train longer" in last


@pytest.mark.parametrize(
    ("longest", "scheme", "expected"),
    [
        (3, "ZScoreNormalization", (False, False)),
        (3.5, "CTNormalization", (True, False)),  # as where nnU-Net turns within slices only
        (3, "RescaleTo01Normalization", (False, True)),
    ],
)
def test_the_strong_view_fits_slices_and_scale(
    longest, scheme, expected, make_trainer, monkeypatch
):
    trainer = make_trainer("SSLTrainer", "Toy", "3d_fullres")
    patch = [8, 8, round(8 * longest)]
    monkeypatch.setitem(trainer.configuration_manager.configuration, "patch_size", patch)
    schemes = [scheme]
    monkeypatch.setitem(
        trainer.configuration_manager.configuration, "normalization_schemes", schemes
    )
    trainer = start(trainer)
    seen = []

    def watched(x, **options):
        seen.append((options["thick_slices"], options["relative_noise"]))
        return x

    monkeypatch.setattr(base, "strong_intensity", watched)
    x = torch.zeros(2, 1, *patch)
    trainer.strong_intensity(x, x > 0)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("epochs", "steps", "ramp"),
    [(1000, 250, (0.1, 0.3)), (20, 250, (0.2, 0.4)), (4, 250, (0.4, 0.6))],
)
def test_first_thousand_steps_are_supervised(epochs, steps, ramp):
    trainer = resolve(f"SSLTrainer+num_epochs={epochs}+num_iterations_per_epoch={steps}")
    assert trainer.ramp() == pytest.approx(ramp)


@pytest.mark.parametrize(("epochs", "horizon"), [(1, 10), (6, 20), (30, 100), (1000, 1000)])
def test_the_average_follows_short_trainings_closely(epochs, horizon, nnunet, make_trainer):
    trainer = make_trainer(
        f"SSLTrainer+num_epochs={epochs}+num_iterations_per_epoch=250", short=False
    )
    trainer.step = trainer.total_steps - 1
    decay = trainer.teacher_decay()
    assert decay == pytest.approx(min(1 - 1 / horizon, 1 - 1 / trainer.total_steps))


def test_curves_are_drawn(nnunet, make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainerMeanTeacher")
    trainer.run_training()
    monkeypatch.undo()  # the fixture leaves plots out
    history = base.History(trainer.output_folder)
    history.cut_back(99)
    history.plot()
    assert (Path(trainer.output_folder) / "ssl_progress.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_are_drawn_with_checkpoints_and_at_the_end(make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainerSupervised+save_every=3")  # of 4 epochs
    drawn = []
    monkeypatch.setattr(base.History, "plot", lambda self: drawn.append(len(self.records)))
    trainer.run_training()
    assert drawn == [3, 4]


@pytest.mark.parametrize(("label_share", "trend"), [(0.2, ""), (0.1, "losing"), (0.1, "inflating")])
def test_a_wrong_share_is_told_in_plain_words(
    nnunet, make_trainer, monkeypatch, label_share, trend
):
    trainer = make_trainer("SSLTrainer+warmup=0+rampup_end=0+threshold_low=0+threshold_high=0")
    said = []
    monkeypatch.setattr(
        trainer, "print_to_log_file", lambda *a, **k: said.append(" ".join(map(str, a)))
    )
    trainer.on_train_start()

    def only_background(x):
        prob = torch.zeros(len(x), 3, *x.shape[2:])
        prob[:, 0] = 1
        return prob

    def thirds(x):
        return torch.rand(len(x), 3, *x.shape[2:]).softmax(1)

    monkeypatch.setattr(trainer, "teacher_prob", only_background if trend == "losing" else thirds)
    # patches without forced foreground tell the true shares
    monkeypatch.setattr(trainer, "label_shares", lambda batch: torch.full((2,), label_share))
    for _ in range(4):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end(
            [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
        )
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
    warnings = [line for line in said if "WARNING: the pseudo-labels are" in line]
    assert len(warnings) == (2 if trend else 0)  # once a class, not every epoch
    assert all(f"are {trend} class" in line for line in warnings)
    if trend == "losing":
        record = read_log(Path(trainer.output_folder) / "ssl_log.jsonl")[-1]
        assert record["shares"]["pseudo"] == [0, 0]
        assert record["pseudo_labels"]["brake"] < 1  # and the unlabelled loss fades


def test_weights_are_kept_on_the_way(nnunet, make_trainer):
    trainer = make_trainer("SSLTrainer+keep_at=0.5,0.7")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    kept = torch.load(folder / "checkpoint_at_50.pth", weights_only=False)
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert kept["network_weights"].keys() == final["network_weights"].keys()
    assert kept["trainer_name"] == "nnUNetTrainer"
    assert not torch.equal(
        next(iter(kept["network_weights"].values())), next(iter(final["network_weights"].values()))
    )
    assert (folder / "checkpoint_at_70.pth").is_file()


def test_latest_checkpoint_at_least_every_ten_epochs(make_trainer):
    assert SemiSupervisedTrainer.save_every <= 10
    with pytest.raises(UserError, match="save_every=11 must be between 1 and 10"):
        make_trainer("SSLTrainer+save_every=11")


def test_pretrained_weights_reach_student_and_teacher(nnunet, make_trainer):
    source = make_trainer("SSLTrainerSupervised")
    source.run_training()
    path = str(Path(source.output_folder) / "checkpoint_final.pth")
    trainer = make_trainer("SSLTrainer")
    trainer.initialize()
    load_pretrained_weights(trainer.network, path)
    trainer.on_train_start()
    weights = torch.load(path, weights_only=False)["network_weights"]
    for network in (trainer.student, trainer.teacher):
        state = network.state_dict()
        for key, value in weights.items():
            if ".seg_layers." not in key:  # nnU-Net never takes these over
                assert torch.equal(state[key], value)
    pairs = zip(trainer.student.parameters(), trainer.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_unlabeled_patches_are_loaded_only_when_needed(nnunet, make_trainer):
    trainer = make_trainer("SSLTrainerFixMatch+warmup=0.5")
    trainer.on_train_start()
    loaded = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        loaded.append("unlabeled" in next(trainer.dataloader_train))
    assert loaded == [False, False, True, True]


# ---------------------------------------------------------------- drawing around foreground


@pytest.mark.parametrize(
    ("configuration", "patch", "median", "share"),
    [
        ("3d_fullres", [8, 16, 16], [16, 32, 32], 1 / 8),
        ("3d_fullres", [16, 64, 16], [16, 32, 32], 1 / 2),
        ("2d", [32, 32], [32, 32], 1 / 16),  # one of 16 slices
    ],
)
def test_share_of_a_case_that_a_patch_holds(configuration, patch, median, share, make_trainer):
    trainer = make_trainer("SSLTrainer+unlabeled_foreground=0.33", configuration=configuration)
    trainer.configuration_manager.configuration |= {
        "patch_size": patch,
        "median_image_size_in_voxels": median,
    }
    assert trainer.patch_share() == pytest.approx(share)
    part, searches = trainer.foreground_searches()
    assert (part, len(searches)) == ((0.33, 2) if share < 0.5 else (0.0, 0))


def test_the_teacher_is_asked_where_foreground_is(nnunet, make_trainer, monkeypatch):
    """Class 1 is where the image is bright, class 2 nowhere: patches are drawn around class 1."""
    name = "SSLTrainer+warmup=0.25+rampup_end=0.25+unlabeled_foreground=0.9"
    trainer = make_trainer(name, configuration="2d")
    told = []
    monkeypatch.setattr(
        trainer, "print_to_log_file", lambda *text, **_: told.extend(map(str, text))
    )
    trainer.on_train_start()

    def bright(x):
        return torch.stack([0 * x[:, 0], x[:, 0] - 1, 0 * x[:, 0] - 9], 1)

    monkeypatch.setattr(trainer.teacher, "forward", bright)
    batches = {}
    for epoch in range(3):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer._unlabeled_active.value = True
        batches[epoch] = [next_batch(trainer) for _ in range(10)]
    assert trainer._places.number == 1
    assert not any(b.forced_fg_u.any() for b in batches[0])
    forced = torch.cat([b.forced_fg_u for n in (1, 2) for b in batches[n]]).float().mean()
    assert 0.7 < forced < 1
    for case, found in trainer._places.now().items():
        data, *_ = trainer._unlabeled_cases().load_case(case)
        assert set(found) == {1}
        where = found[1].T
        assert data[:][tuple(where)].min() > 1
        assert len(where.T) == min((data[:] > 1).sum(), 1000)
    assert "sees foreground in" in " ".join(told)
    # a fresh run does not draw around what an earlier one found
    again = make_trainer(name, configuration="2d")
    again.on_train_start()
    folder = Path(again.output_folder)
    assert not list(folder.glob("unlabeled_foreground_*"))
    assert (folder / "previous_run_1" / "unlabeled_foreground_1.npz").is_file()


def test_patches_drawn_around_foreground_do_not_count_as_class_shares(nnunet, make_trainer):
    """Else a vanishing class would look larger than it is, and the brake would be released."""
    trainer = start(make_trainer("SSLTrainer+warmup=0+rampup_end=0", configuration="2d"))
    batch = next_batch(trainer)
    shares = []
    for forced in (torch.zeros(len(batch.x_u)), torch.arange(len(batch.x_u)) > 0):
        batch.forced_fg_u = forced.bool()
        trainer._observed.clear()
        trainer.label(batch)
        shares.append(trainer._observed["pseudo_shares"][0])
    alone = trainer.teacher_prob(batch.x_u[:1]).argmax(1, keepdim=True)
    valid = batch.valid_u[:1]
    expected = [((alone == k) & valid).sum() / valid.sum() for k in (1, 2)]
    assert torch.allclose(shares[1], torch.stack(expected))
    assert not torch.equal(*shares)


def test_pieces_are_looked_for_only_when_pseudo_labels_count(nnunet, make_trainer, monkeypatch):
    trainer = start(make_trainer("SSLTrainer+warmup=0.5+largest_component=on", "Toy", "2d"))
    trainer._unlabeled_active.value = True
    batch = next_batch(trainer)
    filtered = []
    monkeypatch.setattr(trainer, "keep_largest", lambda x, valid, mode: filtered.append(mode) or x)
    for step, times in ((3, 0), (6, 1)):
        trainer.step = step
        values(trainer.losses(batch))
        assert trainer._observed["confidences"]  # labelled all the same
        assert len(filtered) == times


def two_pieces(trainer):
    """Probabilities (1, K, 32, 32) with 16 and 4 voxels of class 1, apart, all of them sure."""
    label = torch.zeros(1, 1, 32, 32, dtype=torch.int64)
    label[..., 2:6, 2:6] = label[..., 20:22, 20:22] = 1
    return 0.98 * torch.zeros(1, trainer.num_heads, 32, 32).scatter(1, label, 1.0) + 0.005, label


@pytest.mark.parametrize(
    ("mode", "dataset", "share", "kept"),
    [
        ("auto", "Toy", None, 16),
        ("off", "Toy", None, 20),
        ("auto", "Toy", 0.2, 20),  # a patch may cut an organ in two
        ("on", "Toy", 0.2, 16),
        ("auto", "Ignore", None, 20),  # partial annotations do not tell
    ],
)
def test_smaller_pieces_become_background(mode, dataset, share, kept, make_trainer, monkeypatch):
    trainer = start(make_trainer(f"SSLTrainer+largest_component={mode}", dataset, "2d"))
    batch = next_batch(trainer)
    batch.x_u, batch.valid_u = batch.x_l[:1], torch.ones_like(batch.valid_l[:1])
    batch.forced_fg_u = torch.zeros(1, dtype=torch.bool)
    prob, label = two_pieces(trainer)
    monkeypatch.setattr(trainer, "teacher_prob", lambda x: prob)
    if share is not None:
        monkeypatch.setattr(trainer, "patch_share", lambda of_slice: share)
    labels, counted = trainer.label(batch)
    assert torch.equal(labels, label) and counted.all()  # the smaller piece teaches background
    labels = trainer.keep_pieces(labels, batch.valid_u)
    assert (labels == 1).sum() == kept and torch.equal(labels[..., :10], label[..., :10])
    # what the teacher sees in padding is no piece, so the smaller one is the largest
    padded = batch.valid_u.clone()
    padded[..., 2:6, 2:6] = False
    left = trainer.keep_pieces(label, padded)[padded]
    assert torch.equal(left, label[padded])


@pytest.mark.parametrize("dataset", ["Toy", "Regions"])
def test_what_a_teacher_sees_in_padding_is_no_piece_for_copy_paste_methods(make_trainer, dataset):
    trainer = start(make_trainer("SSLTrainerBCP+largest_component=on", dataset, "2d"))
    batch = next_batch(trainer)
    batch.valid_u = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    prob, label = two_pieces(trainer)
    if trainer.regions:
        prob = (label == 1) * 0.9 + torch.zeros_like(prob)
    for large_one_in_padding, kept in ((False, 16), (True, 4)):
        batch.valid_u[..., 2:6, 2:6] = not large_one_in_padding
        assert (trainer.pseudo_labels(prob, batch)[:, -1] > 0).sum() == kept


def test_few_annotated_cases_do_not_tell_that_a_class_is_one_piece(make_trainer):
    flat, whole = (start(make_trainer("SSLTrainer", "Toy", c)) for c in ("2d", "3d_fullres"))
    assert flat._find_single_piece() == [1, 2]  # from slices
    assert whole._find_single_piece() == []  # three scans
    assert start(make_trainer("SSLTrainerBCP", "Toy", "3d_fullres"))._find_single_piece() == [1, 2]


@pytest.mark.parametrize(
    ("slices", "trainer", "found"),
    [(50, "SSLTrainer", [1]), (49, "SSLTrainer", []), (49, "SSLTrainerBCP", [1])],
)
def test_the_default_filters_only_what_is_nearly_always_one_piece(
    slices, trainer, found, make_trainer, monkeypatch
):
    """Class 1 is in two pieces in one slice, class 2 in two slices out of three."""
    labels = np.zeros((1, slices, 8, 8), np.int8)
    labels[:, :, 1:3, 1:3] = 1
    labels[:, 0, 6, 6] = 1
    labels[:, :, 4, ::3] = labels[:, ::3, 4, :] = 2
    cases = SimpleNamespace(identifiers=["case"], load_case=lambda name: (None, labels, None, {}))
    made = start(make_trainer(trainer, "Toy", "2d"))
    monkeypatch.setattr(made, "get_tr_and_val_datasets", lambda: (cases, None))
    assert made._find_single_piece() == found
    log = Path(made.log_file).read_text()
    assert ("largest piece of class 1 only" in log) == bool(found)


# ---------------------------------------------------------------- phases


class Alternating(SemiSupervisedTrainer):
    """Two updates a step: the student, then a judge of its output, each against the other."""

    supports_regions = supports_ignore = True

    def build_companions(self):
        conv = nn.Conv3d if len(self.configuration_manager.patch_size) == 3 else nn.Conv2d
        return {"judge": conv(self.num_heads, 1, 1)}

    def phases(self):
        judge = self.companions["judge"]
        adam = torch.optim.Adam(judge.parameters(), 1e-3)
        return [
            Phase("student", [self.network], self.optimizer, self.losses),
            Phase("judge", [judge], adam, self.judge_losses, schedule=lambda s: 1 - s),
        ]

    def losses(self, batch: Batch):
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        judged = self.companions["judge"](full_res(self.student(batch.x_u)).softmax(1))
        yield {"unsup_fool": judged.mean()}

    def judge_losses(self, batch: Batch):
        with torch.no_grad():
            prob = full_res(self.student(batch.x_u)).softmax(1)
        yield {"unsup_judge": self.companions["judge"](prob).square().mean()}


@pytest.fixture
def alternating(nnunet, make_trainer, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.trainers.Alternating", Alternating, raising=False)
    import nnunet_ssl.trainers

    monkeypatch.setattr(
        nnunet_ssl.trainers, "__all__", [*nnunet_ssl.trainers.__all__, "Alternating"]
    )
    return lambda settings="": make_trainer("Alternating" + settings)


def test_phases_train_their_own_modules_with_their_own_schedule(alternating):
    trainer = alternating()
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    student, judge = trainer._phases
    assert judge.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5)
    assert student.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**0.9)
    batch = next(trainer.dataloader_train)
    data = Batch.from_loader(batch, trainer.device)
    seen = {}
    step_terms = {}
    before = [p.detach().clone() for p in trainer.companions["judge"].parameters()]
    trainer._run_phase(student, data, step_terms)
    seen["judge"] = [p.grad for p in trainer.companions["judge"].parameters()]
    assert all(g is None for g in seen["judge"])  # frozen while the student moves
    after = list(trainer.companions["judge"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    weights = [p.detach().clone() for p in trainer.student.parameters()]
    trainer._run_phase(judge, data, step_terms)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, trainer.companions["judge"].parameters(), strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(weights, trainer.student.parameters(), strict=True)
    )
    assert step_terms.keys() == {"sup", "unsup_fool", "unsup_judge"}


def test_phases_resume_with_their_optimizers(alternating, nnunet):
    trainer = alternating()
    trainer.run_training()
    path = str(Path(trainer.output_folder) / "checkpoint_final.pth")
    again = alternating()
    again.load_checkpoint(path)
    saved = trainer._phases[1].optimizer.state_dict()
    loaded = again._phases[1].optimizer.state_dict()
    assert saved["state"].keys() == loaded["state"].keys() and saved["state"]
    for key, value in saved["state"].items():
        assert torch.equal(value["exp_avg"], loaded["state"][key]["exp_avg"])
    assert torch.equal(trainer.companions["judge"].weight, again.companions["judge"].weight)


# ---------------------------------------------------------------- losses of the base


@pytest.mark.parametrize("dataset", ["Toy", "Ignore", "Regions", "RegionsIgnore", "Channels"])
def test_masked_and_pseudo_losses_keep_the_scale_of_nnunets(make_trainer, dataset):
    trainer = make_trainer("SSLTrainer", dataset)
    trainer.on_train_start()
    data = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    output = trainer.student(data.x_l)
    everything = torch.ones_like(data.valid_l)
    stock = trainer.loss(output, data.y_l)
    assert torch.allclose(trainer.masked_loss(output, data.target, everything), stock, atol=1e-6)

    half = everything.clone()
    half[..., : half.shape[-1] // 2] = False
    spoiled = torch.where(half, data.target, torch.zeros_like(data.target))
    a, b = (trainer.masked_loss(output, t, half) for t in (data.target, spoiled))
    # coarse scales take their voxels from kept ones only, so the rest cannot matter
    assert torch.allclose(a, b, atol=1e-6)
    none = trainer.masked_loss(output, data.target, torch.zeros_like(half))
    gradients = torch.autograd.grad(none, trainer.student.parameters(), allow_unused=True)
    assert none.isfinite() and all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("dataset", ["Toy", "Regions", "RegionsIgnore"])
def test_pseudo_loss_has_the_cross_entropy_of_nnunet(make_trainer, dataset, monkeypatch):
    trainer = make_trainer("SSLTrainer+enable_deep_supervision=false", dataset)
    trainer.on_train_start()
    data = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    output = trainer.student(data.x_l)
    everything = torch.ones_like(data.valid_l)
    labels = torch.zeros_like(data.target[:, : trainer.num_heads if trainer.regions else 1])
    # no foreground: the Dice of the pseudo-label is left out, nnU-Net's is smooth / volume
    monkeypatch.setattr(trainer, "_masked_dice", lambda *a, **k: 0)
    stock = trainer.masked_loss(output, trainer.as_target(labels), everything)
    weight = torch.ones_like(labels)
    assert torch.allclose(trainer.pseudo_loss(output, labels, weight, everything), stock, rtol=1e-4)


@pytest.fixture
def spoilt(make_trainer, monkeypatch):
    """Start a trainer; then run one step in which a loss is NaN, and one without."""

    def make(find, name):
        trainer = make_trainer("SSLTrainerFixMatch+warmup=0+threshold=0")
        trainer.on_train_start()
        trainer.said = []
        monkeypatch.setattr(
            trainer, "print_to_log_file", lambda *a, **k: trainer.said.append(" ".join(map(str, a)))
        )
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        holder = find(trainer)
        right = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a: right(*a) * float("nan"))
        outputs = [trainer.train_step(next(trainer.dataloader_train))]
        trainer.after_bad_step = [p.detach().clone() for p in trainer.student.parameters()]
        monkeypatch.setattr(holder, name, right)
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
        trainer.on_train_epoch_end(outputs)
        with torch.no_grad():
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
        return trainer

    return make


def test_a_pseudo_loss_that_is_not_finite_leaves_the_annotated_part_of_the_step(
    spoilt, make_trainer
):
    twin = make_trainer("SSLTrainerFixMatch+warmup=0+threshold=0+unsup_weight=0")
    twin.on_train_start()
    twin.on_epoch_start()
    twin.on_train_epoch_start()
    twin.train_step(next(twin.dataloader_train))
    trainer = spoilt(lambda t: t, "pseudo_loss")
    for spoilt_weight, weight in zip(
        trainer.after_bad_step, twin.student.parameters(), strict=True
    ):
        assert torch.equal(spoilt_weight, weight)
    assert all(p.isfinite().all() for p in trainer.student.parameters())
    assert any("1 steps of this epoch learnt from the annotated" in line for line in trainer.said)
    record = trainer._history.records[-1]
    assert (record["steps_without_pseudo"], record["steps_left_out"]) == (1, 0)
    assert record["precision"] == "float32"


def test_a_step_that_is_not_finite_is_left_out_and_told(spoilt, make_trainer):
    untrained = make_trainer("SSLTrainerFixMatch")
    untrained.on_train_start()
    trainer = spoilt(lambda t: t.loss, "forward")
    for spoilt_weight, weight in zip(
        trainer.after_bad_step, untrained.student.parameters(), strict=True
    ):
        assert torch.equal(spoilt_weight, weight)
    moved = list(trainer.student.parameters())
    assert all(p.isfinite().all() for p in moved)
    assert not torch.equal(trainer.after_bad_step[0], moved[0])
    assert any("1 steps of this epoch were left out" in line for line in trainer.said)


def test_scaled_gradients_that_are_not_finite(make_trainer, monkeypatch):
    """A NaN costs the unlabelled part; too large a scale does, too, but is no fault."""
    twin = make_trainer("SSLTrainerFixMatch+warmup=0+threshold=0+unsup_weight=0")
    trainer = make_trainer("SSLTrainerFixMatch+warmup=0+threshold=0")
    for one in (twin, trainer):
        one.on_train_start()
        one.on_epoch_start()
        one.on_train_epoch_start()
        if one is twin:
            one.train_step(next(one.dataloader_train))
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    batch, right = next(trainer.dataloader_train), trainer.pseudo_loss
    monkeypatch.setattr(trainer, "pseudo_loss", lambda *a: right(*a) * float("nan"))
    trainer.train_step(dict(batch))
    weights = [p.detach().clone() for p in trainer.student.parameters()]
    for a, b in zip(weights, twin.student.parameters(), strict=True):
        assert torch.equal(a, b)  # scales are powers of 2
    assert trainer.grad_scaler.get_scale() == 2.0**16
    assert (trainer._dropped_pseudo, trainer._skipped_steps) == (1, 0)

    monkeypatch.setattr(trainer, "pseudo_loss", lambda *a: right(*a) * 1000)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train_step(dict(batch))
    assert all(p.isfinite().all() for p in trainer.student.parameters())
    assert trainer.grad_scaler.get_scale() == 2.0**126
    assert (trainer._dropped_pseudo, trainer._skipped_steps) == (1, 0)


@pytest.mark.parametrize("spoilt", ["pseudo_loss", "loss"])
def test_losses_that_are_not_finite_do_not_wear_the_scale_out(make_trainer, monkeypatch, spoilt):
    """Halved by each it would end at 0: no gradient is left then, and 0 times inf is NaN."""
    trainer = make_trainer("SSLTrainerFixMatch+warmup=0+threshold=0")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    batch = next(trainer.dataloader_train)
    of, name = (trainer, spoilt) if spoilt == "pseudo_loss" else (trainer.loss, "forward")
    right = getattr(of, name)
    monkeypatch.setattr(of, name, lambda *a: right(*a) * float("nan"))
    for _ in range(6):
        trainer.train_step(dict(batch))
    assert trainer.grad_scaler.get_scale() == 2.0**3
    dropped = (6, 0) if spoilt == "pseudo_loss" else (0, 6)
    assert (trainer._dropped_pseudo, trainer._skipped_steps) == dropped
    monkeypatch.undo()
    before = [p.detach().clone() for p in trainer.student.parameters()]
    trainer.train_step(dict(batch))
    after = list(trainer.student.parameters())
    assert all(p.isfinite().all() for p in after)
    assert not torch.equal(before[0], after[0])


def test_the_teacher_never_trains(make_trainer):
    """Its first labels are made before the first epoch."""
    trainer = make_trainer("SSLTrainer")
    trainer.on_train_start()
    assert not any(m.training for m in trainer.teacher.modules())
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    assert not any(m.training for m in trainer.teacher.modules())
    assert all(m.training for m in trainer.student.modules())


def test_best_checkpoint_after_continuing(make_trainer, monkeypatch):
    """nnU-Net saves the latest checkpoint before it notes that the epoch was the best one."""
    trainer = make_trainer("SSLTrainerSupervised+save_every=1")
    trainer.run_training()
    trainer._best_ema = 0.0
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=False)
    assert saved["_best_ema"] == trainer.logger.get_value("ema_fg_dice", step=-1) > 0


def test_no_teacher(make_trainer):
    trainer = make_trainer("SSLTrainerSupervised+ema_decay=None+deploy=student")
    trainer.run_training()
    assert trainer.teacher is None
    record = read_log(Path(trainer.output_folder) / "ssl_log.jsonl")[-1]
    assert record["pseudo_dice"].keys() == {"student"}
    with pytest.raises(UserError, match="ema_decay=None must be a number or auto"):
        make_trainer("SSLTrainerBCP+ema_decay=None")


def test_nothing_is_computed_only_to_be_printed(make_trainer, monkeypatch):
    """nnU-Net's debug file reads every attribute; none may be an expensive property."""
    monkeypatch.setattr(
        SemiSupervisedTrainer, "_find_single_piece", lambda self: pytest.fail("asked for")
    )
    make_trainer("SSLTrainerBCP").on_train_start()


def test_both_directions_of_bcp_reach_forced_patches(make_trainer, monkeypatch):
    """nnU-Net forces foreground into the last patches; a fixed half would never show it."""
    trainer = make_trainer("SSLTrainerBCP+pretrain=0")
    trainer.on_train_start()
    data = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    centre = tuple(s // 2 for s in data.x_l.shape[2:])
    seen = set()
    masked_loss = trainer.masked_loss

    def watch(output, target, keep):
        seen.add((bool(keep[0, 0][centre]), bool(keep[-1, 0][centre])))
        return masked_loss(output, target, keep)

    monkeypatch.setattr(trainer, "masked_loss", watch)
    for _ in range(12):
        for _ in trainer.losses(data):
            pass
    # a half each time, and each way round
    assert {(True, False), (False, True)} == seen


# ---------------------------------------------------------------- plans


def edit_plans(preprocessed, edit):
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    edit(plans["configurations"])
    path.write_text(json.dumps(plans))


@pytest.mark.parametrize("name", ["SSLTrainer", "SSLTrainerBCP"])
def test_residual_encoder_plans(own_data, make_trainer, name):
    def residual(configurations):
        architecture = configurations["3d_fullres"]["architecture"]
        architecture["network_class_name"] = (
            "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        )
        kwargs = architecture["arch_kwargs"]
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")

    edit_plans(own_data[1], residual)
    trainer = make_trainer(name)
    trainer.run_training()
    assert type(trainer.student).__name__ == "ResidualEncoderUNet"
    assert read_log(Path(trainer.output_folder) / "ssl_log.jsonl")[-1]["terms"]["unsup"] != 0


def test_lowres_trains_and_its_cascade_is_refused(own_data, make_trainer):
    def lowres(configurations):
        configurations["3d_lowres"] = {
            "inherits_from": "3d_fullres",
            "next_stage": "3d_cascade_fullres",
        }
        configurations["3d_cascade_fullres"] = {
            "inherits_from": "3d_fullres",
            "previous_stage": "3d_lowres",
        }

    edit_plans(own_data[1], lowres)
    trainer = make_trainer("SSLTrainer", configuration="3d_lowres")
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    with pytest.raises(NotImplementedError, match="the cascade"):
        make_trainer("SSLTrainer", configuration="3d_cascade_fullres")


def test_unlabeled_preprocessed_for_another_configuration(own_data, make_trainer):
    _, preprocessed = own_data
    shutil.rmtree(preprocessed / "nnUNetPlans_2d_unlabeled")
    (preprocessed / "nnUNetPlans_2d_unlabeled.json").unlink()
    make_trainer("SSLTrainer").on_train_start()  # the other one is not touched
    with pytest.raises(UserError, match=r"not preprocessed for configuration 2d.*-c 2d"):
        make_trainer("SSLTrainer", configuration="2d").on_train_start()


def test_the_drift_gauge_changes_nothing_and_sees_the_teacher_move(make_trainer, monkeypatch):
    def two_epochs(name):
        trainer = make_trainer(name + "+warmup=0+rampup_end=0+threshold_low=0+threshold_high=0")
        trainer.on_train_start()
        for _ in range(2):
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
            trainer.on_train_epoch_end(steps)
            trainer.on_validation_epoch_start()
            with torch.no_grad():
                trainer.on_validation_epoch_end(
                    [trainer.validation_step(next(trainer.dataloader_val))]
                )
            trainer.on_epoch_end()
        return trainer

    gauged = two_epochs("SSLTrainer")
    records = [r["drift"] for r in gauged._history.records]
    assert all(len(r["volume"]) == len(r["coverage"]) == len(r["agreement"]) == 2 for r in records)
    assert any(r["changed"] for r in records)
    patches, valid = gauged.fixed_patches(3)
    assert patches.shape[0] == 4 and patches.shape[2:] == valid.shape[2:]  # whole batches of 2
    assert torch.equal(gauged.fixed_patches(3)[0], patches)
    monkeypatch.setattr(SSLTrainer, "measure_drift", lambda self: {})
    monkeypatch.setattr(SSLTrainer, "on_train_start", SemiSupervisedTrainer.on_train_start)
    blind = two_epochs("SSLTrainer")
    assert [r["drift"] for r in blind._history.records] == [{}, {}]
    for a, b in zip(gauged.student.parameters(), blind.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_drift_is_told_when_it_begins_and_every_fifty_epochs(make_trainer, monkeypatch, tmp_path):
    name = "SSLTrainer+num_epochs=1000+num_iterations_per_epoch=1+warmup=0+rampup_end=0.0225"
    trainer = make_trainer(name, short=False)
    said = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *a, **k: said.append(str(a[0])))

    class Gauge:
        """The student follows less and less, all the time."""

        def measure(self):
            return {"coverage": [0.8, float("nan")], "agreement": [1 - 0.006 * epoch, None]}

    trainer._gauge = Gauge()
    trainer._history = base.History(tmp_path)
    told = []
    for epoch in range(130):
        if epoch == 60:  # a continued run
            trainer._history = base.History(tmp_path)
            trainer._history.cut_back(60)
        trainer.step = (epoch + 1) * trainer.num_iterations_per_epoch
        drift = {} if epoch == 3 else trainer.measure_drift()  # an epoch without the gauge
        trainer._history.append({"epoch": epoch, "progress": trainer.progress, "drift": drift})
        if said:
            told.append(epoch)
            assert len(said) == 1 and "confirm their own mistakes" in said.pop()
    assert told == [22, 71, 121]  # the first epoch after the ramp, then the 50th and 100th


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bfloat16_only_on_a_cpu_that_has_it(has_bf16, make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(base, "cpu_has_bf16", lambda: has_bf16)
    trainer = start(make_trainer("SSLTrainerSupervised+bf16_on_cpu=true", "Toy", "2d"))
    found = []
    trainer.student.register_forward_hook(lambda m, x, out: found.append(full_res(out).dtype))
    trainer.train_step(next(trainer.dataloader_train))
    assert found == [torch.bfloat16 if has_bf16 else torch.float32]
    assert str(found[0]) == f"torch.{trainer.precision}"
    assert ("this CPU has no bfloat16" in capsys.readouterr().out) is not has_bf16
