"""What holds for every trainer."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import TOYS
from make_trainers import start
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.estimate import KeptBytes
from nnunet_ssl.functional import ema_update, full_res
from nnunet_ssl.history import read_log
from nnunet_ssl.naming import trainer_classes
from nnunet_ssl.trainers import SSLTrainer

NAMES = sorted(trainer_classes())
SEMI = [n for n in NAMES if trainer_classes()[n].uses_unlabeled]
# full weight, no threshold, no warm-up: the unlabelled term acts from the first step
FULL = {
    "SSLTrainerSPCL": "+gamma_start=100",
    "SSLTrainerSPCLPretrain": "+gamma_start=100",
    "SSLTrainerC3S3": "+rampup=0",
    "SSLTrainerMEDL": "+rampup=0",
    "SSLTrainerDiffCL": "+rampup=0+warmup=0+ddim_steps=2",
    "SSLTrainer": "+warmup=0+rampup_end=0+threshold_low=0+threshold_high=0"
    "+exchange_probability=0.5",
    "SSLTrainerMeanTeacher": "+rampup=0",
    "SSLTrainerFixMatch": "+warmup=0+threshold=0",
    "SSLTrainerBCP": "+pretrain=0",
    "SSLTrainerCPS": "+rampup=0",
    "SSLTrainerUAMT": "+rampup=0+limit_start=1",
    "SSLTrainerUniMatch": "+threshold=0",
    "SSLTrainerM3HL": "+pretrain=0",
    "SSLTrainerCAD": "+pretrain=0+rampup=0",
    "SSLTrainerTransMedSeg": "+pretrain=0",
    "SSLTrainerERSR": "+pretrain=0+threshold=0.4",
    "SSLTrainerMN": "+supervised=0+turn=0+guided=False",
}
# no unlabelled weight: the twin's step
NONE = {
    "SSLTrainerERSR": "+unsup_weight=0",
    "SSLTrainerSPCL": "+contrast_weight=0",
    "SSLTrainer": "+unsup_weight=0",
    "SSLTrainerMeanTeacher": "+consistency_weight=0",
    "SSLTrainerFixMatch": "+unsup_weight=0",
    "SSLTrainerCPS": "+unsup_weight=0",
    "SSLTrainerUAMT": "+consistency_weight=0",
    "SSLTrainerUniMatch": "+unsup_weight=0",
}
# supervised steps before a full one: terms that need a teacher which has found the class
TAUGHT = {"SSLTrainerERSR": 100, "SSLTrainerDiffCL": 30}
# memory is declared for the default settings, but pretrained weights are no matter
DECLARED = {"SSLTrainerMN": "+backbone=pvt_v2_b2+tuning=lora"}
# features of some steps are remembered before a full one: terms that need a memory
REMEMBERING = {"SSLTrainerDiffCL"}


def taught(trainer, steps):
    """The trainer after so many supervised steps, the teacher being the student."""
    optimizer = torch.optim.Adam(trainer.student.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = next(trainer.dataloader_train)
        trainer.loss(trainer.student(batch["data"]), batch["target"]).backward()
        optimizer.step()
    if steps:
        trainer.start_companions()
    return trainer


def configuration_of(name):
    return "3d_fullres" if "3d" in trainer_classes()[name].dims else "2d"


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def widened(trainer):
    """Give it nnU-Net's width and depth: what the network keeps outweighs what losses keep."""
    arch = trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]
    arch["features_per_stage"] = [32, 64, 64]
    arch["n_conv_per_stage"], arch["n_conv_per_stage_decoder"] = [2] * 3, [2] * 2
    return trainer


def assert_predicts_as_declared(trainer, atol=1e-6):
    """Check the final checkpoint with nnU-Net's own predictor, and return it."""
    folder = Path(trainer.output_folder)
    saved = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    builder = nnUNetTrainer if trainer.deploys_stock else type(trainer)
    assert saved["trainer_name"] == builder.__name__
    stock = builder.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.num_heads,
        enable_deep_supervision=False,
    )
    stock.load_state_dict(saved["network_weights"], strict=True)
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",))
    deployed = trainer.teacher if trainer.deploy == "teacher" else trainer.network
    for key, value in deployed.state_dict().items():
        assert torch.equal(predictor.network.state_dict()[key].cpu(), value.cpu())
    size = 1, trainer.num_input_channels, *trainer.configuration_manager.patch_size
    x = torch.randn(size, device=trainer.device)
    with torch.no_grad():
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        predicted = predictor.network.to(x.device).eval()(x)
        assert torch.allclose(predicted, full_res(deployed.eval()(x)), atol=atol)
    return predictor


def states(trainer):
    """A copy of all that training changes: part -> name -> tensor."""
    found = {m: getattr(trainer, m).state_dict() for m in ("network", "companions")}
    for phase in trainer._phases:
        state = phase.optimizer.state_dict()["state"]
        found[f"optimizer {phase.name}"] = {
            f"{k}.{name}": state[k][name] for k in state for name in state[k]
        }
    return {part: {k: v.detach().clone() for k, v in some.items()} for part, some in found.items()}


def whole_and_continued(make, monkeypatch, second):
    """Run one trainer to its end; kill another one after two epochs and continue it.

    Args:
        make: makes a trainer that saves every epoch.
        second: results folder of the other one.

    Returns:
        Both after their last epoch, and the states with which the second one continued.
    """
    whole = make()
    whole.run_training()

    monkeypatch.setenv("nnUNet_results", str(second))
    killed = make()

    def kill(trainer_self):
        raise KeyboardInterrupt

    original = type(killed).on_epoch_start
    monkeypatch.setattr(
        type(killed), "on_epoch_start", lambda t: kill(t) if t.current_epoch == 2 else original(t)
    )
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    monkeypatch.setattr(type(killed), "on_epoch_start", original)
    with open(Path(killed.output_folder) / "ssl_log.jsonl", "a") as f:
        f.write('{"epoch": 2, "torn')

    continued = make()
    continued.load_checkpoint(str(Path(continued.output_folder) / "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    before = states(continued)
    continued.run_training()
    return whole, continued, before


@pytest.mark.parametrize("name", NAMES)
def test_stock_finder_finds_it_and_the_same_class_each_time(name, nnunet):
    found = recursive_find_trainer_class_by_name(f"{name}+seed=3")
    assert found.__name__ == f"{name}+seed=3"
    assert issubclass(found, trainer_classes()[name])
    assert found.seed == 3
    assert recursive_find_trainer_class_by_name(f"{name}+seed=3") is found
    assert recursive_find_trainer_class_by_name(name) is trainer_classes()[name]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("dataset", TOYS)
@pytest.mark.parametrize("name", SEMI)
def test_full_step_trains_what_is_declared_and_moves_the_teacher(
    name, dataset, configuration, make_trainer, monkeypatch
):
    cls = trainer_classes()[name]
    options = TOYS[dataset]
    refused = (options.get("regions") and not cls.supports_regions) or (
        "3d" if configuration.startswith("3d") else "2d"
    ) not in cls.dims
    if refused:
        with pytest.raises(NotImplementedError, match=name):
            make_trainer(name + FULL[name], dataset, configuration)
        return
    trainer = start(make_trainer(name + FULL[name], dataset, configuration))
    taught(trainer, TAUGHT.get(name, 0))
    trained = [m for phase in trainer._phases for m in phase.modules]
    still = [m for m in trainer.companions.values() if all(m is not t for t in trained)]
    batches = [next(trainer.dataloader_train) for _ in range(4 if name in TAUGHT else 1)]
    data = [Batch.from_loader(b, trainer.device) for b in batches]
    batch = batches[-1]
    if name in REMEMBERING:
        for d in data:
            for _ in trainer.losses(d):
                pass
            trainer.after_step({k: v[-1:] for k, v in trainer._observed.items()})
    seen = []
    monkeypatch.setattr(
        trainer, "after_step", lambda observed: seen.append(copy.deepcopy(dict(observed)))
    )
    before, before_still = [parameters(m) for m in trained], [parameters(m) for m in still]
    unsup_only = {}
    reached = set()

    for terms in (t for d in data for phase in trainer._phases for t in phase.losses(d)):
        for key, value in terms.items():
            assert key.startswith(("sup", "unsup"))
            assert torch.isfinite(value), key
            if not value.requires_grad:
                continue
            for i, module in enumerate(trained):
                grads = torch.autograd.grad(
                    value, list(module.parameters()), allow_unused=True, retain_graph=True
                )
                size = sum(g.abs().sum().item() for g in grads if g is not None)
                if size > 0:
                    reached.add(i)
                    if key.startswith("unsup"):
                        unsup_only[key] = unsup_only.get(key, 0) + size
    assert unsup_only, "no unlabelled term has a gradient"
    assert reached == set(range(len(trained))), "a trained module gets no gradient"

    trainer.train_step(batch)
    assert seen, "after_step is called once a step"
    for module, old in zip(trained, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old, parameters(module), strict=True))
    for module, old in zip(still, before_still, strict=True):
        assert all(p.grad is None for p in module.parameters())
        for a, b in zip(old, parameters(module), strict=True):
            assert torch.equal(a, b)  # until after_step

    if trainer.teacher is None:
        return
    expected = copy.deepcopy(trainer.teacher)
    monkeypatch.undo()
    trainer.step = 1
    decay = trainer.teacher_decay()
    assert 0 < decay < 1
    ema_update(expected, trainer.student, decay)
    trainer.after_step(seen[0])
    for a, b in zip(expected.parameters(), trainer.teacher.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        *((n, "") for n in sorted(NONE) if n != "SSLTrainer"),
        ("SSLTrainer", "+labeled_mix=0"),
        ("SSLTrainer", "+labeled_mix=auto"),
    ],
)
def test_no_unlabeled_weight_is_the_twin_exactly(name, mix, make_trainer):
    twin = start(make_trainer(f"SSLTrainerSupervised{mix}", configuration=configuration_of(name)))
    batches = [next(twin.dataloader_train) for _ in range(3)]
    trainer = start(make_trainer(name + NONE[name] + "+ema_decay=auto" + mix))
    trainer.student.load_state_dict(twin.student.state_dict())
    trainer.teacher.load_state_dict(twin.teacher.state_dict())
    with_unlabeled = next(trainer.dataloader_train)
    trainer.step = twin.step = 5  # past every warm-up
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        twin.train_step(dict(batch))
        torch.manual_seed(seed)
        trainer.train_step(
            {**batch, **{k: v for k, v in with_unlabeled.items() if k == "unlabeled"}}
        )
    for module in ("student", "teacher"):
        pairs = zip(
            getattr(twin, module).parameters(), getattr(trainer, module).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


# pre-training by contrast has no annotations
@pytest.mark.parametrize("name", [n for n in NAMES if n != "SSLTrainerSPCLPretrain"])
def test_every_trainer_can_mix_its_annotated_patches(name, make_trainer, monkeypatch):
    trainer = start(make_trainer(f"{name}{FULL.get(name, '')}+labeled_mix=0.5"))
    monkeypatch.setattr(trainer, "mix_share", lambda: 1.0)
    mixed, mix = [], trainer.mix_labeled
    monkeypatch.setattr(trainer, "mix_labeled", lambda *args: mixed.append(mix(*args)) or mixed[-1])
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    shown, other = (mixed[0].x_l == x for x in (batch["data"], batch["data"].roll(1, 0)))
    assert (shown | other).all() and not shown.all() and not other.all()
    gradients = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_twin_steps_like_stock_nnunet(dataset, make_trainer):
    twin = start(make_trainer("SSLTrainerSupervised", dataset))
    stock = copy.copy(twin)
    stock.network = copy.deepcopy(twin.network)
    stock.optimizer = torch.optim.SGD(
        stock.network.parameters(), twin.initial_lr, weight_decay=3e-5, momentum=0.99, nesterov=True
    )
    for _ in range(3):
        batch = next(twin.dataloader_train)
        ours = twin.train_step(batch)["loss"]
        theirs = nnUNetTrainer.train_step(stock, batch)["loss"]
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)
    for a, b in zip(twin.network.parameters(), stock.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_predicts_as_declared(name, make_trainer, tmp_path):
    trainer = make_trainer(name)
    trainer.run_training()
    assert_predicts_as_declared(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_killed_after_two_epochs_and_continued_is_bit_exact(
    name, make_trainer, monkeypatch, tmp_path
):
    def make():
        return make_trainer(f"{name}{FULL.get(name, '')}+save_every=1")

    whole, continued, _ = whole_and_continued(make, monkeypatch, tmp_path / "second")
    a, b = (states(t) for t in (whole, continued))
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert all(a[f"optimizer {phase.name}"] for phase in whole._phases)
    logs = [read_log(Path(t.output_folder) / "ssl_log.jsonl") for t in (whole, continued)]
    for a, b in zip(*logs, strict=True):
        a.pop("seconds"), b.pop("seconds")
        assert a == b
    assert [r["epoch"] for r in logs[1]] == [0, 1, 2, 3]


def test_killed_after_a_search_for_foreground_and_continued_is_bit_exact(
    make_trainer, monkeypatch, tmp_path
):
    """The searches are at the start of epochs 1 and 3, the kill is between them."""
    name = "SSLTrainer+warmup=0.25+rampup_end=0.25+unlabeled_foreground=0.5+save_every=1"
    label, forced = SSLTrainer.label, []

    def watched(trainer, batch):
        forced.append((trainer.current_epoch, batch.forced_fg_u.any().item()))
        return label(trainer, batch)

    monkeypatch.setattr(SSLTrainer, "label", watched)
    whole, continued, _ = whole_and_continued(
        lambda: make_trainer(name, configuration="2d"), monkeypatch, tmp_path / "second"
    )
    a, b = (states(t) for t in (whole, continued))
    assert all(torch.equal(a[part][k], b[part][k]) for part in a for k in a[part])
    assert {epoch for epoch, any_forced in forced if any_forced} == {1, 2, 3}
    for trainer in (whole, continued):
        files = sorted(Path(trainer.output_folder).glob("unlabeled_foreground_*"))
        assert [f.name for f in files] == [f"unlabeled_foreground_{i}.npz" for i in (1, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_state_lives_in_modules_and_optimizers(name, make_trainer):
    trainer = start(make_trainer(name))
    trainer.train_step(next(trainer.dataloader_train))
    transient = {"_meter", "_observed"}
    for key, value in vars(trainer).items():
        if key in transient or isinstance(value, nn.Module):
            continue
        assert not isinstance(value, torch.Tensor), key
        if isinstance(value, dict | list | tuple):
            values = value.values() if isinstance(value, dict) else value
            assert not any(isinstance(v, torch.Tensor | np.ndarray) for v in values), key


@pytest.mark.parametrize("name", SEMI)
def test_masks_of_unlabeled_cases_do_not_exist_and_are_not_asked_for(
    name, make_trainer, nnunet, monkeypatch
):
    raw = nnunet / "nnUNet_raw" / "Dataset901_Toy"
    unlabeled = {p.name.removesuffix("_0000.nii.gz") for p in (raw / "imagesUn").iterdir()}
    assert unlabeled
    for case in unlabeled:
        assert not list(raw.rglob(f"labels*/{case}*"))
    trainer = start(make_trainer(name + FULL[name]))
    folder = Path(trainer.preprocessed_dataset_folder)
    opened = []
    import blosc2

    original = blosc2.open

    def watch(urlpath, *args, **kwargs):
        opened.append(Path(urlpath))
        return original(urlpath, *args, **kwargs)

    monkeypatch.setattr(blosc2, "open", watch)
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
    drawn = {p.name.removesuffix(".b2nd").removesuffix("_seg") for p in opened}
    assert drawn & unlabeled
    for path in opened:
        case = path.name.removesuffix(".b2nd").removesuffix("_seg")
        assert path.parent == (folder if case not in unlabeled else Path(f"{folder}_unlabeled"))
        if case in unlabeled and path.name.endswith("_seg.b2nd"):
            assert set(np.unique(original(str(path))[:])) <= {-1, 0}


def kept_for_backward(trainer):
    """The most bytes that steps keep for the backward pass."""
    start(widened(trainer))
    batch = next(trainer.dataloader_train)
    with KeptBytes(trainer.network, trainer.companions) as kept:
        for _ in range(3):
            trainer.train_step(batch)
    return kept.peak


@pytest.fixture(scope="module")
def kept_by_twin():
    """Configuration -> what steps of the supervised twin keep, measured once."""
    return {}


@pytest.mark.parametrize("name", SEMI)
def test_memory_stays_near_what_is_declared(name, make_trainer, kept_by_twin):
    twin = configuration_of(name)
    if twin not in kept_by_twin:
        supervised = make_trainer("SSLTrainerSupervised", configuration=twin)
        kept_by_twin[twin] = kept_for_backward(supervised)
        assert kept_by_twin[twin] > 0
    trainer = make_trainer(name + FULL[name] + DECLARED.get(name, ""))
    ratio = kept_for_backward(trainer) / kept_by_twin[twin]
    # small patches: losses weigh more than at a planned size, where what is declared holds
    assert 0.75 * trainer.step_memory <= ratio <= 1.25 * max(1, trainer.step_memory)
