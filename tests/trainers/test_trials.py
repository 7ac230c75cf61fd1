"""Trainers in benchmarks/trials, which the journal tells of but the package does not hold."""

import os
from pathlib import Path

import pytest
import torch

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.naming import discovery_folder

TRIALS = Path(__file__).parents[2] / "benchmarks" / "trials"


@pytest.mark.parametrize("labels_from", ["student", "teacher"])
def test_bare_step_learns_its_own_labels_on_turned_patches(labels_from, make_trainer, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", f"{discovery_folder()}{os.pathsep}{TRIALS}")
    by_teacher = labels_from == "teacher"
    trainer = make_trainer(f"SSLTrainerNFM+warmup=0+teacher_labels={by_teacher}", "Toy", "2d")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.ones(len(batch.x_u), dtype=torch.long))
    seen = {}
    monkeypatch.setattr(trainer, "loss", lambda output, target: seen.update(y=target) or output[0])
    inputs = []
    trainer.student.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    list(trainer.losses(batch))

    x = batch.views["stock"]
    n = len(batch.x_l)
    assert torch.equal(inputs[-1][:n], batch.x_l)
    assert torch.equal(inputs[-1][n:], x.rot90(1, (2, 3)))
    with torch.no_grad():
        heads = [trainer.teacher_prob(x)] if by_teacher else trainer.student(x)
    turned = [head.argmax(1, keepdim=True).rot90(1, (2, 3)).float() for head in heads]
    for scale, (target, true) in enumerate(zip(seen["y"], batch.y_l, strict=True)):
        k = 2**scale
        expected = turned[0][..., k // 2 :: k, k // 2 :: k] if by_teacher else turned[scale]
        assert torch.equal(target[:n], true) and not target.requires_grad
        assert torch.equal(target[n:], expected)
