import math
import random

import pytest

from nnunet_ssl.functional import guided_count, guided_share


def test_published_batch_changes_at_the_published_epochs():
    counts = [guided_count(guided_share(e / 4000, 500 / 4000), 5, 0.0) for e in range(4000)]
    changes = [e for e in range(1, 4000) if counts[e] != counts[e - 1]]
    assert changes == [1200, 1900, 2600, 3300]
    assert counts[0] == 0 and counts[-1] == 4 and counts == sorted(counts)


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.8, 1.0])
def test_small_batches_hold_the_share_on_average(batch, share):
    draws = random.Random(1)
    n = 4000
    counts = [guided_count(share, batch, draws.random()) for _ in range(n)]
    assert max(counts) <= batch - 1
    low = math.floor(share * batch)
    part = share * batch - low
    expected = (1 - part) * min(low, batch - 1) + part * min(low + 1, batch - 1)
    assert sum(counts) / n == pytest.approx(expected, abs=3 * 0.5 / math.sqrt(n) + 1e-9)


def test_large_batches_do_not_draw_and_single_patches_may_be_unlabelled():
    assert [guided_count(0.39, 5, d) for d in (0.0, 0.99)] == [1, 1]
    assert [guided_count(0.3, 1, d) for d in (0.0, 0.69, 0.71)] == [0, 0, 1]


def test_share_is_how_far_a_restarted_learning_rate_has_decayed():
    start = 0.125
    for progress in (0.2, 0.5, 0.9):
        share = guided_share(progress, start)
        done = (progress - start) / (1 - start)
        poly, cosine = (1 - done) ** 0.9, (1 + math.cos(math.pi * done)) / 2
        assert share == pytest.approx(1 - poly ** (1 / 0.9), abs=1e-9)
        assert share == pytest.approx(math.acos(2 * cosine - 1) / math.pi, abs=1e-9)
    assert (
        guided_share(0.1, start) == guided_share(start, start) == 0 and guided_share(1, start) == 1
    )


def test_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"1\.0"):
        guided_share(0.5, 1.0)
    with pytest.raises(ValueError, match=r"1\.2"):
        guided_count(1.2, 2, 0.5)
