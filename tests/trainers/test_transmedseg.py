"""TransMedSeg: BCP's step, and what the memory of features adds to it."""

import pytest
import torch
from resize_batch import resized

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import class_shift, expected_ce, full_res, region_shift

FULL = "+pretrain=0+largest_component=off"


def begin(trainer):
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def started(make_trainer, settings="", dataset="Toy", configuration="3d_fullres", batch=None):
    trainer = make_trainer("SSLTrainerTransMedSeg" + FULL + settings, dataset, configuration)
    data = Batch.from_loader(next(begin(trainer).dataloader_train), trainer.device)
    return trainer, data if batch is None else resized(data, batch)


def terms_of(trainer, data, seed=2):
    torch.manual_seed(seed)
    trainer._observed.clear()
    (terms,) = trainer.losses(data)
    return terms


def fill(trainer):
    """Moments of a long run: far apart, widely spread."""
    torch.manual_seed(0)
    for i, name in enumerate(("source", "target")):
        memory = trainer.companions[name]
        groups, size = memory.mean.shape
        root = torch.randn(groups, size, size)
        cov = root @ root.transpose(1, 2)
        memory.mean.copy_(torch.randn(groups, size) + i)
        memory.covariance.copy_(cov.diagonal(dim1=1, dim2=2) if memory.diagonal else cov)
        memory.count.fill_(100)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore", "Ignore"])
def test_beside_the_transfer_it_is_bcp(make_trainer, dataset, configuration):
    ours, data = started(make_trainer, "", dataset, configuration)
    bcp = begin(make_trainer("SSLTrainerBCP" + FULL, dataset, configuration))
    for name in ("student", "teacher"):
        getattr(bcp, name).load_state_dict(getattr(ours, name).state_dict())
    expected, found = terms_of(bcp, data), terms_of(ours, data)
    transfer = found.pop("unsup_transfer")
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert transfer.item() > 0
    none, _ = started(make_trainer, "+transfer_weight=0", dataset, configuration)
    assert "source" not in none.companions
    none.student.load_state_dict(ours.student.state_dict())
    none.teacher.load_state_dict(ours.teacher.state_dict())
    assert terms_of(none, data).keys() == expected.keys()


@pytest.mark.parametrize("dataset", ["Channels", "RegionsIgnore"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_term_is_the_expected_ce_of_the_mixes(
    make_trainer, monkeypatch, dataset, size, covariance
):
    trainer, data = started(make_trainer, f"+covariance={covariance}", dataset, batch=size)
    fill(trainer)
    trainer.step = trainer.total_steps // 2
    seen = []
    tap, masked_loss = trainer.tap, trainer.masked_loss
    monkeypatch.setattr(trainer, "tap", lambda n, x: seen.append((n, x, tap(n, x))) or seen[-1][2])
    true = []
    monkeypatch.setattr(
        trainer,
        "masked_loss",
        lambda out, target, keep: true.append(keep) or masked_loss(out, target, keep),
    )
    terms = terms_of(trainer, data)
    _, (_, x, mixed) = seen  # the teacher first
    assert torch.equal(x, torch.where(true[0], data.x_l, data.views["stock"]))
    here, there = trainer.companions["source"], trainer.companions["target"]
    weight = trainer.student.decoder.seg_layers[-1].weight.flatten(1)
    parts = weight, there.mean - here.mean, there.covariance
    keep, target = true[0] & data.valid_l, data.target
    if trainer.regions:
        keep, target = keep & ~target[:, -1:].bool(), target[:, :-1]
        table = region_shift(weight, *(t.unflatten(0, (-1, 2)) for t in parts[1:]), 0.125)
    else:
        table = class_shift(*parts, 0.125)
    expected = 0.1 * expected_ce(
        full_res(mixed.output), target, table, keep, regions=trainer.regions
    )
    assert terms["unsup_transfer"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_moments_are_those_of_true_and_of_pseudo_labeled_features(make_trainer, monkeypatch):
    trainer, data = started(make_trainer, "+memory_decay=0", "Ignore")
    taps, keeps = [], []
    tap, masked_loss = trainer.tap, trainer.masked_loss
    monkeypatch.setattr(trainer, "tap", lambda n, x: taps.append(tap(n, x)) or taps[-1])
    monkeypatch.setattr(
        trainer, "masked_loss", lambda o, t, keep: keeps.append(keep) or masked_loss(o, t, keep)
    )
    terms_of(trainer, data)
    trainer.after_step(trainer._observed)
    aim, mixed = taps
    pseudo = full_res(aim.output).argmax(1, keepdim=True)
    ignored = data.target == trainer.label_manager.ignore_label
    for name, feature, label, keep in (
        ("source", mixed.feature, data.target, keeps[0] & ~ignored & data.valid_l),
        ("target", aim.feature, pseudo, data.valid_u),
    ):
        memory = trainer.companions[name]
        for k in range(trainer.num_heads):
            x = feature.movedim(1, -1)[((label == k) & keep)[:, 0]]
            if len(x) < 32:
                assert not memory.seen()[k]
            elif len(x) <= 16384:
                assert torch.allclose(memory.mean[k], x.mean(0), atol=1e-4)
                cov = torch.cov(x.T, correction=0)
                assert torch.allclose(memory.covariance[k], cov, atol=1e-4)
        assert memory.seen().any()


def test_steps_fill_the_memory_and_the_first_table_is_zero(make_trainer):
    trainer, _ = started(make_trainer)
    assert not trainer.shift_table(1.0).any()
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    assert trainer.companions["source"].seen().any()
    table = trainer.shift_table(1.0)
    assert table.any() and not table.diagonal().any()


def test_a_class_seen_on_one_side_has_no_shift(make_trainer):
    trainer, _ = started(make_trainer)
    fill(trainer)
    trainer.companions["source"].count[1] = 0
    found = trainer.shift_table(0.5)
    weight = trainer.classifier.weight.flatten(1)
    there = trainer.companions["target"]
    gap = there.mean - trainer.companions["source"].mean
    gap[1] = 0
    assert torch.allclose(found, class_shift(weight, gap, there.covariance, 0.5))


def test_gradient_reaches_encoder_and_classifier_and_not_the_teacher(make_trainer):
    trainer, data = started(make_trainer)
    fill(trainer)
    trainer.step = trainer.total_steps - 1
    term = terms_of(trainer, data)["unsup_transfer"]
    parts = {
        "encoder": list(trainer.student.encoder.parameters()),
        "classifier": [trainer.classifier.weight],
    }
    for parameters in parts.values():
        grads = torch.autograd.grad(term, parameters, allow_unused=True, retain_graph=True)
        assert sum(g.abs().sum() for g in grads if g is not None) > 0
    (through_both,) = torch.autograd.grad(term, trainer.classifier.weight, retain_graph=True)
    trainer.step = 0  # no strength: through the logits alone
    logits = terms_of(trainer, data)["unsup_transfer"]
    (through_logits,) = torch.autograd.grad(logits, trainer.classifier.weight)
    assert not torch.allclose(through_both, through_logits)
    term.backward()
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert all(not b.requires_grad for m in trainer.companions.values() for b in m.buffers())


def test_the_abstracts_direction_teaches_the_classifier_alone(make_trainer):
    trainer, data = started(make_trainer, "+direction=teacher_to_student")
    fill(trainer)
    trainer.step = trainer.total_steps // 2
    here, there = trainer.companions["target"], trainer.companions["source"]
    weight = trainer.classifier.weight.flatten(1)
    expected = class_shift(weight, there.mean - here.mean, there.covariance, 1.0)
    assert torch.allclose(trainer.shift_table(1.0), expected)
    term = terms_of(trainer, data)["unsup_transfer"]
    reached = {
        id(p)
        for p in trainer.student.parameters()
        for g in torch.autograd.grad(term, p, allow_unused=True, retain_graph=True)
        if g is not None and g.any()
    }
    assert reached == {id(p) for p in trainer.classifier.parameters()}


def test_strength_grows_from_zero_over_the_second_stage(make_trainer, monkeypatch):
    trainer = begin(make_trainer("SSLTrainerTransMedSeg+pretrain=0.5"))
    assert "unlabeled" not in next(trainer.dataloader_train)
    fill(trainer)
    found = {}
    for step in (4, 6):  # of 8
        trainer.step = step
        monkeypatch.setattr(trainer, "track", lambda n, v, step=step: found.update({(n, step): v}))
        logits, label = torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
        trainer.transfer_loss(logits, label, label == 0)
    assert (found["strength", 4], found["strength", 6]) == (0, 0.125)


def test_a_spoilt_patch_costs_one_step(make_trainer):
    trainer, _ = started(make_trainer)
    spoilt = next(trainer.dataloader_train)
    for images in (spoilt["data"], spoilt["unlabeled"]["views"]["stock"]):
        images[0, 0, 4, 4, 4] = torch.nan
    for data in (next(trainer.dataloader_train), spoilt, next(trainer.dataloader_train)):
        trainer.train_step(data)
    (terms,) = trainer.losses(Batch.from_loader(data, trainer.device))
    assert all(value.isfinite() for value in terms.values())
    assert trainer.shift_table(1.0).isfinite().all()


def test_padding_of_annotated_patches_is_not_augmented(make_trainer):
    trainer, data = started(make_trainer)
    data.valid_l[:] = True
    data.valid_l[..., :6] = False
    logits = torch.randn(2, trainer.num_heads, *data.target.shape[2:], requires_grad=True)
    label, keep = trainer.annotation(data, torch.ones_like(data.valid_l))
    trainer.transfer_loss(logits, label, keep).backward()
    assert not logits.grad[..., :6].any() and logits.grad[..., 6:].all()


def test_unsure_voxels_can_be_left_out_of_the_memory(make_trainer):
    trainer, data = started(make_trainer, "+min_confidence=0.6", batch=1)
    terms_of(trainer, data)
    prob = trainer.teacher_prob(data.views["stock"])
    sure = (prob.amax(1, keepdim=True) >= 0.6) & data.valid_u
    label = prob.argmax(1, keepdim=True)
    numbers = [(sure & (label == k)).sum().item() for k in range(trainer.num_heads)]
    found = trainer._observed["target_number"][0].tolist()
    assert found == [n if n >= 32 else 0 for n in numbers]
    assert 0 < sum(numbers) < data.valid_u.sum()


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_clusters_are_trained_with_the_encoder(make_trainer, dataset):
    trainer, data = started(make_trainer, "+cluster_weight=0.01", dataset)
    assert {"clusters", "source", "target", "teacher"} == set(trainer.companions)
    term = terms_of(trainer, data)["unsup_cluster"]
    assert -0.5 * 0.01 <= term.item() <= 0.5 * 0.01
    for module in (trainer.student.encoder, trainer.companions["clusters"]):
        grads = torch.autograd.grad(
            term, list(module.parameters()), allow_unused=True, retain_graph=True
        )
        assert sum(g.abs().sum() for g in grads if g is not None) > 0
    before = [p.detach().clone() for p in trainer.companions["clusters"].parameters()]
    trainer.train_step(next(trainer.dataloader_train))
    after = trainer.companions["clusters"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_balance_counts_classes_alike(make_trainer):
    trainer, data = started(make_trainer)
    other, _ = started(make_trainer, "+class_balanced=True")
    for name in ("student", "teacher"):
        getattr(other, name).load_state_dict(getattr(trainer, name).state_dict())
    values = [terms_of(t, data)["unsup_transfer"].item() for t in (trainer, other)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_the_low_precision_run_is_close(make_trainer):
    trainer, data = started(make_trainer, "+cluster_weight=0.01")
    fill(trainer)
    trainer.step = trainer.total_steps // 2
    full = terms_of(trainer, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = terms_of(trainer, data)
    for key, value in full.items():
        assert half[key].dtype == torch.float32
        assert half[key].item() == pytest.approx(value.item(), rel=3e-2, abs=3e-2), key


@pytest.mark.parametrize(
    "setting",
    [
        "pretrain=1",
        "box=1",
        "unsup_weight=-1",
        "transfer_weight=-1",
        "strength=-1",
        "memory_decay=1",
        "min_confidence=1",
        "clusters=1",
        "cluster_temperature=1",
    ],
)
def test_settings_out_of_range_are_refused(make_trainer, setting):
    with pytest.raises(Exception, match=setting.split("=")[0]):
        make_trainer("SSLTrainerTransMedSeg+" + setting)
