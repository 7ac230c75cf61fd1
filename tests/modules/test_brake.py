import math

import pytest
import torch

from nnunet_ssl.modules import ClassBrake, class_shares

NAN = torch.tensor([math.nan, math.nan])


@pytest.mark.parametrize("spatial", [(6, 5), (3, 4, 5)])
def test_class_shares_equal_naive_counts(spatial):
    labels = torch.randint(0, 3, (3, 1, *spatial))
    valid = torch.rand(3, 1, *spatial) > 0.3
    samples = torch.tensor([True, False, True])
    for chosen in (None, samples):
        shares = class_shares(labels, valid, 3, regions=False, samples=chosen)
        counted = valid.clone()
        if chosen is not None:
            counted[1] = False
        picked = labels[counted].tolist()
        expected = [picked.count(k) / len(picked) for k in (1, 2)]
        assert shares.tolist() == pytest.approx(expected)
        multi = torch.cat((labels > 0, labels == 2), 1)
        shares = class_shares(multi, valid, 2, regions=True, samples=chosen)
        assert shares.tolist() == pytest.approx([sum(expected), expected[1]])


def test_class_shares_of_nothing_are_nan():
    labels, valid = torch.ones(2, 1, 4, 4, dtype=torch.int64), torch.ones(2, 1, 4, 4).bool()
    none = torch.zeros(2, dtype=torch.bool)
    assert class_shares(labels, valid, 3, False, none).isnan().all()
    assert class_shares(labels, valid & False, 3, False).isnan().all()


def test_no_brake_before_both_sides_were_seen():
    brake = ClassBrake(2)
    share = torch.tensor([0.1, 0.2])
    assert brake.value().item() == 1
    brake.update(NAN, share)
    assert brake.value().item() == 1
    other = ClassBrake(2)
    other.update(share, NAN)
    assert other.value().item() == 1
    other.update(torch.zeros(2), share)
    assert other.value().item() == 1  # the mean teacher share is still half of the true one


@pytest.mark.parametrize(
    ("ratio", "value"), [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (3.0, 1.0)]
)
def test_value_is_set_by_the_class_that_vanishes_most(ratio, value):
    brake = ClassBrake(2)
    truth = torch.tensor([0.1, 0.002])
    brake.update(truth * torch.tensor([1.0, ratio]), truth)
    assert brake.value().shape == ()
    assert brake.value().item() == pytest.approx(value, rel=1e-4)


def test_shares_are_bias_corrected_means_and_nan_skips_one_side():
    brake = ClassBrake(2, decay=0.9)
    teacher, truth = torch.rand(5, 2) * 0.01, torch.rand(5, 2) * 0.3
    for t, g in zip(teacher, truth, strict=True):
        brake.update(t, g)
        brake.update(NAN, g * 0 + 0.5 * math.nan)
    assert brake.teacher_count.item() == brake.label_count.item() == 5
    weights = torch.tensor([0.9**k for k in (4, 3, 2, 1, 0)])[:, None]
    f, g = (teacher * weights).sum(0) / weights.sum(), (truth * weights).sum(0) / weights.sum()
    expected = ((f / g).min() / 0.2).clamp(max=1).item()
    assert brake.value().item() == pytest.approx(expected, rel=1e-4)
    brake.update(NAN, truth[0])
    assert (brake.teacher_count.item(), brake.label_count.item()) == (5, 6)


def test_brake_opens_again_when_the_class_returns():
    brake = ClassBrake(1, decay=0.9)
    truth = torch.tensor([0.1])
    values = []
    for share in [0.1] * 5 + [0.0] * 40 + [0.1] * 40:
        brake.update(torch.tensor([share]), truth)
        values.append(brake.value().item())
    assert values[4] == 1 and values[44] < 0.1 and values[-1] == 1


def test_classes_rare_in_the_labels_are_not_watched():
    brake = ClassBrake(2)
    brake.update(torch.tensor([0.1, 0.0]), torch.tensor([0.1, 5e-6]))
    assert brake.value().item() == 1
    unwatched = ClassBrake(2)
    unwatched.update(torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.0]))
    assert unwatched.value().item() == 1


def test_state_is_complete():
    brake, other = ClassBrake(2), ClassBrake(2)
    brake.update(torch.tensor([0.01, 0.2]), torch.tensor([0.2, 0.2]))
    assert set(brake.state_dict()) == {
        "teacher_share", "label_share", "teacher_count", "label_count"
    }  # fmt: skip
    other.load_state_dict(brake.state_dict())
    assert other.value().item() == brake.value().item() == pytest.approx(0.25, rel=1e-4)
    with pytest.raises(ValueError, match="0 < decay < 1"):
        ClassBrake(2, decay=1.0)
