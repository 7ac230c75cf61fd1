import pytest
import torch

from nnunet_ssl.modules import Readiness, overlap_counts


@pytest.mark.parametrize("spatial", [(6, 5), (3, 4, 5)])
def test_overlap_counts_equal_naive_ones(spatial):
    labels, target = torch.randint(0, 3, (2, 2, 1, *spatial))
    valid = torch.rand(2, 1, *spatial) > 0.3
    counts = overlap_counts(labels, target, valid, 3, regions=False)
    pairs = list(zip(labels[valid].tolist(), target[valid].tolist(), strict=True))
    expected = [
        [2 * sum(a == b == k for a, b in pairs) for k in (1, 2)],
        [sum((a == k) + (b == k) for a, b in pairs) for k in (1, 2)],
    ]
    assert counts.tolist() == expected
    channels = [torch.cat((x > 0, x == 2), 1) for x in (labels, target)]
    counts = overlap_counts(*channels, valid, 2, regions=True)
    assert counts[:, 1].tolist() == [row[1] for row in expected]
    assert counts[0, 0] == 2 * sum(a > 0 and b > 0 for a, b in pairs)
    assert counts[1, 0] == sum((a > 0) + (b > 0) for a, b in pairs)


def test_dice_is_that_of_the_last_steps_together():
    readiness = Readiness(3, low=0.0, high=1.0, decay=0.5)
    assert readiness.dice().item() == readiness.value().item() == 0
    readiness.update(torch.tensor([[0.0, 8, 0], [10, 10, 0]]))
    readiness.update(torch.tensor([[20.0, 0, 0], [25, 0, 0]]))
    # the third class was never there
    expected = (20 / (5 + 25) + 4 / 5) / 2
    assert readiness.dice().item() == pytest.approx(expected)
    assert readiness.value().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dice", "low", "high", "value"),
    [(0.6, 0.7, 0.9, 0), (0.75, 0.7, 0.9, 0.25), (0.95, 0.7, 0.9, 1), (0.5, 0.5, 0.5, 1)],
)
def test_value_rises_with_the_dice(dice, low, high, value):
    readiness = Readiness(1, low=low, high=high)
    readiness.update(torch.tensor([[1000 * dice], [1000.0]]))
    assert readiness.value().item() == pytest.approx(value, abs=1e-6)


def test_no_limits_is_always_ready():
    assert Readiness(2, low=0.0, high=0.0).value().item() == 1


@pytest.mark.parametrize("wrong", [{"low": 0.9, "high": 0.7}, {"low": 0, "high": 1, "decay": 1.0}])
def test_wrong_limits_are_named(wrong):
    with pytest.raises(ValueError, match="low <= high"):
        Readiness(2, **wrong)
