import pytest
import torch

from nnunet_ssl.functional import largest_component, largest_component_regions


def scene(dims):
    """Class 1: 4 + 2 voxels, the 4 joined by a diagonal; class 2: 3 + 1; apart from each other."""
    labels = torch.zeros(2, 1, *[9] * dims, dtype=torch.int16)
    flat = labels[0, 0] if dims == 2 else labels[0, 0, 4]
    flat[0, 0] = flat[1, 1] = flat[2, 2] = flat[2, 3] = 1
    flat[6, 0:2] = 1
    flat[0, 6:9] = 2
    flat[8, 8] = 2
    expected = labels.clone()
    flat = expected[0, 0] if dims == 2 else expected[0, 0, 4]
    flat[6, 0:2] = 0
    flat[8, 8] = 0
    labels[1, 0, ..., 5] = 1  # one component: kept
    expected[1, 0, ..., 5] = 1
    return labels, expected


@pytest.mark.parametrize("dims", [2, 3])
def test_only_the_largest_of_each_class_and_sample_stays(dims):
    labels, expected = scene(dims)
    before = labels.clone()
    result = largest_component(labels, num_classes=3)
    assert result.dtype == labels.dtype
    assert torch.equal(result, expected) and torch.equal(labels, before)
    assert torch.equal(largest_component(result, 3), result)
    only_2 = largest_component(labels, 3, classes=[2])
    assert torch.equal(only_2 == 1, labels == 1) and torch.equal(only_2 == 2, expected == 2)


def test_touching_classes_are_separate_and_empty_classes_harmless():
    labels = torch.tensor([[1, 2, 1, 1, 0, 0]]).view(1, 1, 1, 6)
    assert largest_component(labels, 5).flatten().tolist() == [0, 2, 1, 1, 0, 0]
    assert not largest_component(torch.zeros(1, 1, 4, 4, dtype=torch.int64), 3).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_regions_are_filtered_one_by_one(dims):
    labels, expected = scene(dims)
    mask = torch.cat((labels > 0, labels == 1, labels == 7), 1)
    result = largest_component_regions(mask)
    assert result.dtype == torch.bool and (result <= mask).all()
    assert torch.equal(result[:, 1:2], expected == 1)
    assert torch.equal(result[:, :1], largest_component((labels > 0).int(), 2) > 0)
    assert not result[:, 2].any()
