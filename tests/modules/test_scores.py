"""Memory of scores."""

import torch

from nnunet_ssl.modules import ScoreMemory


def test_it_keeps_the_latest():
    memory = ScoreMemory(5)
    assert not memory.seen().any()
    memory.update(torch.arange(6.0).view(3, 2))
    assert memory.seen().tolist() == [True] * 3 + [False] * 2
    memory.update(torch.arange(6.0, 14).view(4, 2))
    assert memory.seen().all()
    assert sorted(memory.scores[:, 0].tolist()) == [4, 6, 8, 10, 12]
    memory.update(torch.arange(100.0, 120).view(10, 2))
    assert sorted(memory.scores[:, 0].tolist()) == [110, 112, 114, 116, 118]
    assert memory.count == 12
    assert set(memory.state_dict()) == {"scores", "count"}
