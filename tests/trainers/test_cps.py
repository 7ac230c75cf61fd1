import copy
import json
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.export import export_model
from nnunet_ssl.functional import (
    cutmix,
    cutmix_boxes,
    full_res,
    hard_labels,
    random_partners,
    to_prob,
)
from nnunet_ssl.history import read_log
from nnunet_ssl.naming import resolve

FULL = "SSLTrainerCPS+rampup=0+unsup_weight=1+enable_deep_supervision=false"


@pytest.fixture
def ready(make_trainer):
    """Return a function that makes a trainer and a batch."""

    def make(name=FULL, *args):
        trainer = make_trainer(name, *args)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device)

    return make


def collect(trainer, batch):
    terms = {}
    for part in trainer.losses(batch):
        for key, value in part.items():
            assert key not in terms or trainer.on_labeled
            terms[key] = terms.get(key, 0) + value
    return terms


def test_the_two_networks_start_apart(ready):
    trainer, _ = ready()
    pairs = zip(trainer.student.parameters(), trainer.companions["peer"].parameters(), strict=True)
    kernels = [(a, b) for a, b in pairs if a.ndim > 1]
    assert kernels and not any(torch.equal(a, b) for a, b in kernels)


def test_equal_networks_give_twice_the_mean_surprise_of_their_decision(ready):
    trainer, batch = ready()
    trainer.companions["peer"].load_state_dict(trainer.student.state_dict())
    terms = collect(trainer, batch)
    p = trainer.student(batch.x_u).softmax(1).amax(1, keepdim=True)
    expected = -2 * p.log()[batch.valid_u].mean()
    torch.testing.assert_close(terms["unsup"] + terms["unsup_peer"], expected)


@pytest.mark.parametrize("loss", ["ce", "dice", "ce_dice"])
def test_swapping_the_networks_leaves_the_loss(ready, loss):
    trainer, batch = ready(FULL + f"+unsup_loss={loss}")
    before = collect(trainer, batch)
    peer = trainer.companions["peer"]
    old = copy.deepcopy(peer.state_dict())
    peer.load_state_dict(trainer.student.state_dict())
    trainer.student.load_state_dict(old)
    after = collect(trainer, batch)
    for a, b in (("unsup", "unsup_peer"), ("sup", "sup_peer")):
        torch.testing.assert_close(before[a], after[b])
        torch.testing.assert_close(before[b], after[a])


def test_each_term_reaches_its_own_network_only(ready):
    trainer, batch = ready("SSLTrainerCPS+rampup=0")
    networks = trainer.parts()
    for part in trainer.losses(batch):
        for key, value in part.items():
            own = "peer" if key.endswith("peer") else "student"
            for name, network in networks.items():
                grads = torch.autograd.grad(
                    value, list(network.parameters()), allow_unused=True, retain_graph=True
                )
                reached = any(g is not None and g.abs().sum() > 0 for g in grads)
                assert reached == (name == own), key


def test_dice_leaves_out_an_absent_class(ready):
    trainer, _ = ready(FULL + "+unsup_loss=dice")
    logits = torch.randn(2, 3, 16, 32, 32, requires_grad=True)
    label = torch.zeros(2, 1, 16, 32, 32, dtype=torch.long)
    label[:, :, :8] = 1  # class 2 is nowhere
    valid = torch.ones_like(label, dtype=torch.bool)
    loss = trainer.pseudo_loss(logits, label, valid, valid, trainer.unsup_loss)
    (grad,) = torch.autograd.grad(loss, logits)
    only_one = trainer.pseudo_loss(logits[:, :2], label, valid, valid, "dice")
    assert -1 < loss < 0 and only_one < 0
    # class 2 is only pushed as the softmax's rest: nowhere more than what class 1 gives up
    assert torch.allclose(grad.sum(1), torch.zeros(()), atol=1e-7)
    assert (grad[:, 1][label[:, 0] == 1] <= 0).all() and (grad[:, 1][label[:, 0] == 0] >= 0).all()


def test_mixed_patches_keep_the_labels_of_the_unmixed_ones(ready, monkeypatch):
    trainer, batch = ready(FULL + "+box_mix=true")
    seen = []
    monkeypatch.setattr(
        trainer,
        "pseudo_loss",
        lambda out, label, weight, voxels, parts: seen.append((label, weight)) or out.sum() * 0,
    )
    inputs = {name: [] for name in ("student", "peer")}
    for name, network in trainer.parts().items():
        network.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    state = torch.random.get_rng_state()
    collect(trainer, batch)
    torch.random.set_rng_state(state)
    x = batch.x_u
    inside = cutmix_boxes(len(x), x.shape[2:], 0.25, 0.5, count=3, aspect=4)
    decided = {
        name: hard_labels(network(x).softmax(1), False) for name, network in trainer.parts().items()
    }
    mixed, student, peer, valid = cutmix(
        inside, random_partners(len(x)), x, decided["student"], decided["peer"], batch.valid_u
    )
    assert inside.any() and not torch.equal(mixed, x)
    for (label, weight), expected in zip(seen, (peer, student), strict=True):
        assert torch.equal(label, expected) and torch.equal(weight, valid)
    for name in inputs:  # labelled, unmixed for the label, mixed
        assert torch.equal(inputs[name][1], x) and torch.equal(inputs[name][2], mixed)


@pytest.mark.parametrize(
    "settings", ["", "+box_mix=true", "+on_labeled=true", "+box_mix=true+on_labeled=true"]
)
def test_passes_are_those_of_the_stated_cost(ready, settings):
    trainer, batch = ready(FULL + settings)
    passes = []
    for network in trainer.parts().values():
        network.register_forward_pre_hook(
            lambda *_: passes.append(3 if torch.is_grad_enabled() else 1)
        )
    collect(trainer, batch)
    assert sum(passes) / 3 == pytest.approx(trainer.step_cost)


def test_on_labeled_is_the_mean_over_all_patches(ready):
    trainer, batch = ready(FULL + "+on_labeled=true")
    found = collect(trainer, batch)
    z, z_peer = ([n(x) for x in (batch.x_l, batch.x_u)] for n in trainer.parts().values())
    expected = 0
    for a, b, valid in zip(z, z_peer, (batch.valid_l, batch.valid_u), strict=True):
        label = b.argmax(1)
        ce = torch.nn.functional.cross_entropy(a, label, reduction="none")[:, None]
        expected = expected + ce[valid].mean() / 2
    torch.testing.assert_close(found["unsup"], expected)


def test_ignored_voxels_teach_neither_network(ready):
    trainer, batch = ready(FULL + "+on_labeled=true", "Ignore")
    ignored = batch.target == trainer.label_manager.ignore_label
    ignored[..., :4] = True
    batch.target[..., :4] = trainer.label_manager.ignore_label
    counted = []
    whole = trainer.pseudo_loss
    trainer.pseudo_loss = lambda *args: counted.append(args[2:4]) or whole(*args)
    collect(trainer, batch)
    labeled, _ = counted[:2], counted[2:]
    assert len(counted) == 4 and ignored.any()
    for masks in labeled:
        for mask in masks:
            assert torch.equal(mask, batch.valid_l & ~ignored)


def planned(nnunet, batch_size):
    base = nnunet / "nnUNet_preprocessed" / "Dataset901_Toy"
    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8")) | {
        "continue_training": False
    }
    plans["configurations"]["3d_fullres"]["batch_size"] = batch_size
    return (
        plans,
        "3d_fullres",
        "all",
        json.loads((base / "dataset.json").read_text(encoding="utf-8")),
    )


def test_a_batch_of_one_patch_cannot_be_mixed(nnunet):
    with pytest.raises(UserError, match=r"box_mix=True must be False.*batch is 1 patch"):
        resolve("SSLTrainerCPS+box_mix=true")(*planned(nnunet, 1))


@pytest.mark.parametrize(("size", "settings"), [(1, ""), (3, "+box_mix=true")])
def test_odd_batches(nnunet, no_plots, size, settings):
    trainer = resolve(FULL + settings)(*planned(nnunet, size), torch.device("cpu"))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()


def test_only_a_peer_of_the_other_architecture_needs_a_unet(nnunet):
    base = nnunet / "nnUNet_preprocessed" / "Dataset901_Toy"
    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))
    dataset = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "some.package.Primus"
    resolve("SSLTrainerCPS+seed=1").refuse_unsupported(plans, "3d_fullres", dataset)
    with pytest.raises(NotImplementedError, match=r"the network some\.package\.Primus"):
        resolve("SSLTrainerCPS+peer=other").refuse_unsupported(plans, "3d_fullres", dataset)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_peer_of_the_other_architecture_trains_and_resumes(make_trainer, configuration):
    name = "SSLTrainerCPS+peer=other+unsup_loss=dice+rampup=0+box_mix=true"
    trainer = make_trainer(name, "RegionsIgnore", configuration)
    trainer.run_training()
    peer = trainer.companions["peer"]
    assert isinstance(peer, ResidualEncoderUNet)
    records = read_log(Path(trainer.output_folder) / "ssl_log.jsonl")
    assert set(records[-1]["pseudo_dice"]) == {"student", "peer"}
    continued = make_trainer(name, "RegionsIgnore", configuration)
    continued.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    for key, value in continued.companions["peer"].state_dict().items():
        assert torch.equal(value, peer.state_dict()[key])


def test_the_peer_can_be_exported_where_stock_nnunet_builds_it(make_trainer, tmp_path):
    trainer = make_trainer("SSLTrainerCPS")
    trainer.run_training()
    export_model(Path(trainer.output_folder).parent, tmp_path / "out", "peer")
    (path,) = (tmp_path / "out").rglob("*.pth")
    weights = torch.load(path, weights_only=False)["network_weights"]
    assert all(
        torch.equal(weights[k], v) for k, v in trainer.companions["peer"].state_dict().items()
    )


@pytest.mark.parametrize("peer", ["same", "other"])
@pytest.mark.parametrize("dataset", ["Channels", "Regions"])
def test_the_mean_of_both_predicts_where_asked_for(make_trainer, dataset, peer, tmp_path):
    name = f"SSLTrainerCPS+deploy=mean+peer={peer}"
    trainer = make_trainer(name, dataset, "2d")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    records = read_log(folder / "ssl_log.jsonl")
    assert set(records[-1]["pseudo_dice"]) == {"student", "peer", "deployed"}
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",))
    x = torch.randn(2, trainer.num_input_channels, 32, 32)
    with torch.no_grad():
        found = to_prob(predictor.network.eval()(x), trainer.regions)
        parts = [to_prob(full_res(n.eval()(x)), trainer.regions) for n in trainer.parts().values()]
    assert torch.allclose(found, (parts[0] + parts[1]) / 2, atol=1e-5)

    continued = make_trainer(name, dataset, "2d")
    continued.load_checkpoint(str(folder / "checkpoint_final.pth"))
    for key, network in trainer.parts().items():
        there = continued.parts()[key].state_dict()
        assert all(torch.equal(value, there[k]) for k, value in network.state_dict().items())
    export_model(folder.parent, tmp_path / "out", "student")
    (path,) = (tmp_path / "out").rglob("*.pth")
    assert torch.load(path, weights_only=False)["trainer_name"] == "nnUNetTrainer"


def test_the_peer_keeps_its_deep_supervision_after_validation(ready):
    trainer, _ = ready("SSLTrainerCPS")
    trainer.network.eval()
    trainer.validation_step(next(trainer.dataloader_val))
    assert all(network.decoder.deep_supervision for network in trainer.parts().values())


@pytest.mark.usefixtures("every_cpu_has_bf16")
def test_every_parameter_learns_under_autocast(ready):
    trainer, _ = ready("SSLTrainerCPS+rampup=0+box_mix=true+bf16_on_cpu=true")
    trainer.train_step(next(trainer.dataloader_train))
    last = len(trainer.student.decoder.seg_layers) - 1
    for network in trainer.parts().values():
        for key, parameter in network.named_parameters():
            coarsest = "seg_layers.0" in key and last > 0  # of weight 0 in nnU-Net's loss
            assert coarsest or (parameter.grad is not None and parameter.grad.abs().sum() > 0), key
