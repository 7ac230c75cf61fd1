import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import (
    DownsampleSegForDSTransform,
)

from nnunet_ssl.functional import (
    confidence,
    downsample,
    exchange,
    full_res,
    hard_labels,
    random_boxes,
    to_prob,
)

SPATIAL = [(12, 9), (10, 12, 7)]


def scales_for(spatial):
    d = len(spatial)
    return [[1.0] * d, [1.0] + [0.5] * (d - 1), [0.5] + [0.25] * (d - 1)]


def test_full_res():
    a, b = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)
    assert full_res(a) is a
    assert full_res([a, b]) is a and full_res((a, b)) is a


@pytest.mark.parametrize("spatial", SPATIAL)
def test_to_prob_half_logits(spatial):
    logits = (torch.randn(2, 3, *spatial) * 1e4).half()
    soft, sig = to_prob(logits, regions=False), to_prob(logits, regions=True)
    assert soft.dtype == sig.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(2, *spatial))
    torch.testing.assert_close(sig, torch.sigmoid(logits.float()))


def test_decision_and_confidence():
    prob = torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1)
    assert hard_labels(prob, regions=False).flatten().tolist() == [1]
    assert hard_labels(prob, regions=False).shape == (1, 1, 1, 1)
    assert hard_labels(prob, regions=True).flatten().tolist() == [False, True, False]
    assert not hard_labels(torch.full((1, 1, 1, 1), 0.5), regions=True).any()
    assert confidence(prob, regions=False).flatten().tolist() == pytest.approx([0.7])
    assert confidence(prob, regions=True).flatten().tolist() == pytest.approx([0.8, 0.7, 0.9])


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.int64, torch.uint8])
def test_downsample_equals_nnunets_transform(spatial, dtype):
    labels = torch.randint(0, 2 if dtype == torch.bool else 5, (3, 2, *spatial)).to(dtype)
    scales = scales_for(spatial)
    results = downsample(labels, scales)
    transform = DownsampleSegForDSTransform(scales)
    for sample in range(3):
        expected = transform._apply_to_segmentation(labels[sample])
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.dtype == dtype
            assert torch.equal(ours[sample], theirs)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_downsample_commutes_with_mixing(spatial):
    scales = scales_for(spatial)
    a, b = (torch.randint(0, 4, (3, 1, *spatial)) for _ in range(2))
    inside = random_boxes(3, spatial, 0.3, 0.9)
    mixed_first = downsample(exchange(a, b, inside)[0], scales)
    small = zip(*(downsample(t, scales) for t in (inside, b, a)), strict=True)
    for ours, (m, y, x) in zip(mixed_first, small, strict=True):
        assert torch.equal(ours, torch.where(m, y, x))


def test_downsample_refuses_scale_of_other_dimension():
    with pytest.raises(ValueError, match="2 spatial axes"):
        downsample(torch.zeros(1, 1, 4, 4), [[1.0, 1.0, 1.0]])
