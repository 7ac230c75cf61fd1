import pytest
import torch

from nnunet_ssl.modules import decode, tapped_forward

from .test_networks import CASES, configuration, plan_network


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_output_is_the_networks_own_bit_for_bit(kind, dim, deep_supervision):
    network = plan_network(configuration(kind, dim), deep_supervision=deep_supervision)
    names = list(network.state_dict())
    x = torch.randn(2, 1, *[16] * dim)
    tapped = tapped_forward(network, x)
    own = network(x)
    assert isinstance(tapped.output, list) == isinstance(own, list) == deep_supervision
    pairs = zip(tapped.output, own, strict=True) if deep_supervision else [(tapped.output, own)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(tapped.bottleneck, network.encoder(x)[-1])
    assert tapped.feature.shape == (2, 4, *[16] * dim)
    assert torch.equal(network.decoder.seg_layers[-1](tapped.feature), own[0] if deep_supervision
                       else own)  # fmt: skip
    assert list(network.state_dict()) == names

    def gradients(loss):
        network.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    def total(output):
        return sum(t.square().sum() for t in (output if deep_supervision else [output]))

    stock = gradients(total(network(x)))
    ours = gradients(total(tapped_forward(network, x).output))
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[n], ours[n]) for n in stock)


def test_deep_supervision_is_looked_up_at_each_call():
    network = plan_network(configuration("PlainConvUNet", 2))
    x = torch.randn(1, 1, 16, 16)
    both = tapped_forward(network, x)
    network.decoder.deep_supervision = False
    assert torch.equal(tapped_forward(network, x).output, both.output[0])


def test_changed_skips_change_the_output_and_get_gradient():
    network = plan_network(configuration("ResidualEncoderUNet", 3))
    skips = network.encoder(torch.randn(1, 1, 16, 16, 16))
    skips = [s.detach().requires_grad_() for s in skips]
    tapped = decode(network, [s * 0.5 for s in skips])
    assert not torch.equal(tapped.output[0], network.decoder(skips)[0])
    tapped.feature.sum().backward()
    assert all(s.grad.abs().sum() > 0 for s in skips)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_same_under_autocast(dtype):
    network = plan_network(configuration("PlainConvUNet", 3))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        tapped, own = tapped_forward(network, x), network(x)
    assert all(torch.equal(a, b) for a, b in zip(tapped.output, own, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_compiled_tap_is_one_graph_and_gives_the_networks_output(kind, dim):
    network = plan_network(configuration(kind, dim))
    x = torch.randn(1, 1, *[16] * dim)
    compiled = torch.compile(tapped_forward, fullgraph=True)
    tapped, own = compiled(network, x), network(x)
    for a, b in zip(tapped.output, own, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(tapped.feature, tapped_forward(network, x).feature, atol=1e-4)
    tapped.output[0].sum().backward()
    network.decoder.deep_supervision = False  # the compiled function notices
    assert torch.allclose(compiled(network, x).output, own[0], atol=1e-4)
