"""Low-rank additions."""

import torch
from torch import nn

from nnunet_ssl.modules.lora import LowRank


def test_additions_have_the_size_of_alpha_over_rank():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    adapted = LowRank(layer, rank=2, alpha=3, dropout=0.0)
    nn.init.normal_(adapted.up.weight)
    expected = layer(x) + 1.5 * adapted.up(adapted.down(x))
    assert torch.allclose(adapted(x), expected, atol=1e-6)
