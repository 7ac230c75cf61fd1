"""M3HL: what its mixes show, and where its losses reach."""

import math
import sys

import pytest
import torch
from resize_batch import resized

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    feature_cosine,
    feature_l1,
    full_res,
    random_blocks,
    random_boxes,
)
from nnunet_ssl.trainers import SSLTrainerBCP, SSLTrainerM3HL

FULL = "+pretrain=0+largest_component=off"


def started(make_trainer, settings="", dataset="Toy", configuration="3d_fullres", batch=None):
    trainer = make_trainer("SSLTrainerM3HL" + FULL + settings, dataset, configuration)
    trainer.on_train_start()
    data = Batch.from_loader(next(trainer.dataloader_train), trainer.device)
    return trainer, data if batch is None else resized(data, batch)


def watch(trainer, monkeypatch):
    """Record images that the student sees and voxels that count as true."""
    seen = {"x": [], "keep": []}
    tap, masked_loss = trainer.tap, trainer.masked_loss

    def watched_tap(network, x):
        if network is trainer.student:
            seen["x"].append(x)
        return tap(network, x)

    def watched_loss(output, target, keep):
        seen["keep"].append(keep)
        return masked_loss(output, target, keep)

    monkeypatch.setattr(trainer, "tap", watched_tap)
    monkeypatch.setattr(trainer, "masked_loss", watched_loss)
    return seen


def terms_of(trainer, data):
    (terms,) = trainer.losses(data)
    return terms


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_mixes_show_complementary_blocks_of_their_own_patches(
    make_trainer, monkeypatch, configuration, size
):
    trainer, data = started(make_trainer, configuration=configuration, batch=size)
    seen = watch(trainer, monkeypatch)
    directions = set()
    for _ in range(8):
        terms = terms_of(trainer, data)
        assert all(torch.isfinite(t) for t in terms.values())
        x, true, pseudo = seen["x"][-1], seen["keep"][-2], seen["keep"][-1]
        assert torch.equal(x, torch.where(true, data.x_l, data.views["stock"]))
        assert torch.equal(pseudo, ~true & data.valid_u)
        for i in range(size // 2):
            assert torch.equal(true[i], ~true[size - 1 - i])
        assert true.flatten(1).float().mean(1).tolist() == [0.5] * size
        if size == 4:
            assert not torch.equal(true[0], true[1]) and not torch.equal(true[0], ~true[1])
        directions.add(bool(true[size // 2].flatten()[0]))
    assert directions == {True, False}


@pytest.mark.parametrize(("labeled", "size"), [(False, 2), (True, 2), (True, 5)])
def test_ratio_decides_which_patch_is_seen(make_trainer, monkeypatch, labeled, size):
    trainer, data = started(make_trainer, batch=size)
    seen = watch(trainer, monkeypatch)
    monkeypatch.setattr(type(trainer), "ratio", float(labeled))
    terms_of(trainer, data)
    first, last = seen["x"][0][0], seen["x"][0][-1]
    sources = [data.views["stock"], data.x_l]
    assert torch.equal(first, sources[labeled][0])
    assert torch.equal(last, sources[not labeled][-1])


def test_ratio_spread_draws_each_step_from_its_range(make_trainer):
    trainer, _ = started(make_trainer, "+ratio_spread=0.2")
    shares = {
        trainer.draw_blocks(1, torch.Size((16, 32, 32))).float().mean().item() for _ in range(60)
    }
    assert 0.3 - 1 / 64 <= min(shares) < 0.37 and 0.63 < max(shares) <= 0.7
    assert len(shares) > 10


@pytest.mark.parametrize("size", [2, 4])
def test_features_follow_all_four_pairs_alike(make_trainer, monkeypatch, size):
    trainer, data = started(make_trainer, batch=size)
    taps = []
    tap = trainer.tap
    monkeypatch.setattr(trainer, "tap", lambda n, x: taps.append(tap(n, x)) or taps[-1])
    terms = terms_of(trainer, data)
    aim, mixed = taps
    half = size // 2
    low, high = [], []
    for i in (slice(0, half), slice(half, size)):  # x1, x2; partners are mirrored
        for j in (slice(0, half), slice(half, size)):
            order = 1 if i == j else -1

            def of(t, j=j, order=order):
                return t[j] if order == 1 else t[j].flip(0)

            low.append(feature_l1(mixed.feature[i], of(aim.feature)))
            high.append(feature_cosine(mixed.bottleneck[i], of(aim.bottleneck)))
    assert terms["unsup_low"].item() == pytest.approx(0.5 * torch.stack(low).mean().item())
    assert terms["unsup_high"].item() == pytest.approx(
        0.5 * torch.stack(high).mean().item(), abs=1e-6
    )


def test_feature_losses_reach_what_lies_before_them_and_nothing_of_the_teacher(make_trainer):
    trainer, data = started(make_trainer)
    terms = terms_of(trainer, data)
    encoder = {id(p) for p in trainer.student.encoder.parameters()}
    heads = {id(p) for p in trainer.student.decoder.seg_layers.parameters()}
    for key, reached in (
        ("unsup_high", lambda p: id(p) in encoder),
        ("unsup_low", lambda p: id(p) not in heads),
    ):
        parameters = list(trainer.student.parameters())
        grads = torch.autograd.grad(terms[key], parameters, allow_unused=True, retain_graph=True)
        sizes = [0.0 if g is None else g.abs().sum().item() for g in grads]
        for parameter, grad, size in zip(parameters, grads, sizes, strict=True):
            assert grad is None or reached(parameter) or size == 0, key
        assert sum(sizes) > 0
    sum(terms.values()).backward()
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_masked_features_compare_only_the_patch_that_is_shown(make_trainer, monkeypatch):
    trainer, data = started(make_trainer, "+masked_features=True")
    taps, masks = [], []
    tap, draw = trainer.tap, trainer.draw_true_voxels
    monkeypatch.setattr(trainer, "tap", lambda n, x: taps.append(tap(n, x)) or taps[-1])
    monkeypatch.setattr(trainer, "draw_true_voxels", lambda x: masks.append(draw(x)) or masks[-1])
    terms = terms_of(trainer, data)
    aim, mixed = taps
    shown = (~masks[0]).expand_as(aim.feature)
    expected = (mixed.feature - aim.feature)[shown].abs().mean().item()
    assert terms["unsup_low"].item() == pytest.approx(0.5 * expected)
    assert 0 < terms["unsup_high"].item() < 1


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore", "Ignore"])
def test_with_bcps_box_and_without_features_it_is_bcp(make_trainer, monkeypatch, dataset):
    def box(batch, spatial, *args):
        torch.manual_seed(5)
        return random_boxes(batch, spatial, 2 / 3, 2 / 3, same=True)

    ours, data = started(make_trainer, "+feature_weight=0", dataset)
    bcp = make_trainer("SSLTrainerBCP" + FULL, dataset)
    bcp.on_train_start()
    for name in ("student", "teacher"):
        getattr(bcp, name).load_state_dict(getattr(ours, name).state_dict())
    assert (SSLTrainerM3HL.unsup_weight, SSLTrainerM3HL.ema_decay) == (
        SSLTrainerBCP.unsup_weight,
        SSLTrainerBCP.ema_decay,
    )
    monkeypatch.setattr(type(ours), "draw_blocks", lambda self, *args: box(*args))
    module = sys.modules[SSLTrainerBCP.__module__]  # the package's attribute is the class
    monkeypatch.setattr(module, "random_boxes", lambda n, spatial, *a, **k: box(n, spatial))
    monkeypatch.setattr(torch, "randperm", torch.arange)  # BCP's direction of each sample
    expected, found = terms_of(bcp, data), terms_of(ours, data)
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].item() == expected[key].item(), key


def test_first_stage_mixes_labeled_patches_only_and_holds_the_teacher(make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainerM3HL+pretrain=0.5")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    assert "unlabeled" not in batch
    data = Batch.from_loader(batch, trainer.device)
    images = []
    monkeypatch.setattr(
        type(trainer.student), "forward", spy(type(trainer.student).forward, images)
    )
    trainer.train_step(batch)
    (x,) = images
    other = data.x_l.flip(0)  # of two, the partner
    mixed = (x == data.x_l) | (x == other)
    assert mixed.all() and not torch.equal(x, data.x_l) and not torch.equal(x, other)
    for t, s in zip(trainer.teacher.parameters(), trainer.student.parameters(), strict=True):
        assert torch.equal(t, s)


def spy(forward, images):
    def watched(self, x):
        images.append(x)
        return forward(self, x)

    return watched


@pytest.mark.parametrize(
    "setting",
    ["grid=1", "ratio=0", "ratio_spread=0.6", "feature_weight=-1", "pretrain=1", "unsup_weight=-1"],
)
def test_settings_out_of_range_are_refused(make_trainer, setting):
    with pytest.raises(Exception, match=setting.split("=")[0]):
        make_trainer("SSLTrainerM3HL+" + setting)


def test_the_grid_follows_the_strides_of_the_plan(make_trainer):
    trainer, _ = started(make_trainer)
    torch.manual_seed(1)
    drawn = trainer.draw_blocks(2, torch.Size((5, 32, 32)))
    torch.manual_seed(1)
    assert torch.equal(drawn, random_blocks(2, (5, 32, 32), 4, 0.5, (4, 4, 4)))
    assert (drawn == drawn[:, :, :1]).all()  # 5 slices of stride 4: one cell


def test_the_low_precision_run_is_close(make_trainer):
    trainer, data = started(make_trainer)
    torch.manual_seed(2)
    full = terms_of(trainer, data)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = terms_of(trainer, data)
    for key, value in full.items():
        assert half[key].dtype == torch.float32
        assert half[key].item() == pytest.approx(value.item(), abs=3e-2), key


def phantoms(contrast, slope, noise, seed):
    """Two images with two discs each, and their masks; `slope` brightens them downwards."""
    draw = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images, masks = [], []
    for _ in range(2):
        mask = torch.zeros(32, 32)
        for label, middle in ((1, 10.0), (2, 22.0)):
            y, x = 4 * torch.rand(2, generator=draw) - 2 + torch.tensor([16.0, middle])
            height, width = 4 + 3 * torch.rand(2, generator=draw)
            mask[((row - y) / height) ** 2 + ((column - x) / width) ** 2 < 1] = label
        noisy = noise * torch.randn(32, 32, generator=draw)
        images.append(contrast * mask + slope * row / 32 + noisy)
        masks.append(mask)
    return torch.stack(images)[:, None], torch.stack(masks)[:, None]


@pytest.mark.parametrize("seed", [1, 2])
def test_dice_on_unlabeled_images_rises_above_the_labeled_only_run(make_trainer, seed):
    def run(pretrain):
        name = f"SSLTrainerM3HL+pretrain={pretrain}+seed={seed}+num_epochs=10"
        steps = "+num_iterations_per_epoch=20+num_val_iterations_per_epoch=1"
        trainer = make_trainer(name + steps, "Toy", "2d", short=False)
        trainer.on_train_start()
        trainer.on_epoch_start()
        image, mask = phantoms(1.0, 0.0, 0.3, 10 + seed)
        # paler, and brighter towards the bottom: what labelled images alone do not teach
        unlabeled_image, hidden_mask = phantoms(0.7, 0.5, 0.3, 20 + seed)
        every_voxel = torch.ones_like(mask, dtype=torch.bool)
        unlabeled = {
            "data": unlabeled_image,
            "views": {"stock": unlabeled_image},
            "valid": every_voxel,
            "forced_fg": torch.zeros(2, dtype=torch.bool),
            "keys": ["u0", "u1"],
            "meta": {},
        }
        labeled = {"data": image, "target": trainer.deep(mask), "valid": every_voxel}
        batch = {**unlabeled, **labeled, "keys": ["l0", "l1"], "unlabeled": unlabeled}
        for epoch in range(10):
            trainer.current_epoch = epoch
            trainer.on_train_epoch_start()
            for _ in range(20):
                trainer.train_step(batch)
        with torch.no_grad():
            found = full_res(trainer.student(unlabeled_image)).argmax(1, keepdim=True)
        pairs = [(found == k, hidden_mask == k) for k in (1, 2)]
        return sum((2 * (f & t).sum() / (f.sum() + t.sum())).item() for f, t in pairs) / 2

    labeled_only, all_images = run(0.99), run(0.3)
    assert 0.5 < labeled_only < all_images - 0.02


@pytest.mark.parametrize("spatial", [(8, 8), (4, 4, 4)])
def test_spread_of_features_is_that_between_patches(spatial):
    spread = sys.modules[SSLTrainerM3HL.__module__].patch_spread
    same = torch.randn(1, 3, *spatial).repeat(4, *[1] * (1 + len(spatial)))
    assert spread(same).item() == pytest.approx(0, abs=1e-6)
    other = torch.randn(4, 3, *spatial)
    assert spread(other).item() == pytest.approx(1, abs=0.2)
    half = spread(same + other).item()
    assert 0.5 < half < 0.9
    assert spread(100 * (same + other)).item() == pytest.approx(half, rel=1e-4)
    assert spread(other[:1]).isnan()


def test_features_are_ramped_up_in_the_second_stage(make_trainer):
    trainer = make_trainer("SSLTrainerM3HL+largest_component=off+pretrain=0.25+feature_rampup=0.5")
    trainer.on_train_start()
    trainer._unlabeled_active.value = True
    batch = next(b for b in trainer.dataloader_train if "unlabeled" in b)
    data = Batch.from_loader(batch, trainer.device)
    for step, expected in ((2, math.exp(-5)), (4, math.exp(-5 / 9)), (5, 1.0), (7, 1.0)):  # of 8
        trainer.step = step
        list(trainer.losses(data))
        found = trainer._meter.means()["pseudo_labels/feature_weight"]
        assert found == pytest.approx(0.5 * expected)
