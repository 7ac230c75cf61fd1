"""Groups of places."""

import torch

from nnunet_ssl.functional import affinity, clustering_loss
from nnunet_ssl.modules import TokenClusters


def test_it_learns_to_tell_two_kinds_of_places_apart():
    torch.manual_seed(0)
    kind = torch.arange(24) % 2
    feature = torch.eye(2, 8)[kind][None] + 0.1 * torch.randn(1, 24, 8)
    clusters = TokenClusters(8, 4)
    optimizer = torch.optim.Adam(clusters.parameters(), 0.02)
    w = affinity(feature, 2.0)
    for _ in range(80):
        optimizer.zero_grad()
        assignment = clusters(feature, w)
        clustering_loss(w, assignment).backward()
        optimizer.step()
    assert torch.allclose(assignment.sum(2), torch.ones(1, 24))
    group = assignment[0].argmax(1)
    assert (group[0::2] == group[0]).all() and (group[1::2] == group[1]).all()
    assert group[0] != group[1]
