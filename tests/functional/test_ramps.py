import math

import pytest

from nnunet_ssl.functional import rampup_between, sigmoid_rampup, warmup_cosine


@pytest.mark.parametrize(
    ("progress", "weight"), [(0, 0.0067), (0.25, 0.060), (0.5, 0.287), (0.75, 0.732), (1, 1.0)]
)
def test_sigmoid_rampup_published_values(progress, weight):
    assert sigmoid_rampup(progress, 1.0) == pytest.approx(weight, abs=5e-4)
    assert sigmoid_rampup(0.4 * progress, 0.4) == pytest.approx(weight, abs=5e-4)


def test_sigmoid_rampup_ends():
    assert sigmoid_rampup(0.4, 0.4) == sigmoid_rampup(0.9, 0.4) == 1.0
    assert sigmoid_rampup(0.0, 0.0) == 1.0
    with pytest.raises(ValueError, match="fraction of training"):
        sigmoid_rampup(0.5, -0.1)


def test_rampup_between():
    assert rampup_between(0.0999, 0.1, 0.3) == 0.0
    assert rampup_between(0.1, 0.1, 0.3) == pytest.approx(math.exp(-5))
    assert rampup_between(0.2, 0.1, 0.3) == pytest.approx(math.exp(-5 * 0.25))
    assert rampup_between(0.3, 0.1, 0.3) == pytest.approx(1.0)
    assert rampup_between(1.0, 0.1, 0.3) == 1.0
    assert (rampup_between(0.19, 0.2, 0.2), rampup_between(0.2, 0.2, 0.2)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="before it starts"):
        rampup_between(0.5, 0.3, 0.1)


def test_warmup_cosine():
    rates = [2e-4 * warmup_cosine(e / 80, 0.125, 1 / 400, 5e-4) for e in range(81)]
    assert rates[0] == pytest.approx(5e-7) and rates[10] == max(rates) == pytest.approx(2e-4)
    assert rates[5] == pytest.approx((5e-7 + 2e-4) / 2)
    assert rates[45] == pytest.approx((2e-4 + 1e-7) / 2) and rates[80] == pytest.approx(1e-7)
    assert warmup_cosine(0, 0, 0.1, 0) == 1
    with pytest.raises(ValueError, match="fraction of training"):
        warmup_cosine(0.5, 1.0, 0, 0)
