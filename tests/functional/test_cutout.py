import pytest
import torch

from nnunet_ssl.functional import cutout


@pytest.mark.parametrize("spatial", [(40, 50), (16, 20, 24)])
def test_boxes_hold_noise_like_the_image_and_all_else_stays(spatial):
    x = torch.randn(60, 2, *spatial) * 3 + 5
    before = x.clone()
    valid = torch.ones(60, 1, *spatial, dtype=torch.bool)
    valid[..., :2] = False
    result, erased = cutout(x, 0.5, 0.02, 0.4, valid)
    assert torch.equal(x, before) and erased.dtype == torch.bool
    assert not (erased & ~valid).any()
    everywhere = erased.expand_as(x)
    assert torch.equal(result[~everywhere], x[~everywhere])
    assert (result[everywhere] != x[everywhere]).float().mean() > 0.99
    assert result[everywhere].mean().item() == pytest.approx(5, abs=0.2)
    assert result[everywhere].std().item() == pytest.approx(3, abs=0.2)
    share = erased.flatten(1).float().mean(1)
    assert 0.2 < (share > 0).float().mean() < 0.8 and share.max() <= 0.4


def test_never_and_always():
    x = torch.randn(8, 1, 20, 20)
    valid = torch.ones(8, 1, 20, 20, dtype=torch.bool)
    result, erased = cutout(x, 0, 0.1, 0.2, valid)
    assert torch.equal(result, x) and not erased.any()
    _, erased = cutout(x, 1, 0.25, 0.25, valid)
    assert erased.flatten(1).sum(1).tolist() == [100] * 8


def test_a_seed_repeats_it():
    x, valid = torch.randn(4, 1, 9, 9), torch.ones(4, 1, 9, 9, dtype=torch.bool)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(cutout(x, 0.7, 0.02, 0.4, valid))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        cutout(torch.rand(1, 1, 4, 4), 0.5, 0.5, 0.2, torch.ones(1, 1, 4, 4) > 0)


def test_boxes_are_shares_of_the_volume_and_noise_is_that_of_the_sample():
    x = 0.01 * torch.randn(8, 1, 16, 20, 24) + torch.arange(8.0).view(-1, 1, 1, 1, 1)
    result, erased = cutout(x, 1, 0.125, 0.125, torch.ones_like(x).bool())
    assert erased.flatten(1).sum(1).tolist() == [8 * 10 * 12] * 8
    for i in range(8):
        assert result[i][erased[i]].mean().item() == pytest.approx(i, abs=0.01)
