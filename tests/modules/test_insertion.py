import pytest
import torch
from torch import nn

from nnunet_ssl.modules import (
    HighFrequencyMamba,
    finest_stage,
    insert_after_stage,
    take_from_stage,
    tapped_forward,
)

from .test_networks import CASES, configuration, plan_network


def anisotropic(kind, dim):
    config = configuration(kind, dim)
    kwargs = config.configuration["architecture"]["arch_kwargs"]
    kwargs["strides"] = [[1] * dim, [1, *[2] * (dim - 1)], [2] * dim]
    kwargs["kernel_sizes"] = [[1, *[3] * (dim - 1)], [3] * dim, [3] * dim]
    return config


@pytest.mark.parametrize("strides", [configuration, anisotropic])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_zero_gate_leaves_the_plans_network_as_it_is(kind, dim, stage, strides):
    plain, changed = (plan_network(strides(kind, dim)) for _ in range(2))
    insert_after_stage(changed, stage, HighFrequencyMamba((4, 8, 8)[stage], dim))
    missing, unexpected = changed.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected  # the plan's names are kept
    x = torch.randn(1, 1, *[16] * (dim - 1), 24)
    for a, b, c in zip(plain(x), changed(x), tapped_forward(changed, x).output, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_skip_and_next_stage_get_what_the_module_returns(kind, dim):
    network = plan_network(configuration(kind, dim))
    x = torch.randn(1, 1, *[16] * dim)
    before = [s.detach() for s in network.encoder(x)]
    with torch.no_grad():
        expected = network.encoder.stages[2](2 * before[1])
    insert_after_stage(network, 1, Doubled())
    after = network.encoder(x)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], 2 * before[1])
    assert torch.equal(after[2], expected)


@pytest.mark.parametrize(
    ("patch", "limit", "stage"),
    [
        ((16, 16), 64, 0),
        ((16, 16), 63, 1),
        ((17, 16), 64, 1),  # 9 x 8 places
        ((64, 64), 64, 2),
        ((64, 64), 5, 2),  # the coarsest one has 8 x 8
    ],
)
def test_finest_stage_with_few_enough_places(patch, limit, stage):
    network = plan_network(configuration("PlainConvUNet", 2))
    assert finest_stage(network, patch, limit) == stage


def test_finest_stage_knows_anisotropic_strides():
    network = plan_network(anisotropic("ResidualEncoderUNet", 3))
    sizes = [s.shape[2:] for s in network.encoder(torch.randn(1, 1, 8, 16, 16))]
    assert sizes == [(8, 16, 16), (8, 8, 8), (4, 4, 4)]
    for stage, places in enumerate((4 * 8 * 8, 4 * 4 * 4, 2 * 2 * 2)):
        assert finest_stage(network, (8, 16, 16), places) == stage
        assert finest_stage(network, (8, 16, 16), places - 1) == min(stage + 1, 2)


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_what_was_put_in_is_taken_out(kind, dim):
    network = plan_network(configuration(kind, dim))
    before, module = str(network), Doubled()
    insert_after_stage(network, 1, module)
    assert str(network) != before
    assert take_from_stage(network, 1) is module and str(network) == before


def test_other_architectures_are_refused():
    with pytest.raises(NotImplementedError, match="Sequential"):
        insert_after_stage(nn.Sequential(), 0, Doubled())
