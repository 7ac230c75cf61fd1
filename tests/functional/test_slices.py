import pytest
import torch

from nnunet_ssl.functional import from_slices, to_slices


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_those_of_the_volume_and_go_back(axis):
    x = torch.randn(2, 3, 4, 5, 6)
    slices = to_slices(x, axis)
    size = x.shape[2 + axis]
    assert slices.shape == (2 * size, 3, *(s for i, s in enumerate((4, 5, 6)) if i != axis))
    for b in range(2):
        for d in range(size):
            assert torch.equal(slices[b * size + d], x[b].select(1 + axis, d))
    assert torch.equal(from_slices(slices, x.shape, axis), x)
    assert from_slices(slices[:, :1], x.shape, axis).shape == (2, 1, 4, 5, 6)


def test_images_are_slices_already():
    x = torch.randn(2, 3, 4, 5)
    assert to_slices(x) is x and from_slices(x, x.shape) is x


def test_wrong_axis_is_refused():
    with pytest.raises(ValueError, match="axis 3"):
        to_slices(torch.zeros(1, 1, 2, 2, 2), 3)
