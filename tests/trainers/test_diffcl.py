"""What is Diff-CL's own."""

import copy
import math
from pathlib import Path

import pytest
import torch
from make_trainers import next_batch, start, values
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.functional import normalize, one_hot

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.export import export_model
from nnunet_ssl.functional import (
    alpha_bars,
    draw_per_class,
    full_res,
    gather_places,
    propagation_loss,
)
from nnunet_ssl.modules import HighFrequencyMamba, Tapped
from nnunet_ssl.naming import resolve

FULL = "SSLTrainerDiffCL+rampup=0+warmup=0+ddim_steps=3"
DATASETS = ("Toy", "Regions", "Ignore", "RegionsIgnore")


def all_losses(trainer, batch):
    for phase in trainer._phases:
        yield from phase.losses(batch)


def with_bank(trainer):
    """Fill the bank, as if labelled features had been seen."""
    bank = trainer.companions["bank"]
    groups, _, size = bank.vectors.shape
    bank.update(torch.randn(groups, 20, size), torch.ones(groups, 20).bool())
    return trainer


def ignored_voxels(trainer, batch):
    if trainer.regions:
        return batch.target[:, -1:].bool()
    return batch.target == trainer.label_manager.ignore_label


# ---------------------------------------------------------------- the step


def test_step_equals_the_formulas(make_trainer):
    name = "SSLTrainerDiffCL+ddim_steps=2+warmup=0.2+contrast_weight=0.7+unsup_weight=0.8"
    trainer = with_bank(start(make_trainer(name + "+diffusion_weight=0.6", "Toy", "2d")))
    trainer.step = 3
    batch = next_batch(trainer)
    torch.manual_seed(5)
    found = values(all_losses(trainer, batch))

    torch.manual_seed(5)
    diffusion, ab = trainer.companions["diffusion"], alpha_bars()
    ramp = math.exp(-5 * (1 - (3 / 8) / 0.4) ** 2)
    expected = {"sup": trainer.loss(trainer.student(batch.x_l), batch.y_l)}
    torch.rand(batch.target.numel())  # the draw for the bank

    x, valid, k = batch.views["stock"], batch.valid_u, trainer.num_heads
    state = torch.randn(len(x), k, *x.shape[2:])
    with torch.no_grad():
        p = diffusion(x, state, torch.tensor([999, 999]))[0].softmax(1)
        error = (state - ab[999].sqrt() * (2 * p - 1)) / (1 - ab[999]).sqrt()
        state = ab[0].sqrt() * (2 * p - 1) + (1 - ab[0]).sqrt() * error
        y_d = diffusion(x, state, torch.tensor([0, 0]))[0].argmax(1, keepdim=True)
    z = trainer.student(x)
    y_c = z[0].detach().argmax(1, keepdim=True)
    feature = trainer.tap(trainer.student, x).feature
    places = draw_per_class(y_c, valid, k, 1024)
    projected = trainer.companions["projector"](gather_places(feature, places))
    bank = trainer.companions["bank"]
    prototypes = normalize(bank.vectors[:, :20].mean(1), dim=1)
    seen = torch.ones(k).bool()
    contrast = propagation_loss(projected, prototypes, seen, places.counted, 0.1, 0.3, 0.3)
    expected["unsup"] = 0.8 * ramp * trainer.pseudo_loss(z, y_d, valid, valid)
    expected["unsup_contrast"] = 0.8 * ramp * 0.7 * contrast

    for key, image, label in (("sup", batch.x_l, batch.target), ("unsup", x, y_c)):
        clean = 2.0 * one_hot(label[:, 0].long(), k).movedim(-1, 1).contiguous() - 1
        time = torch.randint(1000, (2,))
        a = ab[time].view(2, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * torch.randn_like(clean)
        output = diffusion(image, noisy, time)
        if key == "sup":
            expected["sup_diffusion"] = trainer.loss(output, batch.y_l)
        else:
            loss = trainer.pseudo_loss(output, label, valid, valid)
            expected["unsup_diffusion"] = 0.6 * ramp * loss
    assert found == pytest.approx({n: v.item() for n, v in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_loss_of_one_network_reaches_the_other(dataset, make_trainer):
    trainer = with_bank(start(make_trainer(FULL, dataset, "2d")))
    batch = next_batch(trainer)
    modules = {"main": [trainer.network, trainer.companions["projector"]]}
    modules["diffusion"] = [trainer.companions["diffusion"]]
    for phase in trainer._phases:
        for terms in phase.losses(batch):
            sum(terms.values()).backward()
        for name, trained in modules.items():
            for module in trained:
                got = [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]
                assert any(got) == (name == phase.name)
                module.zero_grad()


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_losses_never_change_state_and_a_step_moves_all(dataset, make_trainer):
    trainer = start(make_trainer(FULL, dataset, "2d"))
    raw = next(trainer.dataloader_train)
    state = copy.deepcopy({**trainer.network.state_dict(), **trainer.companions.state_dict()})
    list(all_losses(trainer, Batch.from_loader(raw, trainer.device)))
    after = {**trainer.network.state_dict(), **trainer.companions.state_dict()}
    assert all(torch.equal(state[k], after[k]) for k in state)
    trainer.train_step(raw)
    after = {**trainer.network.state_dict(), **trainer.companions.state_dict()}
    changed = {k for k in state if not torch.equal(state[k], after[k])}
    assert {"bank.vectors", "bank.count"} <= changed
    assert any(k.startswith("diffusion.films") for k in changed)
    assert any("gate" in k for k in changed)  # of the Mamba module


def test_both_labels_of_a_step_come_from_the_weights_before_it(make_trainer, monkeypatch):
    trainer = start(make_trainer(FULL + "+initial_lr=1.0", "Toy", "2d"))
    raw = next(trainer.dataloader_train)
    x = raw["unlabeled"]["views"]["stock"]
    with torch.no_grad():
        expected = full_res(trainer.student(x)).argmax(1, keepdim=True)
    labels, own = [], trainer.denoised
    monkeypatch.setattr(trainer, "denoised", lambda x, y, k: (labels.append(y), own(x, y, k))[1])
    trainer.train_step(raw)
    assert torch.equal(labels[0], raw["target"][0]) and torch.equal(labels[1], expected)
    with torch.no_grad():
        moved = full_res(trainer.student(x)).argmax(1, keepdim=True)
    assert not torch.equal(moved, expected)


def test_sampler_runs_once_a_step_and_never_before_the_warm_up_ends(make_trainer, monkeypatch):
    trainer = start(make_trainer("SSLTrainerDiffCL+warmup=0.25+ddim_steps=5", "Toy", "2d"))
    passes = []
    trainer.companions["diffusion"].register_forward_hook(
        lambda module, args, output: passes.append(torch.is_grad_enabled())
    )
    for step in range(4):
        terms = {}
        monkeypatch.setattr(trainer._meter, "add", lambda k, v, terms=terms: terms.update({k: v}))
        trainer.train_step(next(trainer.dataloader_train))
        assert trainer.step == step + 1
        assert passes == [False] * (0 if step < 2 else 5) + [True] * 2
        assert ("terms/unsup" in terms) == ("terms/unsup_contrast" in terms) == (step >= 2)
        assert "terms/unsup_diffusion" in terms  # from the start
        passes.clear()


def test_ramp_is_the_cards(make_trainer):
    trainer = make_trainer("SSLTrainerDiffCL+num_epochs=100", short=False)
    for epoch, expected in ((0, math.exp(-5)), (20, math.exp(-5 / 4)), (40, 1.0), (99, 1.0)):
        trainer.step = epoch * trainer.num_iterations_per_epoch
        assert trainer.ramp == pytest.approx(expected)


def test_without_weight_for_the_student_nothing_but_labels_trains(make_trainer):
    trainer = start(make_trainer("SSLTrainerDiffCL+unsup_weight=0", "Toy", "2d"))
    raw = next(trainer.dataloader_train)
    assert "unlabeled" not in raw
    diffusion = trainer.companions["diffusion"]
    before = copy.deepcopy(diffusion.state_dict())
    assert list(values(all_losses(trainer, Batch.from_loader(raw, trainer.device)))) == ["sup"]
    trainer.train_step(raw)
    assert all(torch.equal(v, before[k]) for k, v in diffusion.state_dict().items())


# ---------------------------------------------------------------- masks


class FreeLogits(nn.Module):
    """A diffusion network whose output is a parameter; keeps the states that it saw."""

    def __init__(self, *shape):
        super().__init__()
        self.z = nn.Parameter(torch.randn(*shape))
        self.alpha_bars = torch.ones(1000)  # no noise: the state is the clean map
        self.states = []

    def forward(self, image, state, time):
        self.states.append(state)
        return self.z


def with_free_logits(trainer, batch, monkeypatch):
    shape = len(batch.x_l), trainer.num_heads, *batch.x_l.shape[2:]
    trainer.companions["diffusion"] = FreeLogits(*shape)
    z = torch.randn(*shape, requires_grad=True)
    feature = torch.randn(len(z), 4, *shape[2:], requires_grad=True)
    monkeypatch.setattr(trainer, "tap", lambda network, x: Tapped(z, feature, feature))
    return trainer.companions["diffusion"], z, feature


@pytest.mark.parametrize("dataset", ["Ignore", "RegionsIgnore"])
def test_ignored_voxels_have_the_state_0_and_teach_nothing(dataset, make_trainer, monkeypatch):
    trainer = start(make_trainer(FULL + "+enable_deep_supervision=False", dataset, "2d"))
    for _ in range(20):
        batch = next_batch(trainer)
        ignored = ignored_voxels(trainer, batch)
        if ignored.any():
            break
    assert ignored.any() and not ignored.all()
    diffusion, z, _ = with_free_logits(trainer, batch, monkeypatch)
    terms = next(trainer.losses(batch))["sup"]
    other = next(trainer.diffusion_losses(batch))["sup_diffusion"]
    for grad in torch.autograd.grad(terms + other, (z, diffusion.z)):
        assert (grad[ignored.expand_as(grad)] == 0).all() and grad.any()
    (state,) = diffusion.states
    assert (state[ignored.expand_as(state)] == 0).all()
    assert (state[~ignored.expand_as(state)].abs() == 1).all()
    if not trainer.regions:
        assert torch.equal(state.argmax(1)[~ignored[:, 0]], batch.target[~ignored].long())


@pytest.mark.parametrize("dataset", ["Toy", "Regions"])
def test_padding_teaches_nothing(dataset, make_trainer, monkeypatch):
    trainer = with_bank(start(make_trainer(FULL + "+enable_deep_supervision=False", dataset, "2d")))
    batch = next_batch(trainer)
    diffusion, z, feature = with_free_logits(trainer, batch, monkeypatch)
    batch.valid_u = torch.ones_like(batch.valid_u)
    batch.valid_u[..., :7] = False
    _, terms = trainer.losses(batch)
    _, other = trainer.diffusion_losses(batch)
    total = sum({**terms, **other}.values())
    for grad in torch.autograd.grad(total, (z, diffusion.z, feature)):
        assert (grad[..., :7] == 0).all() and grad[..., 7:].any()


# ---------------------------------------------------------------- the bank


@pytest.mark.parametrize("dataset", DATASETS)
def test_bank_holds_only_features_of_annotated_voxels_that_are_right(
    dataset, make_trainer, monkeypatch
):
    trainer = start(make_trainer(FULL + "+bank_size=40", dataset, "2d"))
    for _ in range(20):
        raw = next(trainer.dataloader_train)
        batch = Batch.from_loader(raw, trainer.device)
        if not trainer.label_manager.has_ignore_label or ignored_voxels(trainer, batch).any():
            break
    batch.valid_l[..., :9] = False
    _, z, feature = with_free_logits(trainer, batch, monkeypatch)
    monkeypatch.setattr(trainer, "loss", lambda output, target: output.sum())
    for _ in range(3):
        trainer._observed.clear()
        next(trainer.losses(batch))
        trainer.after_step(trainer._observed)
    bank = trainer.companions["bank"]
    with torch.no_grad():
        every = normalize(trainer.companions["projector"](feature.movedim(1, -1)), dim=-1)
    counted = batch.valid_l[:, 0]
    if trainer.label_manager.has_ignore_label:
        counted = counted & ~ignored_voxels(trainer, batch)[:, 0]
    if trainer.regions:
        pairs = [
            (z[:, r] > 0, batch.target[:, r].bool(), side)
            for r in range(trainer.num_heads)
            for side in (False, True)
        ]
    else:
        pairs = [(z.argmax(1), batch.target[:, 0], k) for k in range(trainer.num_heads)]
    assert len(bank.vectors) == len(pairs)
    for vectors, count, (found, truth, value) in zip(bank.vectors, bank.count, pairs, strict=True):
        allowed = every[(found == value) & (truth == value) & counted]
        held = vectors[vectors.any(1)]
        assert len(held) == min(count, 40)
        assert count == 3 * min(32, len(allowed))
        if len(held):
            assert torch.cdist(held, allowed).amin(1).max() < 1e-3


# ---------------------------------------------------------------- networks and optimizers


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_starts_as_the_plans_network_with_one_mamba_module(
    architecture, configuration, make_trainer
):
    trainer = make_trainer("SSLTrainerDiffCL", "Toy", configuration)
    config = trainer.configuration_manager.configuration
    if architecture == "ResidualEncoderUNet":
        arch = config["architecture"]
        arch["network_class_name"] = arch["network_class_name"].replace(
            "PlainConv", "ResidualEncoder"
        )
        kwargs = arch["arch_kwargs"]
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    trainer.on_train_start()
    stock = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.num_heads, True
    )
    missing, unexpected = stock.load_state_dict(trainer.network.state_dict(), strict=False)
    assert not missing and unexpected
    x = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    for a, b in zip(trainer.network(x), stock(x), strict=True):
        assert torch.equal(a, b)
    modules = [m for m in trainer.network.modules() if isinstance(m, HighFrequencyMamba)]
    assert len(set(modules)) == 1
    diffusion = trainer.companions["diffusion"]
    channels = diffusion.unet.encoder.output_channels
    assert channels == trainer.network.encoder.output_channels
    state = torch.randn(2, trainer.num_heads, *x.shape[2:])
    logits = full_res(diffusion(x, state, torch.tensor([0, 999])))
    assert logits.shape == full_res(trainer.network(x)).shape


@pytest.mark.parametrize("source", ["stock", "own"])
def test_pretrained_weights_reach_the_plans_part_of_the_student(source, make_trainer, tmp_path):
    def initialized():
        trainer = make_trainer("SSLTrainerDiffCL", "Channels", "2d")  # seeded
        trainer.initialize()
        return trainer

    trainer, without = initialized(), initialized()
    builder = nnUNetTrainer if source == "stock" else type(trainer)
    network = builder.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.num_heads,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    given, path = network.state_dict(), tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": given}, path)
    load_pretrained_weights(trainer.network, str(path))  # as `nnUNetv2_train -pretrained_weights`
    for t in (trainer, without):
        t.on_train_start()
    mamba = [n for n, m in trainer.network.named_modules() if isinstance(m, HighFrequencyMamba)]
    assert len(mamba) == 1
    for key, value in trainer.network.state_dict().items():
        # nnU-Net never takes over the last layers
        taken = f"{mamba[0]}." not in key and ".seg_layers." not in key
        assert torch.equal(value, given[key] if taken else without.network.state_dict()[key]), key
    for a, b in zip(trainer.companions.parameters(), without.companions.parameters(), strict=True):
        assert torch.equal(a, b)
    trained = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {id(p) for p in trainer.network.parameters()} <= trained
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()


def test_mamba_module_moves_to_a_coarser_stage(make_trainer):
    stages = []
    for tokens in (256, 255, 16, 1):  # patches of 32 x 32: 16 x 16 cells at the finest stage
        trainer = make_trainer(f"SSLTrainerDiffCL+max_tokens={tokens}", "Toy", "2d")
        network = trainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, 3
        )
        for i, stage in enumerate(network.encoder.stages):
            if any(isinstance(m, HighFrequencyMamba) for m in stage.modules()):
                stages.append(i)
    assert stages == [0, 1, 2, 2]


def test_scan_has_no_weight_decay_and_each_optimizer_its_schedule(make_trainer):
    trainer = make_trainer("SSLTrainerDiffCL+weight_decay=0.1+initial_lr=0.02")
    trainer.on_train_start()
    main, diffusion = trainer._phases
    assert main.optimizer is trainer.optimizer is trainer.lr_scheduler.optimizer
    decay = {id(p): g["weight_decay"] for g in main.optimizer.param_groups for p in g["params"]}
    named = dict(trainer.network.named_parameters())
    free = {n for n, p in named.items() if decay[id(p)] == 0}
    assert free and all(n.endswith(("A_log", "skip")) for n in free)
    assert len(free) == sum(n.endswith(("A_log", "skip")) for n in named)
    assert {g["weight_decay"] for g in diffusion.optimizer.param_groups} == {0.1}
    trained = [
        {id(p) for g in x.optimizer.param_groups for p in g["params"]} for x in (main, diffusion)
    ]
    for phase, own in zip((main, diffusion), trained, strict=True):
        assert own == {id(p) for m in phase.modules for p in m.parameters()}
    assert not trained[0] & trained[1]
    for epoch in (0, 2):
        trainer.current_epoch = epoch
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        for phase in (main, diffusion):
            for group in phase.optimizer.param_groups:
                assert group["lr"] == pytest.approx(0.02 * (1 - epoch / 4) ** 0.9)


def test_noise_comes_from_the_generator_that_checkpoints_keep(make_trainer):
    trainer = start(make_trainer(FULL, "Toy", "2d"))
    x = next_batch(trainer).views["stock"]
    torch.manual_seed(3)
    a, b = trainer.sample(x), trainer.sample(x)
    torch.manual_seed(3)
    assert torch.equal(trainer.sample(x), a) and not torch.equal(a, b)
    assert torch.allclose(a.sum(1), torch.ones_like(a[:, 0])) and not a.requires_grad


@pytest.mark.usefixtures("every_cpu_has_bf16")
@pytest.mark.parametrize("size", [1, 3])
def test_any_batch_size_and_bfloat16_train(size, make_trainer):
    trainer = make_trainer(FULL + "+bf16_on_cpu=True", "Channels", "2d")
    trainer.configuration_manager.configuration["batch_size"] = size
    start(trainer)
    trained = [m for p in trainer._phases for m in p.modules]
    before = [[p.detach().clone() for p in m.parameters()] for m in trained]
    for _ in range(2):
        batch = next(trainer.dataloader_train)
        assert len(batch["data"]) == size
        assert trainer.train_step(batch)["loss"].isfinite()
    for module, old in zip(trained, before, strict=True):
        after = list(module.parameters())
        assert all(p.isfinite().all() for p in after)
        assert any(not torch.equal(p, q) for p, q in zip(old, after, strict=True))
    assert trainer._skipped_steps == 0


@pytest.mark.parametrize("high_pass", ["fft", "laplacian"])
def test_other_high_passes_train(high_pass, make_trainer):
    trainer = start(make_trainer(f"{FULL}+high_pass={high_pass}", "Toy", "2d"))
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()


@pytest.mark.slow
def test_compiled_networks_give_the_same_losses(make_trainer, compile_on_cpu):
    found = []
    for compiled in (False, True):
        if compiled:
            compile_on_cpu()
        trainer = start(make_trainer(FULL, "Toy", "2d"))
        batches = [next(trainer.dataloader_train) for _ in range(3)]
        torch.manual_seed(1)
        found.append([trainer.train_step(dict(batch))["loss"].item() for batch in batches])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_both_networks_learn_to_segment(make_trainer):
    short = "+num_epochs=2+num_iterations_per_epoch=40+num_val_iterations_per_epoch=1+seed=1"
    name = "SSLTrainerDiffCL+ddim_steps=2"
    trainer = start(make_trainer(name + short, "Toy", "2d", short=False))
    for phase in trainer._phases:  # faster than nnU-Net's in so few steps
        phase.optimizer = torch.optim.Adam([p for m in phase.modules for p in m.parameters()], 0.01)
    batch = next(trainer.dataloader_train)
    held_out = batch["data"] + 0.1 * torch.randn_like(batch["data"])
    target = batch["target"][0]
    for _ in range(80):
        trainer.train_step(batch)
    with torch.no_grad():
        student = full_res(trainer.network(held_out)).argmax(1, keepdim=True)
    sampled = trainer.sample(held_out).argmax(1, keepdim=True)
    for found in (student, sampled):
        for k in (1, 2):
            both, size = (found == k) & (target == k), (found == k).sum() + (target == k).sum()
            assert 2 * both.sum() / size > 0.7


# ---------------------------------------------------------------- around it


def test_exported_student_predicts_with_this_trainer(make_trainer, tmp_path):
    trainer = make_trainer("SSLTrainerDiffCL+high_pass=laplacian", "Toy", "2d")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    told = export_model(folder.parent, tmp_path / "slim", "student")
    saved = torch.load(tmp_path / "slim/fold_all/checkpoint_final.pth", weights_only=False)
    assert saved["trainer_name"] == type(trainer).__name__ and "needs nnunet_ssl" in told
    assert not [k for k in saved["network_weights"] if "diffusion" in k]
    network = resolve(saved["trainer_name"]).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.num_heads, False
    )
    network.load_state_dict(saved["network_weights"], strict=True)


@pytest.mark.parametrize(
    "setting",
    [
        "ddim_steps=0",
        "warmup=1.0",
        "similar=0.0",
        "bank_size=8",
        "unsup_weight=-1.0",
    ],
)
def test_settings_out_of_range_are_refused(setting, make_trainer):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        make_trainer("SSLTrainerDiffCL+" + setting)


def test_cost_follows_the_sampling_steps():
    assert resolve("SSLTrainerDiffCL").step_cost == pytest.approx(22 / 3)
    assert resolve("SSLTrainerDiffCL+ddim_steps=3").step_cost == 5
    assert resolve("SSLTrainerDiffCL+unsup_weight=0").step_cost == 1
