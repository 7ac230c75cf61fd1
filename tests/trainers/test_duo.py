"""What holds for every method that trains two networks."""

from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.duo import TwoNetworkTrainer
from nnunet_ssl.export import export_model
from nnunet_ssl.functional import full_res
from nnunet_ssl.history import read_log
from nnunet_ssl.modules import linked_prob
from nnunet_ssl.naming import trainer_classes

NAMES = sorted(n for n, c in trainer_classes().items() if issubclass(c, TwoNetworkTrainer))


@pytest.mark.parametrize("name", NAMES)
def test_mean_is_saved_and_the_student_alone_is_a_stock_network(name, make_trainer, tmp_path):
    trainer = make_trainer(name, "Channels", "2d")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    x = torch.randn(2, trainer.num_input_channels, 32, 32)
    export_model(folder.parent, tmp_path / "student", "student")
    saved = torch.load(
        tmp_path / "student" / "fold_all" / "checkpoint_final.pth", weights_only=False
    )
    assert saved["trainer_name"] == "nnUNetTrainer"
    trainer.network.eval()
    for where, network in (
        (folder.parent, trainer.network),
        (tmp_path / "student", trainer.student),
    ):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(where), ("all",))
        with torch.no_grad():
            logits = predictor.network.eval()(x)
            assert torch.allclose(logits, full_res(network(x)), atol=1e-5)
    with torch.no_grad():
        parts = [
            linked_prob(full_res(net(x)), trainer.link(), False)
            for net in (trainer.student, trainer.peer)
        ]
        mean = full_res(trainer.network(x)).softmax(1)
    assert torch.allclose(mean, (parts[0] + parts[1]) / 2, atol=1e-5)
    record = read_log(folder / "ssl_log.jsonl")[-1]
    assert set(record["pseudo_dice"]) == {"student", "peer", "deployed"}


@pytest.mark.parametrize("name", NAMES)
def test_each_network_is_clipped_by_itself(name, make_trainer):
    trainer = make_trainer(name)
    trainer.initialize()
    (phase,) = trainer._phases
    assert phase.modules[:2] == [trainer.student, trainer.peer]
    inside = {id(p) for g in phase.optimizer.param_groups for p in g["params"]}
    listed = [id(p) for m in phase.modules for p in m.parameters()]
    assert len(listed) == len(set(listed)) and set(listed) == inside


@pytest.mark.parametrize("name", NAMES)
def test_network_knows_regions_from_the_checkpoint_alone(name, make_trainer):
    if not trainer_classes()[name].supports_regions:
        with pytest.raises(NotImplementedError, match="region-based training"):
            make_trainer(name, "Regions")
        return
    trainer = make_trainer(name, "Regions")
    trainer.on_train_start()
    assert trainer.network.regions.item() == 1
    fresh = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.num_heads, False
    )
    fresh.load_state_dict(trainer.network.state_dict(), strict=True)
    assert fresh.regions.item() == 1


@pytest.mark.parametrize("name", NAMES)
def test_student_takes_pretrained_weights_of_a_stock_network(name, make_trainer, tmp_path):
    def initialized():
        trainer = make_trainer(name, "Channels", "2d")  # seeded
        trainer.initialize()
        return trainer

    trainer, without = initialized(), initialized()
    stock = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.num_heads,
    )
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": stock.state_dict()}, path)
    load_pretrained_weights(trainer.network, str(path))  # as `nnUNetv2_train -pretrained_weights`
    for t in (trainer, without):
        t.on_train_start()
    for key, value in trainer.network.state_dict().items():
        own = without.network.state_dict()[key]
        # nnU-Net never takes over the last layers
        taken = key.startswith("a.") and ".seg_layers." not in key
        assert torch.equal(value, stock.state_dict()[key[2:]] if taken else own), key
    trained = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {id(p) for p in trainer.network.parameters()} <= trained


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_weights_of_two_networks_are_refused_by_nnunet(name, make_trainer, tmp_path):
    trainer = make_trainer(name, "Channels", "2d")
    trainer.initialize()
    torch.save({"network_weights": trainer.pair.state_dict()}, tmp_path / "pair.pth")
    with pytest.raises(AssertionError, match="do not seem to be compatible"):
        load_pretrained_weights(trainer.network, str(tmp_path / "pair.pth"))


@pytest.mark.usefixtures("every_cpu_has_bf16")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_any_batch_size_and_bfloat16_train(name, size, make_trainer):
    trainer = make_trainer(name + "+bf16_on_cpu=True", "Channels", "2d")
    trainer.configuration_manager.configuration["batch_size"] = size
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    batch = next(trainer.dataloader_train)
    assert len(batch["data"]) == size
    assert trainer.train_step(batch)["loss"].isfinite()
    after = list(trainer.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert trainer._skipped_steps == 0
