"""The drift gauge against counting by hand."""

import math

import pytest
import torch

from nnunet_ssl.modules import DriftGauge, confirmed_for, confirms_itself

NAN = float("nan")


def gauge(labels, counted, followed, regions=False):
    """A gauge over three patches whose labels are what the lists say, one entry an epoch."""
    x = torch.arange(3.0).view(3, 1, 1)
    valid = torch.tensor([[[1, 1, 1, 1]], [[1, 1, 1, 1]], [[1, 1, 0, 0]]], dtype=torch.bool)
    epoch = iter(range(100))
    state = {"epoch": -1, "seen": []}

    def label(part, part_valid):
        if part[0].item() == 0:
            state["epoch"] = next(epoch)
        chosen = part.flatten().long()
        state["seen"].append(chosen.tolist())
        assert torch.equal(part_valid, valid[chosen])
        return labels[state["epoch"]][chosen], counted[chosen]

    def follow(part, part_valid, part_labels):
        chosen = part.flatten().long()
        return followed[chosen], part_labels, part_valid

    return DriftGauge(x, valid, 2, regions, 2, label, follow), state


def test_numbers_equal_counting():
    first = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]], [[1, 0, 2, 2]]])
    second = torch.tensor([[[0, 1, 2, 2]], [[0, 0, 0, 1]], [[1, 0, 1, 1]]])  # the end is padding
    counted = torch.tensor([[[1, 1, 0, 1]], [[1, 1, 1, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    followed = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 1]], [[0, 0, 1, 1]]])
    meter, state = gauge([first, second, second], counted, followed)
    found = meter.measure()
    # foreground before or now, valid: 3 + 1 + 1 voxels; changed: one in each of the first two
    assert found["changed"] == pytest.approx(2 / 5)
    assert found["volume"] == pytest.approx([3 / 10, 2 / 10])
    assert found["coverage"] == pytest.approx([2 / 3, 1 / 2])
    # class 1: labels at 3 voxels, student at 3, both at 2; class 2: 2, 1 and 1
    assert found["agreement"] == pytest.approx([2 * 2 / 6, 2 * 1 / 3])
    assert meter.measure()["changed"] == 0
    assert state["seen"][:2] == [[0, 1], [2]]  # chunks


def test_a_class_that_is_nowhere_has_no_coverage():
    empty = torch.zeros(3, 1, 4, dtype=torch.long)
    meter, _ = gauge([empty, empty], torch.ones(3, 1, 4, dtype=torch.bool), empty)
    found = meter.measure()
    assert found["volume"] == [0, 0]
    assert all(map(math.isnan, [found["changed"], *found["coverage"], *found["agreement"]]))


def test_regions_overlap():
    first = torch.tensor(3 * [[[1, 1, 1, 0], [1, 0, 0, 0]]], dtype=torch.bool)
    second = torch.tensor(3 * [[[1, 1, 0, 0], [1, 0, 0, 0]]], dtype=torch.bool)
    counted = torch.tensor(3 * [[[1, 0, 1, 1], [1, 1, 1, 1]]], dtype=torch.bool)
    followed = torch.tensor(3 * [[[1, 0, 1, 0], [0, 0, 0, 0]]], dtype=torch.bool)
    meter, _ = gauge([first, second], counted, followed, regions=True)
    found = meter.measure()
    # the last two voxels of the third patch are padding
    assert found["changed"] == pytest.approx(2 / 8)
    assert found["volume"] == pytest.approx([6 / 10, 3 / 10])
    assert found["coverage"] == pytest.approx([1 / 2, 1])
    assert found["agreement"] == pytest.approx([2 * 3 / (5 + 6), 0])


def test_signature_of_confirmation():
    flat, fall, rise = [0.8] * 20, [0.9] * 10 + [0.8] * 10, [0.7] * 10 + [0.8] * 10
    assert confirms_itself(rise, fall) and confirms_itself(flat, fall)
    assert not confirms_itself(fall, fall)  # less sure: as it should be
    assert not confirms_itself(rise, flat)
    assert not confirms_itself(rise[1:], fall[1:])  # too short to tell
    assert not confirms_itself([NAN] * 20, fall)


def test_confirmation_is_counted_in_epochs():
    agreement, coverage = [1.0] * 15 + [0.8] * 25, [0.8] * 40
    found = [confirmed_for(coverage[:n], agreement[:n]) for n in range(1, 41)]
    # from the twentieth epoch on, as long as three more of ten epochs are low
    assert found == [0] * 19 + [*range(1, 14)] + [0] * 8
    assert confirmed_for([0.9] * 25 + [0.8] * 7, agreement[:32]) == 0  # less sure at last
