"""What is MEDL's own."""

import pytest
import torch
from make_trainers import next_batch, start, values
from torch import nn

from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    curriculum_weight,
    fisher_evidential_loss,
    full_res,
    fuse_opinions,
    opinion,
    voxel_reliability,
)

NAME = "SSLTrainerMEDL+rampup=0"


def gradients(trainer, yields):
    trainer.network.zero_grad()
    for terms in yields:
        sum(terms.values()).backward()
    return {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}


class Logits(nn.Module):
    """A network whose output is a parameter."""

    def __init__(self, *shape):
        super().__init__()
        self.z = nn.Parameter(torch.randn(*shape) * 2)

    def forward(self, x):
        return self.z


def with_free_logits(trainer, x):
    """Put two free logit maps in place of the networks; no deep supervision."""
    shape = len(x), trainer.num_heads, *x.shape[2:]
    trainer.network.a, trainer.network.b = Logits(*shape), Logits(*shape)
    return trainer.network.a.z, trainer.network.b.z


@pytest.mark.parametrize(
    ("evidence", "probability"), [("softplus", "expected"), ("exp", "softmax")]
)
def test_step_equals_the_formulas(make_trainer, evidence, probability):
    settings = f"+fused_share=0.3+evidence={evidence}+probability={probability}"
    trainer = start(make_trainer(NAME + settings, "Toy", "2d"))
    trainer.step = 3
    batch = next_batch(trainer)
    found = gradients(trainer, trainer.losses(batch))
    logged = values(trainer.losses(batch))
    progress = 3 / 8

    def p(z):
        if probability == "softmax":
            return z.softmax(1)
        e = nn.functional.softplus(z)
        return (e + 1) / (e + 1).sum(1, keepdim=True)

    def opinion_of(z):
        return opinion(z, evidence)

    expected: dict[str, torch.Tensor] = {}

    def add(key, value):
        expected[key] = expected.get(key, 0) + value

    out = [net(batch.x_l) for net in (trainer.student, trainer.peer)]
    o = [opinion_of(full_res(z).detach()) for z in out]
    _, u_f = fuse_opinions(*o)
    valid = batch.valid_l
    for z, own in zip(out, o, strict=True):
        add("sup", trainer.loss([p(s).log() for s in z], batch.y_l))
        u = 0.7 * own.uncertainty + 0.3 * u_f
        omega = curriculum_weight(u, valid, progress, 0.5)
        nll = -p(z[0]).gather(1, batch.target.long()).log()
        add("sup_curriculum", (omega * nll)[valid].mean())

    x = batch.views["stock"]
    out = [net(x) for net in (trainer.student, trainer.peer)]
    belief, u_f = fuse_opinions(*(opinion_of(full_res(z).detach()) for z in out))
    label = belief.argmax(1, keepdim=True)
    valid = batch.valid_u
    w = voxel_reliability(belief, u_f, valid)
    omega = curriculum_weight(u_f, valid, progress, 0.5)
    gwu = 0.1 * torch.exp(torch.tensor(-5 * (1 - progress) ** 2))
    for z in out:
        log_p = [p(s).log() for s in z]
        add("unsup", trainer.pseudo_loss(log_p, label, w, valid))
        fie = fisher_evidential_loss(opinion_of(z[0]).alpha, label, 0.05)
        add("unsup_evidence", gwu * (w * omega * fie)[valid].mean())

    assert logged == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    reference = gradients(trainer, [expected])
    assert reference.keys() == found.keys()
    for name, grad in reference.items():
        assert torch.allclose(grad, found[name], rtol=1e-3, atol=1e-5), name
    with torch.no_grad():  # what predicts is what was trained
        mean = sum(p(full_res(net(x))) for net in (trainer.student, trainer.peer)) / 2
        assert torch.allclose(full_res(trainer.pair(x)).softmax(1), mean, atol=1e-5)


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_swapping_the_networks_changes_no_term(dataset, make_trainer):
    trainer = start(make_trainer(NAME, dataset))
    batch = next_batch(trainer)
    before = values(trainer.losses(batch))
    network = trainer.network
    network.a, network.b = network.b, network.a
    assert values(trainer.losses(batch)) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("dataset", ["Toy", "Regions"])
def test_padding_has_no_influence(dataset, make_trainer):
    trainer = start(make_trainer(NAME + "+enable_deep_supervision=False", dataset))
    batch = next_batch(trainer)
    a, b = with_free_logits(trainer, batch.x_u)
    valid = torch.ones_like(batch.valid_u)
    valid[..., :7] = False

    def terms():
        return values([trainer.unlabeled_terms(batch.x_u, valid)])

    before = terms()
    grads = gradients(trainer, [trainer.unlabeled_terms(batch.x_u, valid)])
    for z in ("a.z", "b.z"):
        assert (grads[z][..., :7] == 0).all() and (grads[z][..., 7:] != 0).any()
    with torch.no_grad():
        a[..., :7] = 50.0
        b[..., :7] = -3.0
    assert terms() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("dataset", ["Ignore", "RegionsIgnore"])
def test_ignored_voxels_are_neither_ranked_nor_counted(dataset, make_trainer):
    trainer = start(make_trainer(NAME + "+enable_deep_supervision=False", dataset))
    for _ in range(20):
        batch = next_batch(trainer)
        if trainer.regions:
            ignored = batch.target[:, -1:].bool()
        else:
            ignored = batch.target == trainer.label_manager.ignore_label
        if ignored.any():
            break
    assert ignored.any() and not ignored.all()
    a, b = with_free_logits(trainer, batch.x_l)
    before = values([trainer.labeled_terms(batch)])
    grads = gradients(trainer, [trainer.labeled_terms(batch)])
    ignored = ignored.expand_as(a)
    for z in ("a.z", "b.z"):
        assert (grads[z][ignored] == 0).all() and (grads[z][~ignored] != 0).any()
    with torch.no_grad():
        a[ignored], b[ignored] = 30.0, -30.0
    assert values([trainer.labeled_terms(batch)]) == pytest.approx(before, rel=1e-5)


def test_curriculum_prefers_sure_voxels_first_and_unsure_ones_last(make_trainer):
    trainer = start(make_trainer(NAME + "+enable_deep_supervision=False+curriculum=0.9", "Toy"))
    batch = next_batch(trainer)
    a, b = with_free_logits(trainer, batch.x_l)
    with torch.no_grad():
        b.copy_(a)
    ce = trainer.voxel_ce(trainer.linked(a), batch.target)[batch.valid_l]
    u = opinion(a).uncertainty[batch.valid_l]
    sure = u < u.median()
    by_progress = []
    for step in (0, 7):
        trainer.step = step
        by_progress.append(trainer.labeled_terms(batch)["sup_curriculum"].item() / 2)
    plain = ce.mean().item()
    direction = ce[sure].mean() - ce[~sure].mean()
    assert (by_progress[0] - plain) * direction > 0 > (by_progress[1] - plain) * direction


@pytest.mark.parametrize(
    "setting",
    [
        "evidence=softplus",
        "fusion=dempster",
        "fusion=precursor",
        "reliability=upcol",
        "reliability=pignistic",
    ],
)
def test_choices_change_the_unlabeled_loss(setting, make_trainer):
    terms = []
    for name in (NAME, f"{NAME}+{setting}"):
        trainer = start(make_trainer(name + "+enable_deep_supervision=False"))
        batch = next_batch(trainer)
        torch.manual_seed(0)
        with_free_logits(trainer, batch.x_u)
        terms.append(values([trainer.unlabeled_terms(batch.x_u, batch.valid_u)]))
    assert terms[0] != pytest.approx(terms[1], rel=1e-4)


def test_without_unlabeled_weights_no_unlabeled_patch_is_loaded(make_trainer):
    trainer = start(make_trainer("SSLTrainerMEDL+unsup_weight=0+evidential_weight=0"))
    batch = next_batch(trainer)
    assert batch.x_u is None
    (terms,) = trainer.losses(batch)
    assert list(terms) == ["sup", "sup_curriculum"]


def test_mean_learns_to_segment(make_trainer):
    short = "+num_epochs=2+num_iterations_per_epoch=45+num_val_iterations_per_epoch=1+seed=1"
    name = "SSLTrainerMEDL+initial_lr=0.02"
    trainer = start(make_trainer(name + short, "Toy", "2d", short=False))
    batch = next(trainer.dataloader_train)
    held_out = batch["data"] + 0.1 * torch.randn_like(batch["data"])
    target = batch["target"][0]
    for _ in range(90):
        trainer.train_step(batch)
    with torch.no_grad():
        found = full_res(trainer.network(held_out)).argmax(1, keepdim=True)
    for k in (1, 2):
        both, size = (found == k) & (target == k), (found == k).sum() + (target == k).sum()
        assert 2 * both.sum() / size > 0.8


@pytest.mark.parametrize(
    "setting", ["fused_share=1.5", "curriculum=1.0", "unsup_weight=-1.0", "det_weight=-0.1"]
)
def test_settings_out_of_range_are_refused(setting, make_trainer):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        make_trainer("SSLTrainerMEDL+" + setting)
