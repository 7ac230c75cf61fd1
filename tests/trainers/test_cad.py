"""CAD: what its students see, and where its losses reach."""

import math
import sys

import pytest
import torch
from make_trainers import next_batch, start, values
from resize_batch import resized

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import hard_labels, squared_dice_loss
from nnunet_ssl.trainers import SSLTrainerCAD

FULL = "+pretrain=0+rampup=0+largest_component=off"


def begin(trainer):
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def started(make_trainer, settings="", dataset="Toy", configuration="3d_fullres"):
    trainer = begin(make_trainer("SSLTrainerCAD" + FULL + settings, dataset, configuration))
    return trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device)


def seeded(trainer, batch):
    torch.manual_seed(1)
    return values(trainer.losses(batch))


class Seen:
    """What the networks get and what counts."""

    def __init__(self, trainer, monkeypatch):
        self.student, self.peer, self.losses, self.windows = [], [], [], []
        for network, seen in ((trainer.student, self.student), (trainer.peer, self.peer)):
            network.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        masked_loss, choose = trainer.masked_loss, trainer.choose

        def watched_loss(output, target, keep):
            self.losses.append((output, target, keep, masked_loss(output, target, keep)))
            return self.losses[-1][-1]

        monkeypatch.setattr(trainer, "masked_loss", watched_loss)
        monkeypatch.setattr(
            trainer, "choose", lambda *maps: self.windows.append(choose(*maps)) or self.windows[-1]
        )


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("dataset", ["Channels", "RegionsIgnore"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_students_see_mixes_then_both_displaced_views(
    make_trainer, monkeypatch, configuration, dataset, size
):
    trainer, data = started(make_trainer, "", dataset, configuration)
    data = resized(data, size)
    seen = Seen(trainer, monkeypatch)
    steps = list(trainer.losses(data))
    assert [sorted(t) for t in steps] == [["sup", "unsup", "unsup_cps"]] + 2 * [["unsup_displaced"]]
    assert all(torch.isfinite(v) for t in steps for v in t.values())
    assert len(seen.student) == len(seen.peer) == 3 and all(len(x) == size for x in seen.student)
    weak, strong = seen.student[0], seen.peer[0]
    true = seen.losses[0][2]
    # true voxels of the first loss are the box of the mixes or all else, a half of the batch each
    assert torch.equal(weak, torch.where(true, data.x_l, data.views["stock"]))
    assert not torch.equal(weak, strong)
    assert true.flatten(1).float().mean(1).min() > 0.2
    # the strong view learns at most where the weak one does: not from noise
    for (_, _, w, _), (_, _, s, _) in (seen.losses[0::2], seen.losses[1::2]):
        assert not (s & ~w).any()
    assert any(w is not None for both in seen.windows for w in both)
    for step, own, other in ((1, weak, strong), (2, strong, weak)):
        x = seen.student[step]
        assert torch.equal(x, seen.peer[step])
        windows = seen.windows[step - 1]
        cell = trainer.cell(x.shape[2:])
        for i, found in enumerate(windows):
            changed = (x[i] != own[i]).any(0)
            if found is None:
                assert not changed.any()
                continue
            to, of, n = (
                [f * v for f, v in zip(cell, values, strict=True)]
                for values in (found.target, found.source, found.size)
            )
            limit = [max(f, round(s / 8)) for f, s in zip(cell, x.shape[2:], strict=True)]
            assert all(a <= b for a, b in zip(n, limit, strict=True))
            at, source = (
                (..., *(slice(a, a + b) for a, b in zip(start, n, strict=True)))
                for start in (to, of)
            )
            assert torch.equal(x[i][at], other[i][source])
            outside = torch.ones_like(changed)
            outside[at] = False
            assert not (changed & outside).any()


def test_mix_losses_weigh_true_and_pseudo_labels_as_published(make_trainer, monkeypatch):
    trainer, data = started(make_trainer)
    seen = Seen(trainer, monkeypatch)
    terms = next(iter(trainer.losses(data)))
    (sup_w, pse_w, sup_s, pse_s) = seen.losses
    assert terms["sup"].item() == pytest.approx((sup_w[-1] + sup_s[-1]).item())
    assert terms["unsup"].item() == pytest.approx(0.5 * (pse_w[-1] + pse_s[-1]).item())
    for true, pseudo in ((sup_w, pse_w), (sup_s, pse_s)):
        assert torch.equal(true[1], data.target) and not (true[2] & pseudo[2]).any()
    assert torch.equal(sup_w[2] | pse_w[2], sup_w[2] | data.valid_u)
    # all true: the plain loss of both students
    output = sup_w[0]
    everywhere = torch.ones_like(sup_w[2])
    plain = trainer.loss(output, data.y_l).item()
    assert trainer.masked_loss(output, data.target, everywhere).item() == pytest.approx(
        plain, abs=1e-5
    )


def test_noise_of_the_strong_view_teaches_nothing(make_trainer, monkeypatch):
    trainer, data = started(make_trainer, "+cutout_probability=1")
    seen = Seen(trainer, monkeypatch)
    counted, searched = [], []
    cad = sys.modules[SSLTrainerCAD.__module__]
    mutual, coarse_maps = trainer.mutual, cad.coarse_maps

    def watched_mutual(outputs, labels, sure_of):
        counted.append(sure_of)
        return mutual(outputs, labels, sure_of)

    def watched_maps(prob, valid, *args):
        searched.append(valid)
        return coarse_maps(prob, valid, *args)

    monkeypatch.setattr(trainer, "mutual", watched_mutual)
    monkeypatch.setattr(cad, "coarse_maps", watched_maps)
    terms, *displaced = trainer.losses(data)
    (sup_w, pse_w, sup_s, pse_s) = (keep for _, _, keep, _ in seen.losses)
    noise = (sup_w & ~sup_s) | (pse_w & ~pse_s)
    assert noise.any() and not (noise & (sup_s | pse_s)).any()
    assert torch.equal(sup_s | pse_s, (sup_w | pse_w) & ~noise)
    mixes, *displaced_counted = counted
    # what student 2 says of noise is no label, what student 1 says there is
    assert (mixes[0] & noise).any() and not (mixes[1] & noise).any()
    # no window is looked for in noise
    assert (searched[0] & noise).any() and not (searched[1] & noise).any()
    # windows take along whether they show noise
    assert len(displaced_counted) == len(displaced) == 2
    for own, found, windows in zip((0, 1), displaced_counted, seen.windows, strict=True):
        expected = trainer.displaced(mixes[own], mixes[1 - own], windows)
        assert all(torch.equal(f, expected) for f in found)
    assert all(torch.isfinite(v) for v in terms.values())


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_labels_of_noise_do_not_decide_which_piece_is_largest(make_trainer, monkeypatch, dataset):
    trainer, data = started(make_trainer, "+cutout_probability=1", dataset)
    images, filtered, teacher_prob = [], [], trainer.teacher_prob

    def seen_by_teacher(x):
        images.append(x)
        return teacher_prob(x)

    monkeypatch.setattr(trainer, "teacher_prob", seen_by_teacher)

    def unfiltered(labels, valid, mode):
        assert valid is data.valid_u
        filtered.append(labels)
        return labels

    monkeypatch.setattr(trainer, "keep_largest", unfiltered)
    _, strong = trainer.make_views(data, torch.zeros_like(data.valid_l))
    weak_label, strong_label = filtered
    noise = (~strong.kept).expand_as(weak_label)
    in_noise = hard_labels(teacher_prob(images[1]), trainer.regions)
    assert (in_noise != weak_label)[noise].any()  # else the next line tells nothing
    assert torch.equal(strong_label[noise], weak_label[noise])
    assert torch.equal(strong_label[~noise], in_noise[~noise])


def test_first_stage_trains_one_student_and_the_second_starts_both_alike(make_trainer):
    trainer = begin(make_trainer("SSLTrainerCAD+pretrain=0.25"))  # of 8 steps
    start = [p.clone() for p in trainer.peer.parameters()]
    batch = next(trainer.dataloader_train)

    def alike(a, b):
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    assert not alike(trainer.student, trainer.peer)  # own random weights until the first step
    for _ in range(2):
        trainer.train_step(batch)
        assert alike(trainer.student, trainer.peer) and alike(trainer.student, trainer.teacher)
    assert not all(torch.equal(p, q) for p, q in zip(start, trainer.peer.parameters(), strict=True))
    assert trainer.progress == 0.25
    momentum = trainer.optimizer.state
    assert momentum.keys() <= set(trainer.student.parameters())  # student 2 has none yet
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    with_unlabeled = next(trainer.dataloader_train)
    trainer.train_step(with_unlabeled)
    assert not alike(trainer.student, trainer.peer) and not alike(trainer.student, trainer.teacher)


@pytest.mark.parametrize("dataset", ["Toy", "Regions"])
def test_each_student_learns_from_the_others_labels_alone(make_trainer, dataset):
    trainer, data = started(make_trainer, "", dataset)
    x = data.x_l
    outputs = [trainer.student(x)[0].detach(), trainer.peer(x)[0].detach()]
    outputs = [o.requires_grad_() for o in outputs]
    labels = [o > 0 if trainer.regions else o.argmax(1, keepdim=True) for o in outputs]
    sure_of = [data.valid_l & (torch.rand(data.valid_l.shape) > 0.2) for _ in range(2)]
    trainer.mutual(tuple(outputs), labels, sure_of).backward()
    for i in (0, 1):
        alone = outputs[i].detach().clone().requires_grad_()
        squared_dice_loss(alone, labels[1 - i], sure_of[1 - i], trainer.regions).backward()
        assert torch.equal(outputs[i].grad, alone.grad)


def test_no_gradient_reaches_teacher_or_selection(make_trainer, monkeypatch):
    trainer, data = started(make_trainer)
    found = []
    choose = trainer.choose
    monkeypatch.setattr(trainer, "choose", lambda *maps: found.extend(maps) or choose(*maps))
    for terms in trainer.losses(data):
        sum(terms.values()).backward()
    assert found and not any(m.requires_grad for m in found)
    assert all(p.grad is None for p in trainer.teacher.parameters())
    for network in (trainer.student, trainer.peer):
        assert sum(p.grad.abs().sum() for p in network.parameters() if p.grad is not None) > 0


def test_threshold_and_size_grow_to_their_end_values(make_trainer, monkeypatch):
    trainer, _ = started(make_trainer, "", "Toy", "2d")
    tracked = {}
    monkeypatch.setattr(
        trainer, "track", lambda name, value: tracked.setdefault(name, []).append(value)
    )
    module = sys.modules[SSLTrainerCAD.__module__]  # the package's attribute is the class
    limits, thresholds = [], []

    def watch(target, source, *, threshold, limit, **rest):
        limits.append(tuple(limit)), thresholds.append(threshold)

    monkeypatch.setattr(module, "choose_windows", watch)
    maps = torch.zeros(1, 5, 16, 16)
    for step in range(9):
        trainer.step = step
        trainer.choose(maps, maps)
    assert thresholds == sorted(thresholds) and limits == sorted(limits)
    assert thresholds[0] == pytest.approx(0.6, abs=0.01) and thresholds[7:] == [0.95] * 2
    assert limits[0] == (2, 2) and limits[7:] == [(4, 4)] * 2  # cells of 2 pixels, of 32
    assert min(thresholds) > 1 / 2 and tracked["threshold"] == thresholds


@pytest.mark.parametrize(
    ("spatial", "cell"),
    [
        ((256, 224), (2, 2)),
        ((20, 256, 224), (1, 4, 4)),
        ((128, 128, 128), (4, 4, 4)),
        ((9, 40), (1, 2)),
    ],
)
def test_cells_are_small_beside_the_patch(make_trainer, spatial, cell):
    trainer, _ = started(make_trainer)
    assert trainer.cell(spatial) == cell


@pytest.mark.parametrize("setting", ["shape=region", "oversized=skip", "source=other_sample"])
def test_other_readings_of_the_paper_run(make_trainer, setting):
    trainer, data = started(make_trainer, "+" + setting)
    terms = list(trainer.losses(data))
    assert len(terms) == 3 and all(torch.isfinite(v) for t in terms for v in t.values())


@pytest.mark.parametrize(
    "setting",
    [
        "threshold_start=0.99",
        "threshold_end=1.5",
        "size_start=0.5",
        "size_end=0",
        "candidates=0",
        "min_region=0",
        "pretrain=1",
        "cps_weight=-1",
    ],
)
def test_settings_out_of_range_are_refused(make_trainer, setting):
    with pytest.raises(Exception, match=setting.split("=")[0]):
        make_trainer("SSLTrainerCAD+" + setting)


@pytest.mark.parametrize(
    ("setting", "term"),
    [
        ("unsup_weight", "unsup"),
        ("cps_weight", "unsup_cps"),
        ("displaced_weight", "unsup_displaced"),
    ],
)
def test_weights_and_ramp_of_each_term(setting, term, make_trainer):
    trainer = start(make_trainer("SSLTrainerCAD+pretrain=0+rampup=0.5", configuration="2d"))
    batch = next_batch(trainer)
    trainer.step = 2  # of 8: half of the ramp
    before = seeded(trainer, batch)
    setattr(trainer, setting, 3 * getattr(trainer, setting))
    assert seeded(trainer, batch) == pytest.approx(before | {term: 3 * before[term]}, rel=1e-4)
    trainer.step = 4
    ramped = math.exp(-5 * 0.5**2)
    assert seeded(trainer, batch)["unsup_cps"] * ramped == pytest.approx(
        before["unsup_cps"] * (3 if setting == "cps_weight" else 1), rel=1e-4
    )


def test_other_readings_of_the_paper_reach_the_windows(make_trainer, monkeypatch):
    name = "SSLTrainerCAD+shape=region+source=other_sample+oversized=skip+candidates=2+min_region=3"
    trainer = start(make_trainer(name, configuration="2d"))
    cad, copied, asked = sys.modules[SSLTrainerCAD.__module__], [], []
    monkeypatch.setattr(cad, "displace", lambda *args: copied.append(args))
    monkeypatch.setattr(
        cad, "choose_windows", lambda own, other, **options: asked.append((other, options))
    )
    own, other = torch.rand(2, 2, 5, 16, 16)
    trainer.displaced(own, other, trainer.choose(own, other))
    assert torch.equal(copied[0][1], other.roll(1, 0)) and copied[0][-1] == "region"
    assert torch.equal(torch.stack([source for source, _ in asked]), other.roll(1, 0))
    options = asked[0][1]
    assert [options[k] for k in ("oversized", "candidates", "min_region")] == ["skip", 2, 3]


def test_passes_are_those_of_the_stated_cost(make_trainer):
    trainer, batch = started(make_trainer, "+displaced_weight=0")
    passes = []
    for network in (trainer.student, trainer.peer, trainer.teacher):
        network.register_forward_pre_hook(
            lambda *_: passes.append(3 if torch.is_grad_enabled() else 1)
        )
    list(trainer.losses(batch))
    assert sum(passes) / 3 == pytest.approx(trainer.step_cost)
