import math

import pytest
import torch

from nnunet_ssl.functional import cutmix, cutmix_boxes, random_partners


@pytest.mark.parametrize("spatial", [(200, 300), (60, 80, 100)])
def test_one_solid_box_of_the_wanted_share_and_shape(spatial):
    inside = cutmix_boxes(40, spatial, 0.02, 0.4, aspect=3.3)
    assert inside.dtype == torch.bool and inside.shape == (40, 1, *spatial)
    shares = []
    for mask in inside[:, 0]:
        found = mask.nonzero()
        extent = (found.amax(0) - found.amin(0) + 1).tolist()
        assert math.prod(extent) == mask.sum()  # solid
        sides = [e / n for e, n in zip(extent, spatial, strict=True)]
        assert max(sides) / min(sides) < 3.3 * 1.1  # sides are rounded to voxels
        shares.append(math.prod(sides))
    assert min(shares) > 0.02 * 0.9 and max(shares) < 0.4 * 1.1
    assert max(shares) - min(shares) > 0.2  # they differ


def test_a_large_long_box_stays_in_the_patch_and_keeps_its_volume():
    inside = cutmix_boxes(50, (400, 400), 0.81, 0.81, aspect=100)
    assert inside.float().mean((1, 2, 3)).numpy() == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("spatial", [(300, 300), (60, 60, 60)])
def test_several_boxes_fill_the_share_together_less_their_overlap(spatial):
    share = cutmix_boxes(60, spatial, 0.25, 0.5, count=3, aspect=4).float().flatten(1).mean(1)
    assert share.max() < 0.51 and share.mean() > 0.25
    single = cutmix_boxes(60, spatial, 0.25 / 3, 0.5 / 3, aspect=4).float().flatten(1).mean(1)
    assert share.mean() > 2 * single.mean()


def test_boxes_reach_every_voxel_and_come_as_often_as_asked():
    inside = cutmix_boxes(600, (9, 7), 0.1, 0.4, probability=0.5)
    assert inside.any(0).all()
    assert inside.flatten(1).any(1).float().mean().item() == pytest.approx(0.5, abs=0.07)


def test_boxes_and_partners_follow_the_cpu_generator():
    def draw():
        torch.manual_seed(3)
        return cutmix_boxes(4, (8, 8, 8), 0.1, 0.4, count=2), random_partners(5)

    for a, b in zip(draw(), draw(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_every_partner_is_another_sample_and_used_once(batch):
    for _ in range(20):
        partners = random_partners(batch)
        assert sorted(partners.tolist()) == list(range(batch))
        assert (partners != torch.arange(batch)).all()


def test_image_labels_and_masks_are_cut_alike():
    x = torch.randn(3, 2, 6, 7)
    label = (10 * x[:, :1]).long()
    inside, partners = cutmix_boxes(3, (6, 7), 0.2, 0.4), torch.tensor([1, 2, 0])
    image, labels = cutmix(inside, partners, x, label)
    assert torch.equal(labels, (10 * image[:, :1]).long())
    for i, j in enumerate(partners.tolist()):
        box = inside[i].expand(2, 6, 7)
        assert torch.equal(image[i][box], x[j][box])
        assert torch.equal(image[i][~box], x[i][~box])


def test_empty_boxes_leave_all_as_it_is():
    x = torch.randn(4, 1, 5, 5)
    inside = cutmix_boxes(4, (5, 5), 0.1, 0.4, probability=0)
    (mixed,) = cutmix(inside, random_partners(4), x)
    assert torch.equal(mixed, x)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"low <= high.*got 0.5, 0.2"):
        cutmix_boxes(2, (8, 8), 0.5, 0.2)
    with pytest.raises(ValueError, match="aspect >= 1"):
        cutmix_boxes(2, (8, 8), 0.1, 0.2, aspect=0.5)
    with pytest.raises(ValueError, match="batch of 2 or more; got 1"):
        random_partners(1)
