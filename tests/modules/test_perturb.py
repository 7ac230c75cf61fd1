import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_ssl.modules import dropout_factors, perturbed_forward


def unet(kind, dim, deep_supervision=True):
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    blocks = {"n_conv_per_stage": 1} if kind is PlainConvUNet else {"n_blocks_per_stage": 1}
    return kind(
        input_channels=1,
        n_stages=3,
        features_per_stage=(4, 6, 8),
        conv_op=conv,
        kernel_sizes=3,
        strides=[1, 2, 2],
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **blocks,
    )


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_no_dropout_is_the_networks_own_prediction(kind, dim):
    network, x = unet(kind, dim), torch.randn(2, 1, *[16] * dim)
    output, clean = perturbed_forward(network, x, dropout_factors(network, x, 0.0), clean=True)
    for a, b, c in zip(output, clean, network(x), strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
        assert a.requires_grad and not b.requires_grad


@pytest.mark.parametrize("dim", [2, 3])
def test_whole_channels_of_every_level_are_dropped_by_sample(dim):
    network, x = unet(PlainConvUNet, dim), torch.randn(500, 1, *[1] * dim)
    factors = dropout_factors(network, x, 0.25)
    assert [f.shape[1] for f in factors] == [4, 6, 8]
    for f in factors:
        assert f.shape[0] == 500 and f.ndim == dim + 2 and f[0, 0].numel() == 1
        assert f.unique().tolist() == pytest.approx([0, 4 / 3])
        assert f.mean().item() == pytest.approx(1, abs=0.06)
        assert (f != f[:1]).any()


def test_a_dropped_channel_has_no_influence_and_a_kept_one_has():
    network, x = unet(PlainConvUNet, 2, deep_supervision=False), torch.randn(1, 1, 16, 16)
    factors = dropout_factors(network, x, 0.0)
    factors[0][:, 2] = 0
    for deeper in factors[1:]:
        deeper.zero_()  # the channel feeds them too
    first_level = network.encoder.stages[0][-1].convs[-1].conv
    before = perturbed_forward(network, x, factors, clean=False)[0]
    for channel, matters in ((2, False), (1, True)):
        with torch.no_grad():
            first_level.weight[channel].neg_()
        after = perturbed_forward(network, x, factors, clean=False)[0]
        assert torch.equal(before, after) != matters


def test_the_encoder_runs_once_and_gets_the_gradient():
    network, x = unet(ResidualEncoderUNet, 2), torch.randn(2, 1, 16, 16)
    calls = []
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    output, _ = perturbed_forward(network, x, dropout_factors(network, x, 0.5), clean=True)
    assert len(calls) == 1
    sum(o.square().mean() for o in output).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert perturbed_forward(network, x, dropout_factors(network, x, 0.5), clean=False)[1] is None


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_compiled_it_is_one_graph_with_the_same_output(kind):
    network, x = unet(kind, 2), torch.randn(2, 1, 16, 16)
    factors = dropout_factors(network, x, 0.5)
    compiled = torch.compile(perturbed_forward, fullgraph=True, backend="aot_eager")
    found, expected = (f(network, x, factors, True) for f in (compiled, perturbed_forward))
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert torch.allclose(a, b, atol=1e-5) and a.requires_grad == b.requires_grad
