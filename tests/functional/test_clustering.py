"""Correlation clustering."""

import pytest
import torch

from nnunet_ssl.functional import affinity, clustering_loss


def test_affinity_is_cosine_minus_its_threshold():
    torch.manual_seed(0)
    feature = torch.randn(2, 5, 3, requires_grad=True)
    found = affinity(feature, 2.0)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                cos = torch.cosine_similarity(feature[b, i], feature[b, j], dim=0)
                assert found[b, i, j].item() == pytest.approx(cos.item() - 0.5, abs=1e-6)
    assert not found.requires_grad


def test_loss_equals_the_sum_over_pairs_and_prefers_true_groups():
    feature = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]])
    w = affinity(feature, 2.0)
    soft = torch.rand(1, 4, 2).softmax(2)
    pairs = sum(w[0, i, j] * (soft[0, i] @ soft[0, j]) for i in range(4) for j in range(4))
    assert clustering_loss(w, soft).item() == pytest.approx(-pairs.item() / 16)
    true = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    wrong = true[:, [0, 2, 1, 3]]
    one = torch.tensor([1.0, 0]).expand(1, 4, 2)
    assert clustering_loss(w, true) < clustering_loss(w, one) < clustering_loss(w, wrong)
