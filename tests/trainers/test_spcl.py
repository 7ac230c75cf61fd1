import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import pair_losses, partition
from nnunet_ssl.history import read_log
from nnunet_ssl.naming import resolve
from nnunet_ssl.trainers import SSLTrainerSPCL as Trainer

MODULE = __import__(Trainer.__module__, fromlist=["random_flips"])
PRETRAIN, SPCL = "SSLTrainerSPCLPretrain", "SSLTrainerSPCL"
OPEN = "+gamma_start=100"  # every pair counts from the start
CONFIGURATIONS = ["2d", "3d_fullres"]
DECODER = ("stages", "transpconvs", "seg_layers")


@pytest.fixture
def own_data(nnunet, tmp_path, monkeypatch):
    """A copy of the preprocessed toy data that a test may change."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(nnunet / name / "Dataset901_Toy", tmp_path / name / "Dataset901_Toy")
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_preprocessed/Dataset901_Toy"


@pytest.fixture
def ready(make_trainer):
    """Return a function that makes a started trainer and a batch."""

    def make(name=PRETRAIN + OPEN, configuration="2d", dataset="Toy"):
        trainer = make_trainer(name, dataset, configuration)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device)

    return make


def copies(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def table(folder, **columns):
    """Write cases.csv for the eight toy cases."""
    cases = [f"tr_{i:03d}" for i in range(3)] + [f"un_{i:03d}" for i in range(5)]
    rows = [",".join(["case", *columns])]
    rows += [
        ",".join([case, *map(str, r)]) for case, *r in zip(cases, *columns.values(), strict=True)
    ]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")


# ---------------------------------------------------------------- no mask is read


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_pretraining_opens_no_mask_from_start_to_end(
    configuration, own_data, make_trainer, tmp_path, monkeypatch
):
    def run(results):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        trainer = make_trainer(PRETRAIN + OPEN, configuration=configuration)
        trainer.run_training()
        trainer.perform_actual_validation()
        folder = Path(trainer.output_folder)
        terms = [r["terms"] for r in read_log(folder / "ssl_log.jsonl")]
        return (
            trainer,
            terms,
            json.loads((folder / "meta_label_retrieval.json").read_text(encoding="utf-8")),
        )

    with_masks = run("first")
    # no annotation is left anywhere
    annotated = own_data / f"nnUNetPlans_{configuration}"
    for case in ("tr_000", "tr_001", "tr_002"):
        (annotated / f"{case}_seg.b2nd").unlink()
        write_pickle({"class_locations": "spoilt"}, str(annotated / f"{case}.pkl"))
    shutil.rmtree(own_data / "gt_segmentations")
    shutil.rmtree(own_data.parents[1] / "nnUNet_raw/Dataset901_Toy/labelsTr")
    opened = []
    original = blosc2.open
    monkeypatch.setattr(
        blosc2,
        "open",
        lambda urlpath, *a, **k: opened.append(urlpath) or original(urlpath, *a, **k),
    )
    without = run("second")
    assert with_masks[1:] == without[1:]
    assert {k: v.sum() for k, v in with_masks[0].network.state_dict().items()} == {
        k: v.sum() for k, v in without[0].network.state_dict().items()
    }
    cases = {Path(path).name for path in opened}
    assert len(cases) == 8 and not any("_seg" in name for name in cases)  # not even padding masks
    assert not (Path(without[0].output_folder) / "validation").exists()


def test_all_images_are_used_and_those_of_the_validation_fold_are_not(ready, make_trainer):
    trainer, _ = ready()
    drawn = {key for _ in range(12) for key in next(trainer.dataloader_train)["unlabeled"]["keys"]}
    assert drawn == set(trainer.contrast_cases().identifiers) and len(drawn) == 8
    held_back = make_trainer(PRETRAIN, fold=0)
    _, val = held_back.do_split()
    assert len(val) == 1 and not set(val) & set(held_back.contrast_cases().identifiers)


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_encoder_and_projectors_learn_and_the_decoder_stays(ready, configuration):
    trainer, _ = ready(configuration=configuration)
    before = copies(trainer.network.encoder)
    decoder = {n: copies(getattr(trainer.network.decoder, n)) for n in DECODER}
    projectors = copies(trainer.companions["projectors"])
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    after = trainer.network.encoder.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.items())
    assert any(
        not torch.equal(v, trainer.companions["projectors"].state_dict()[k])
        for k, v in projectors.items()
    )
    for module, old in decoder.items():
        new = getattr(trainer.network.decoder, module).state_dict()
        assert all(torch.equal(v, new[k]) for k, v in old.items())


def test_the_rate_of_the_published_schedule_is_logged(make_trainer):
    trainer = make_trainer(f"{PRETRAIN}+warmup=0.25")
    trainer.run_training()
    assert type(trainer.optimizer) is torch.optim.RAdam
    rates = [r["lr"] for r in trainer._history.records]
    assert rates == pytest.approx([5e-7, 2e-4, 1.5e-4, 5e-5], rel=0.01)
    assert trainer.logger.get_value("lrs", step=None) == rates


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_chunks_give_the_gradient_of_the_whole_batch(ready, configuration):
    trainer, batch = ready(f"{PRETRAIN}{OPEN}+contrast_batches=2", configuration)
    assert len(batch.x_u) == 4 * trainer.batch_size
    modules = [trainer.network.encoder, trainer.companions["projectors"]]
    found = []
    for chunk in (len(batch.x_u), 3):
        for module in modules:
            module.zero_grad()
        values: dict = {}
        for terms in trainer.contrast(batch.x_u, batch.valid_u, batch.meta_u, chunk, 1.0):
            sum(terms.values()).backward()
            values |= {k: values.get(k, 0) + v.item() for k, v in terms.items()}
        found.append((values, [p.grad.clone() for m in modules for p in m.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_pretrained_weights_are_taken_up_and_hold_no_projector(make_trainer):
    source = make_trainer(PRETRAIN + OPEN)
    source.run_training()
    path = str(Path(source.output_folder) / "checkpoint_final.pth")
    saved = torch.load(path, weights_only=False)
    assert not any("projector" in key for key in saved["network_weights"])
    assert saved["ssl_state"]["companions"].keys() == {"projectors"}
    for name in (SPCL, "SSLTrainer", "SSLTrainerSupervised"):
        trainer = make_trainer(name)
        trainer.initialize()
        load_pretrained_weights(trainer.network, path)
        trainer.on_train_start()
        for key, value in source.network.encoder.state_dict().items():
            assert torch.equal(trainer.deployed_network().encoder.state_dict()[key], value)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", [PRETRAIN, SPCL])
def test_terms_are_the_weighted_contrast_of_each_label(ready, name, configuration, monkeypatch):
    trainer, batch = ready(f"{name}+pace=none+weights=1,0.5", configuration)
    weight = 1.0 if name == PRETRAIN else trainer.contrast_weight
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: x + 1)
    monkeypatch.setattr(
        MODULE, "random_flips", lambda n, axes, chance: torch.zeros(n, len(axes)).bool()
    )
    terms: dict = {}
    for part in trainer.losses(batch):
        terms |= {k: terms.get(k, 0) + v for k, v in part.items()}
    x = batch.x_u if name == PRETRAIN else torch.cat([batch.views["stock"], batch.x_u + 1])
    feature = trainer.network.encoder(x)[-1]
    flat = configuration == "2d"
    vectors = feature.mean((2, 3)) if flat else feature.mean((3, 4)).transpose(1, 2).flatten(0, 1)
    repeats = len(x) // len(batch.x_u)
    slices = len(vectors) // len(x)
    if flat:
        z = batch.meta_u["position"][:, 0]
    else:  # all of the toy patches lies in the scan
        assert batch.valid_u.float().mean() > 0.9
        z_map, inside = batch.meta_u["z_map"], batch.valid_u.float()
        pooled = [
            (m.unflatten(2, (slices, -1))).sum((1, 3, 4, 5)).flatten()
            for m in (z_map * inside, inside)
        ]
        z = pooled[0] / pooled[1]
    labels = {
        "partition": (3 * z).long().clamp(0, 2),
        "patient": batch.meta_u["case"].repeat_interleave(slices),
    }
    for k, (label, lam) in enumerate(zip(labels, (1.0, 0.5), strict=True)):
        embedding = trainer.companions["projectors"][k](vectors)
        pairs = pair_losses(embedding, labels[label].repeat(repeats), 0.07)
        positives = pairs.positive.sum(1)
        rows = (pairs.loss * pairs.positive).sum(1)[positives > 0] / positives[positives > 0]
        torch.testing.assert_close(
            terms[f"unsup_{label}"], weight * lam * rows.mean(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_second_view_is_flipped_with_its_places(ready, configuration, monkeypatch):
    trainer, batch = ready(SPCL, configuration)
    seen = {}

    def flips(number, axes, chance):
        seen["chance"] = chance
        return torch.arange(number)[:, None] % 2 == torch.zeros(len(axes))  # every other patch

    monkeypatch.setattr(MODULE, "random_flips", flips)
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: x + 1)
    monkeypatch.setattr(
        trainer,
        "contrast",
        lambda x, valid, meta, *rest: seen.update(x=x, valid=valid, **meta) or [],
    )
    batch.valid_u[..., :3] = False
    list(trainer.losses(batch))
    assert seen["chance"] == 0.8
    half, every = len(batch.x_u), tuple(range(2, batch.x_u.ndim))
    maps = {"x": (batch.views["stock"], batch.x_u + 1), "valid": (batch.valid_u, batch.valid_u)}
    if configuration == "3d_fullres":  # the slices' parts of the scan
        maps["z_map"] = (batch.meta_u["z_map"],) * 2
    else:
        assert torch.equal(seen["position"], batch.meta_u["position"].repeat(2, 1))
    for name, (first, second) in maps.items():
        assert torch.equal(seen[name][:half], first)
        for i, (found, image) in enumerate(zip(seen[name][half:], second, strict=True)):
            moved = image if i % 2 else image.flip([a - 1 for a in every])
            assert torch.equal(found, moved), name


@pytest.mark.parametrize("pace", ["linear", "hard"])
def test_pace_opens_with_the_epochs(ready, pace):
    trainer, batch = ready(f"{PRETRAIN}+pace={pace}+gamma_start=0")
    gammas, weights = [], []
    for epoch in range(5):
        trainer.current_epoch = epoch
        trainer._meter.means()
        list(trainer.losses(batch))
        means = trainer._meter.means()
        gammas.append(means["pseudo_labels/gamma_partition"])
        weights.append(means["pseudo_labels/pair_weight_partition"])
    assert gammas == sorted(gammas) and weights == sorted(weights)
    assert gammas[1] == pytest.approx((gammas[0] + gammas[4]) / 2)  # a quarter of the way
    assert weights[0] < 0.8 < weights[4]


def test_half_precision_gives_the_same_contrast(ready):
    trainer, batch = ready(f"{PRETRAIN}{OPEN}+contrast_batches=1")
    feature = trainer.network.encoder(batch.x_u)[-1]
    trainer._encode = lambda network, x: feature
    plain = [t for t in trainer.losses(batch)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [t for t in trainer.losses(batch)]
    for a, b in zip(plain, cast, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_residual_encoders_work_too(own_data, make_trainer):
    path = own_data / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            arch = configuration["architecture"]
            arch["network_class_name"] = arch["network_class_name"].replace(
                "PlainConvUNet", "ResidualEncoderUNet"
            )
            kwargs = arch["arch_kwargs"]
            kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    path.write_text(json.dumps(plans))
    for name in (PRETRAIN, SPCL):
        trainer = make_trainer(name + OPEN)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        assert trainer.train_step(next(trainer.dataloader_train))["loss"] > 0


def test_teacher_beside_the_contrast(ready):
    name = f"{SPCL}{OPEN}+consistency_weight=0.8+ema_decay=0.999"
    trainer, batch = ready(name)
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    *_, last = trainer.losses(batch)
    p, q = (
        (net(x)[0] if net is trainer.student else net(x)).softmax(1)
        for net, x in ((trainer.student, batch.views["stock"]), (trainer.teacher, batch.x_u))
    )
    expected = 0.8 * ((p - q) ** 2).mean(1, keepdim=True)[batch.valid_u].mean()
    torch.testing.assert_close(last["unsup_mse"], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- meta-labels


def test_columns_of_the_table_become_labels(own_data, ready):
    table(
        own_data, phase=["ED", "ES"] * 4, patient=list("aabbccdd"), site=[""] * 4 + ["x", "y"] * 2
    )
    trainer, batch = ready(f"{PRETRAIN}{OPEN}+meta_labels=partition,phase,patient,site")
    assert trainer.used_labels == ["partition", "phase", "patient", "site"]
    labels, counted = trainer.label_values(batch.meta_u, batch.valid_u, 1)
    truth = {
        line.split(",")[0]: line.split(",")[1:]
        for line in (own_data / "cases.csv").read_text(encoding="utf-8").splitlines()
    }
    assert counted.all()
    for i, key in enumerate(batch.keys_u):
        phase, patient, site = truth[key]
        assert labels["phase"][i] == ["ED", "ES"].index(phase)
        assert labels["patient"][i] == "abcd".index(patient)
        assert labels["site"][i] == (["x", "y"].index(site) if site else -1)
    terms = next(iter(trainer.losses(batch)))
    assert terms.keys() == {f"unsup_{n}" for n in trainer.used_labels}
    assert trainer.weight_of("partition") == 1 and trainer.weight_of("site") == 0.1


def test_a_column_that_is_not_there_is_named(own_data, make_trainer):
    with pytest.raises(UserError, match=r"cases\.csv is missing.*case, phase"):
        make_trainer(f"{PRETRAIN}+meta_labels=phase").on_train_start()
    table(own_data, patient=range(8))
    with pytest.raises(UserError, match=r"cases\.csv has no column 'phase'"):
        make_trainer(f"{SPCL}+meta_labels=phase").on_train_start()


def test_labels_that_tell_nothing_are_left_out_and_told(own_data, make_trainer):
    table(own_data, phase=["ED"] * 8, site=[1] * 7 + [""])
    trainer = make_trainer(f"{PRETRAIN}+meta_labels=phase,partition,site")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert trainer.used_labels == ["partition"]
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text(encoding="utf-8")
    assert "meta-label phase is left out: it is the same for all cases" in log
    trainer.train_step(next(trainer.dataloader_train))
    with pytest.raises(UserError, match=r"No meta-label .* is left for Dataset901_Toy.*cases\.csv"):
        make_trainer(f"{PRETRAIN}+meta_labels=phase,site").on_train_start()


class OneSlice:
    """Cases of a data set of pictures."""

    identifiers = ("a", "b", "c")

    def load_case(self, case):
        return np.zeros((1, 1, 8, 8)), None, None, {}


def test_pictures_have_neither_parts_nor_patients(make_trainer, monkeypatch):
    trainer = make_trainer(f"{PRETRAIN}+meta_labels=partition,patient,self", configuration="2d")
    monkeypatch.setattr(trainer, "contrast_cases", OneSlice)
    assert trainer.used_labels == ["self"]
    trainer = make_trainer(PRETRAIN, configuration="2d")
    monkeypatch.setattr(trainer, "contrast_cases", OneSlice)
    trainer.print_to_log_file("")
    with pytest.raises(UserError, match=r"meta_labels=COLUMN, or use \+meta_labels=self"):
        trainer.check_data()


def test_the_slice_itself_as_label_is_simclr(ready):
    trainer, batch = ready(f"{PRETRAIN}+meta_labels=self+pace=none+contrast_batches=1")
    (terms,) = trainer.losses(batch)
    z = torch.nn.functional.normalize(trainer.embed(batch.x_u)[0], dim=1)
    s = (z @ z.T / 0.07).fill_diagonal_(-torch.inf)
    n = len(z) // 2
    twin = torch.arange(2 * n).roll(n)
    torch.testing.assert_close(terms["unsup_self"], torch.nn.functional.cross_entropy(s, twin))
    with pytest.raises(UserError, match="without self in 3D"):
        ready(f"{PRETRAIN}+meta_labels=self", "3d_fullres")


def test_parts_of_a_mirrored_patch_are_mirrored(ready):
    trainer, batch = ready(configuration="3d_fullres")
    slices = trainer.network.encoder(batch.x_u)[-1].shape[2]
    labels, counted = trainer.label_values(batch.meta_u, batch.valid_u, slices)
    turned = {"case": batch.meta_u["case"], "z_map": batch.meta_u["z_map"].flip(2)}
    other, also = trainer.label_values(turned, batch.valid_u.flip(2), slices)
    shape = (len(batch.x_u), slices)
    assert torch.equal(labels["partition"].view(shape).flip(1), other["partition"].view(shape))
    assert torch.equal(counted.view(shape).flip(1), also.view(shape))
    assert len(labels["partition"].unique()) == 3
    outside = torch.zeros_like(batch.valid_u)
    assert not trainer.label_values(batch.meta_u, outside, slices)[1].any()


def test_slices_find_their_part_in_another_scan_when_features_tell_it(ready, monkeypatch):
    """The score of both validations: perfect and useless features."""
    trainer, _ = ready(configuration="2d")
    batches = [next(trainer.dataloader_val) for _ in range(6)]

    def tells_position(network, x):
        (batch,) = [b for b in batches if b["data"].shape == x.shape and torch.equal(b["data"], x)]
        part = partition(batch["meta"]["position"][:, 0], 3)
        return torch.eye(3)[part][:, :, None, None]

    trainer._encode = tells_position
    scores = trainer.score([trainer.validation_step(b) for b in batches])
    assert scores["partition"]["retrieval"] == 1 and 0.1 < scores["partition"]["chance"] < 0.7
    assert scores.keys() == {"partition", "patient"}
    trainer._encode = lambda network, x: torch.ones(len(x), 3, 1, 1)
    scores = trainer.score([trainer.validation_step(b) for b in batches])
    assert scores["partition"]["retrieval"] < 0.8


def test_validation_of_an_epoch_is_logged_in_place_of_dice(make_trainer):
    short = "+num_epochs=2+num_iterations_per_epoch=1+num_val_iterations_per_epoch=4"
    trainer = make_trainer(PRETRAIN + short, short=False)
    trainer.run_training()
    for record in trainer._history.records:
        assert 0 <= record["pseudo_labels"]["retrieval_partition"] <= 1
        assert record["pseudo_dice"] == {} and "sup" not in record["terms"]
        assert record["patches"]["labeled"] == 0 and record["patches"]["unlabeled"] > 0
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text(encoding="utf-8")
    assert "Nearest slice has the same meta-label: partition" in log


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("partitions=1", "at least 2"),
        ("weights=-1", "0 or more"),
        ("weights=()", "at least one"),
        ("meta_labels=patient,patient", "different names"),
        ("meta_labels=case", "none of case, position, z_map"),
        ("temperature=0", "above 0"),
        ("contrast_batches=0", "auto, or at least 1"),
        ("warmup=1", "in [0, 1)"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(UserError) as error:
        resolve(f"{PRETRAIN}+{setting}")
    assert setting.split("=")[0] in str(error.value) and words in str(error.value)


def test_consistency_needs_a_teacher():
    with pytest.raises(UserError, match=r"consistency_weight=0.8 must be 0 without a teacher"):
        resolve(f"{SPCL}+consistency_weight=0.8")
