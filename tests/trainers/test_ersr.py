"""ERSR: what its student sees, and what counts."""

import math

import pytest
import torch
from resize_batch import resized

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    Ellipses,
    ellipse_distance,
    fit_ellipses,
    half_mirrored,
    mirror_at,
    mirrored_image,
    refine_by_ellipse,
)

SHAPE = (32, 32)
HEADS = [
    ((15.0, 16.0), 11.0, 7.0, 0.5),
    ((18.0, 14.0), 9.0, 7.0, 2.0),
    ((14.0, 15.0), 8.0, 5.0, 1.0),
]


def begin(trainer):
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def head_prob(size, empty=()):
    rows = [HEADS[i % 3] for i in range(size)]
    rows = torch.tensor([(*c, a, b, math.cos(t), math.sin(t)) for c, a, b, t in rows])
    found = torch.ones(size, dtype=torch.bool)
    d = ellipse_distance(Ellipses(rows[:, :2], rows[:, 2:4], rows[:, 4:], found), SHAPE)
    prob = torch.sigmoid(12 * (1 - d.sqrt()))
    prob[list(empty)] = 0.01
    return prob


def started(make_trainer, monkeypatch, settings="", dataset="Toy", size=2, empty=()):
    """A trainer whose teacher sees known heads, at full weight."""
    trainer = begin(make_trainer("SSLTrainerERSR+pretrain=0+rampup=0" + settings, dataset, "2d"))
    data = resized(Batch.from_loader(next(trainer.dataloader_train), trainer.device), size)
    data.valid_u = torch.ones_like(data.valid_u)
    head = head_prob(size, empty)
    others = trainer.num_heads - 1
    channel = trainer.head_label - trainer.regions
    prob = ((1 - head) / max(others, 1)).expand(-1, others + 1, -1, -1).clone()
    prob[:, channel] = head[:, 0]
    monkeypatch.setattr(trainer, "teacher_prob", lambda x: prob)
    return trainer, data, head


def steps_of(trainer, data, seed=1):
    torch.manual_seed(seed)
    return list(trainer.losses(data))


def total(steps):
    sums = {}
    for terms in steps:
        for key, value in terms.items():
            sums[key] = sums.get(key, 0) + value
    return sums


def images_of(trainer, monkeypatch):
    seen = []
    trainer.student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize(("size", "chunks"), [(3, [3] * 3), (4, [3] * 4), (7, [6] * 3 + [3])])
def test_the_student_sees_patches_with_their_mirror_images(make_trainer, monkeypatch, size, chunks):
    trainer, data, head = started(make_trainer, monkeypatch, "+perturb=False", size=size)
    seen = images_of(trainer, monkeypatch)
    steps = steps_of(trainer, data)
    labeled, *pieces = seen
    assert torch.equal(labeled, data.x_l) and list(steps[0]) == ["sup"]
    assert [len(x) for x in pieces] == chunks and max(chunks) <= max(size, 3)
    found = fit_ellipses(head > 0.6, data.valid_u)
    _, mask = refine_by_ellipse(head, ellipse_distance(found, SHAPE), 0.6)
    mirror = mirror_at(found, SHAPE)
    expected = [data.x_u] + [
        mirrored_image(data.x_u, mask, data.valid_u, mirror, side, False)
        for side in ("left", "right")
    ]
    for i, x in enumerate(expected):
        assert torch.equal(torch.cat([p.chunk(3)[i] for p in pieces]), x)
    assert not torch.equal(expected[1], expected[2])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_terms_equal_their_definition(make_trainer, monkeypatch, size):
    trainer, data, head = started(make_trainer, monkeypatch, "+perturb=False", size=size)
    found = total(steps_of(trainer, data))
    ellipses = fit_ellipses(head > 0.6, data.valid_u)
    _, mask = refine_by_ellipse(head, ellipse_distance(ellipses, SHAPE), 0.6)
    mirror = mirror_at(ellipses, SHAPE)
    kept = trainer.select(head, mask, data.valid_u, ellipses.found)
    with torch.no_grad():
        s = [
            trainer.head_prob(x)
            for x in (
                data.x_u,
                mirrored_image(data.x_u, mask, data.valid_u, mirror, "left", False),
                mirrored_image(data.x_u, mask, data.valid_u, mirror, "right", False),
            )
        ]
    seg, aug, mir = [], [], []
    for i in range(size):
        if not kept[i]:
            continue
        both, left = mirror.inside[i], mirror.left[i]
        row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        there = mirror.source[i].view(32, 32)
        seg.append(((s[0][i] - mask[i].float()) ** 2).mean())
        for half, side in ((s[1][i], left), (s[2][i], ~left)):
            flat = s[0][i].flatten()
            made = torch.where(side, s[0][i], flat[there])
            aug.append(((half - made) ** 2)[both].mean())
            apart = (half - half.flatten()[there]) ** 2
            mir.append(apart[both & left].sum() / both.sum())
        assert row.shape == column.shape
    for key, values in (("seg", seg), ("augmented", aug), ("mirror", mir)):
        expected = torch.stack(values).mean().item()
        assert found[f"unsup_{key}"].item() == pytest.approx(expected, rel=1e-4), key


def gradient(trainer, steps):
    trainer.student.zero_grad()
    for terms in steps:
        sum(v for k, v in terms.items() if k.startswith("unsup")).backward()
    return [p.grad.clone() for p in trainer.student.parameters() if p.grad is not None]


def test_small_batches_have_the_gradient_of_one_graph(make_trainer, monkeypatch):
    trainer, data, head = started(make_trainer, monkeypatch, "+perturb=False+min_keep=1", size=2)
    torch.manual_seed(1)
    generator = trainer.losses(data)
    next(generator)
    found = gradient(trainer, generator)
    ellipses = fit_ellipses(head > 0.6, data.valid_u)
    _, mask = refine_by_ellipse(head, ellipse_distance(ellipses, SHAPE), 0.6)
    mirror = mirror_at(ellipses, SHAPE)
    images = [data.x_u] + [
        mirrored_image(data.x_u, mask, data.valid_u, mirror, side, False)
        for side in ("left", "right")
    ]
    probs = trainer.head_prob(torch.cat(images)).chunk(3)
    joint = trainer.terms(probs, mask.float(), mirror, data.valid_u, torch.tensor([0.5, 0.5]))
    expected = gradient(trainer, [joint])
    assert len(found) == len(expected) and any(g.any() for g in found)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_samples_without_an_ellipse_have_no_weight(make_trainer, monkeypatch):
    trainer, data, _ = started(make_trainer, monkeypatch, "+perturb=False", size=4, empty=(1,))
    first = total(steps_of(trainer, data))
    assert trainer._observed["scores"][0][1].tolist() == [1e6, 1e6]
    data.x_u[1] = torch.randn_like(data.x_u[1]) * 50
    second = total(steps_of(trainer, data))
    for key, value in first.items():
        assert second[key].item() == pytest.approx(value.item(), rel=1e-5), key

    trainer, data, _ = started(make_trainer, monkeypatch, size=4, empty=range(4))
    steps = steps_of(trainer, data)
    assert all(v.item() == 0 for t in steps[1:] for v in t.values())
    (seg, *_) = steps[1].values()
    seg.backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.student.parameters())


def test_padding_does_not_count(make_trainer, monkeypatch):
    trainer, data, _ = started(make_trainer, monkeypatch, "+perturb=False", size=3)
    data.valid_u[..., :4] = False
    probs = [torch.rand(3, 1, *SHAPE) for _ in range(3)]
    found = []
    monkeypatch.setattr(trainer, "head_prob", lambda x: torch.cat([p[:1] for p in probs]))
    for _ in range(2):
        found.append(total(steps_of(trainer, data)))
        for p in probs:
            p[..., :4] = torch.rand(3, 1, 32, 4)
    for key in ("unsup_seg", "unsup_augmented", "unsup_mirror"):
        assert found[0][key].item() == pytest.approx(found[1][key].item(), rel=1e-5)


def test_perfect_students_have_small_losses(make_trainer, monkeypatch):
    trainer, data, head = started(make_trainer, monkeypatch, size=3)
    hard = (head > 0.6).float()
    index = iter(range(3))

    def perfect(x):
        i = next(index)
        return hard[i : i + 1].expand(3, -1, -1, -1)

    monkeypatch.setattr(trainer, "head_prob", perfect)
    found = total(steps_of(trainer, data))
    area = hard.mean().item()
    assert found["unsup_seg"].item() < 0.05 * area
    assert found["unsup_augmented"].item() < 0.05 and found["unsup_mirror"].item() < 0.05


def test_the_soft_target_is_the_refined_probability(make_trainer, monkeypatch):
    hard, data, _ = started(make_trainer, monkeypatch, "+perturb=False", size=3)
    soft, _, _ = started(make_trainer, monkeypatch, "+perturb=False+soft_target=True", size=3)
    targets = []
    for trainer in (hard, soft):
        monkeypatch.setattr(
            trainer,
            "terms",
            lambda p, target, *rest: targets.append(target) or {"unsup": p[0].sum()},
        )
        steps_of(trainer, data)
    assert set(targets[0].unique().tolist()) == {0.0, 1.0}
    assert ((targets[3] > 0.6) == (targets[0] > 0)).float().mean() > 0.99
    assert len(targets[3].unique()) > 50


@pytest.mark.parametrize("score", ["corrected", "released", "residual"])
def test_scores_are_kept_after_the_step(make_trainer, monkeypatch, score):
    trainer, data, _ = started(make_trainer, monkeypatch, f"+score={score}+memory=5", size=2)
    before = {k: v.clone() for k, v in trainer.companions["scores"].state_dict().items()}
    steps_of(trainer, data)
    for key, value in trainer.companions["scores"].state_dict().items():
        assert torch.equal(value, before[key])
    trainer.after_step(trainer._observed)
    memory = trainer.companions["scores"]
    assert memory.seen().tolist() == [True, True, False, False, False]
    assert torch.equal(memory.scores[:2], trainer._observed["scores"][0])


def test_rough_predictions_are_left_out(make_trainer, monkeypatch):
    trainer, data, head = started(make_trainer, monkeypatch, "+min_keep=0.5", size=4)
    torch.manual_seed(0)
    rough = head.clone()
    rough[1] = (rough[1] + 0.7 * torch.randn(1, *SHAPE)).clamp(0, 1)
    found = fit_ellipses(rough > 0.6, data.valid_u)
    _, mask = refine_by_ellipse(rough, ellipse_distance(found, SHAPE), 0.6)
    kept = trainer.select(rough, mask, data.valid_u, found.found)
    assert not kept[1] and kept.sum() >= 2
    trainer.step = trainer.total_steps  # at the end all of the latest samples are good enough
    assert trainer.select(rough, mask, data.valid_u, found.found).all()


def test_schedules(make_trainer, monkeypatch):
    trainer = begin(make_trainer("SSLTrainerERSR+pretrain=0.5", configuration="2d"))
    assert "unlabeled" not in next(trainer.dataloader_train)
    assert trainer.teacher_decay() == 0 and not trainer.needs_unlabeled(0.5)
    import sys

    module = sys.modules[type(trainer).__mro__[1].__module__]
    keeps, weights = [], []
    monkeypatch.setattr(
        module, "select_best", lambda s, *a, keep, **k: keeps.append(keep) or s[:, 0] > -1
    )
    monkeypatch.setattr(trainer, "track", lambda n, v: weights.append(v) if n == "weight" else None)
    trainer._unlabeled_active.value = True
    data = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    for step in (4, 6, 8):  # of 8: start, middle and end of stage 2
        trainer.step = step
        assert 0 < trainer.teacher_decay() < 1
        list(trainer.losses(data))
    ramps = [math.exp(-5), math.exp(-5 / 4), 1]
    assert weights == pytest.approx(ramps)
    assert keeps == pytest.approx([0.5 + 0.5 * r for r in ramps])
    assert keeps[0] == pytest.approx(0.503, abs=1e-3)


@pytest.mark.parametrize(
    ("dataset", "label", "channel"),
    [("Channels", 3, 3), ("Channels", 1, 1), ("RegionsIgnore", 2, 1)],
)
def test_the_head_is_the_class_that_was_named(make_trainer, monkeypatch, dataset, label, channel):
    trainer, data, head = started(make_trainer, monkeypatch, f"+head_label={label}", dataset)
    prob = trainer.teacher_prob(data.x_u)
    assert torch.equal(trainer.head(prob), prob[:, channel : channel + 1])
    assert torch.equal(trainer.head(prob), head)
    steps = steps_of(trainer, data)
    assert all(torch.isfinite(v) for t in steps for v in t.values())
    sum(steps[1].values()).backward()
    layer = trainer.student.decoder.seg_layers[-1].bias.grad
    if trainer.regions:  # a softmax ties the channels, sigmoids do not
        assert layer[channel] != 0 and not layer[:channel].any()
    assert all(p.grad is None for p in trainer.teacher.parameters())


@pytest.mark.parametrize(("dataset", "number"), [("Toy", 2), ("Channels", 3), ("Regions", 2)])
def test_a_class_that_does_not_exist_is_named(make_trainer, dataset, number):
    with pytest.raises(UserError, match=rf"head_label={number + 1}.*Choose 1 to {number}"):
        make_trainer(f"SSLTrainerERSR+head_label={number + 1}", dataset, "2d")


def test_3d_is_refused_by_name(make_trainer):
    with pytest.raises(NotImplementedError, match=r"SSLTrainerERSR.* does not support 3d"):
        make_trainer("SSLTrainerERSR", configuration="3d_fullres")


def test_halves_are_perturbed_each_by_itself(make_trainer, monkeypatch):
    trainer, data, _ = started(make_trainer, monkeypatch, size=3)
    plain, _, _ = started(make_trainer, monkeypatch, "+perturb=False", size=3)
    seen, clean = images_of(trainer, monkeypatch), images_of(plain, monkeypatch)
    changed = 0
    for seed in range(5):
        for t in (trainer, plain):
            steps_of(t, data, seed)
        for a, b in zip(seen, clean, strict=True):
            if len(a) == 3 and not torch.equal(a, data.x_l):
                assert torch.equal(a[0], b[0])  # the patch itself never
                changed += not torch.equal(a[1:], b[1:])
        seen.clear(), clean.clear()
    assert changed >= 5


def test_both_sides_of_the_mirrored_target_learn(make_trainer, monkeypatch):
    trainer, data, _ = started(make_trainer, monkeypatch, size=3)
    probs = [torch.rand(1, 1, *SHAPE).requires_grad_() for _ in range(3)]
    mirror = mirror_at(fit_ellipses(head_prob(1) > 0.6, data.valid_u[:1]), SHAPE)
    ones = torch.ones(1)
    terms = trainer.terms(probs, torch.zeros(1, 1, *SHAPE), mirror, data.valid_u[:1], ones)
    for key, reached in (
        ("unsup_seg", (True, False, False)),
        ("unsup_augmented", (True, True, True)),
        ("unsup_mirror", (False, True, True)),
    ):
        grads = torch.autograd.grad(terms[key], probs, allow_unused=True, retain_graph=True)
        assert tuple(g is not None and bool(g.any()) for g in grads) == reached, key
    even = [half_mirrored(head_prob(1), mirror, "left")] * 3
    same = trainer.terms(even, even[0], mirror, data.valid_u[:1], ones)
    assert same["unsup_seg"] == 0 and same["unsup_mirror"].item() < 1e-3


def test_the_low_precision_run_is_close(make_trainer, monkeypatch):
    trainer, data, _ = started(make_trainer, monkeypatch, size=3)
    full = total(steps_of(trainer, data))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = total(steps_of(trainer, data))
    for key, value in full.items():
        assert half[key].dtype == torch.float32
        assert half[key].item() == pytest.approx(value.item(), rel=5e-2, abs=3e-2), key


@pytest.mark.parametrize(
    "setting",
    ["pretrain=1", "head_label=0", "unsup_weight=-1", "threshold=1", "min_keep=2", "memory=0"],
)
def test_settings_out_of_range_are_refused(make_trainer, setting):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        make_trainer("SSLTrainerERSR+" + setting)
