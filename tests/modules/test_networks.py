import copy
import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ssl.modules import MeanOfNetworks, linked_prob, other_network

KINDS = ("PlainConvUNet", "ResidualEncoderUNet")
CASES = [(kind, dim) for kind in KINDS for dim in (2, 3)]


def configuration(kind, dim, features=(4, 8, 8), convs=2):
    """As nnU-Net's planners write it."""
    n = len(features)
    kwargs = {
        "n_stages": n,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * n,
        "strides": [[1] * dim] + [[2] * dim] * (n - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if kind == "PlainConvUNet":
        kwargs |= {"n_conv_per_stage": [convs] * n, "n_conv_per_stage_decoder": [convs] * (n - 1)}
    else:
        kwargs |= {
            "n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:n],
            "n_conv_per_stage_decoder": [1] * (n - 1),
        }
    name = f"dynamic_network_architectures.architectures.unet.{kind}"
    requires = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return ConfigurationManager(
        {
            "architecture": {
                "network_class_name": name,
                "arch_kwargs": kwargs,
                "_kw_requires_import": requires,
            }
        }
    )


def plan_network(config, channels=1, classes=3, deep_supervision=True):
    return get_network_from_plans(
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
        channels,
        classes,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def duo(kind="PlainConvUNet", dim=2, link="softmax", deep_supervision=True):
    config = configuration(kind, dim)
    return MeanOfNetworks(
        plan_network(config, deep_supervision=deep_supervision),
        other_network(config, 1, 3, deep_supervision),
        link,
    )


@pytest.mark.parametrize(("kind", "dim"), CASES)
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_other_network_fits_the_plans_outputs(kind, dim, deep_supervision):
    config = configuration(kind, dim)
    before = copy.deepcopy(config.network_arch_init_kwargs)
    a = plan_network(config, 2, 5, deep_supervision)
    b = other_network(config, 2, 5, deep_supervision)
    assert config.network_arch_init_kwargs == before
    assert {type(a), type(b)} == {PlainConvUNet, ResidualEncoderUNet}
    x = torch.randn(1, 2, *[16] * dim)
    shapes = [[t.shape for t in (y if isinstance(y, list) else [y])] for y in (a(x), b(x))]
    assert shapes[0] == shapes[1]
    assert a.encoder.output_channels == b.encoder.output_channels


def test_plans_with_nonlin_first_and_bottleneck_blocks_have_another_network():
    plain = configuration("PlainConvUNet", 2)
    plain.network_arch_init_kwargs["nonlin_first"] = True
    assert isinstance(other_network(plain, 1, 2, False), ResidualEncoderUNet)
    residual = configuration("ResidualEncoderUNet", 2)
    residual.network_arch_init_kwargs["stem_channels"] = 4
    assert isinstance(other_network(residual, 1, 2, False), PlainConvUNet)


def test_unknown_architecture_is_refused_by_name():
    config = configuration("PlainConvUNet", 2)
    config.configuration["architecture"]["network_class_name"] = "primus.PrimusM"
    with pytest.raises(
        NotImplementedError, match=r"PrimusM.*PlainConvUNet and ResidualEncoderUNet"
    ):
        other_network(config, 1, 2, False)


@pytest.mark.parametrize(
    ("kind", "dim", "low", "high"),
    [
        ("PlainConvUNet", 2, 0.8, 1.0),
        ("PlainConvUNet", 3, 0.8, 1.0),
        ("ResidualEncoderUNet", 2, 0.4, 1.0),
        ("ResidualEncoderUNet", 3, 0.6, 1.0),
    ],
)
def test_other_network_costs_no_more(kind, dim, low, high):
    config = configuration(kind, dim, (32, 64, 128, 256, 320))

    def operations(network):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 1, *[32] * dim))
        return counter.get_total_flops()

    with torch.device("meta"):
        ratio = operations(other_network(config, 1, 3, True)) / operations(plan_network(config))
    assert low <= ratio <= high


class Constant(nn.Module):
    """A network that returns given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


def naive_prob(z, link, regions):
    z = z.double()
    if link == "softmax":
        return z.sigmoid() if regions else z.softmax(1)

    def alpha(z):
        soft = 4 * math.log(10)
        return 1 + (
            torch.log1p(z.exp()) if link == "softplus" else (soft * (z / soft).tanh()).exp()
        )

    return alpha(z) / (alpha(z) + alpha(-z) if regions else alpha(z).sum(1, keepdim=True))


@pytest.mark.parametrize("spatial", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("link", ["softmax", "softplus", "exp"])
def test_prediction_is_the_mean_probability(link, regions, spatial):
    za, zb = torch.randn(2, 2, 3, *spatial) * 3
    mean = MeanOfNetworks(Constant(za), Constant(zb), link)
    mean.regions.fill_(regions)
    expected = (naive_prob(za, link, regions) + naive_prob(zb, link, regions)) / 2
    logits = mean(torch.zeros(1))
    # what nnU-Net does with logits
    prob = logits.sigmoid() if regions else logits.softmax(1)
    assert torch.allclose(prob.double(), expected, atol=1e-5)
    assert torch.allclose(linked_prob(za, link, regions).double(), naive_prob(za, link, regions))
    swapped = MeanOfNetworks(Constant(zb), Constant(za), link)
    swapped.regions.fill_(regions)
    assert torch.equal(swapped(torch.zeros(1)), logits)
    multi = MeanOfNetworks(Constant([za, za[..., ::2]]), Constant([zb, zb[..., ::2]]), link)
    multi.regions.fill_(regions)
    for scale, expected in zip(multi(torch.zeros(1)), (logits, logits[..., ::2]), strict=True):
        assert torch.allclose(scale, expected, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("link", ["softmax", "softplus", "exp"])
def test_sure_half_precision_logits_stay_finite_in_half_precision(link, regions):
    z = torch.tensor([6e4, -6e4, 0.0]).view(1, 3, 1, 1).half()
    mean = MeanOfNetworks(Constant(z), Constant(z), link)
    mean.regions.fill_(regions)
    logits = mean(torch.zeros(1))
    assert logits.dtype == torch.float32
    assert logits.half().isfinite().all()
    top, low, middle = logits.flatten().tolist()
    assert top > middle >= low


def test_unsure_voxels_are_decided_by_the_surer_network_not_by_larger_logits():
    # mean of logits would choose class 1
    za = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1)
    zb = torch.tensor([0.0, 30.0]).view(1, 2, 1, 1) * 0.02
    mean = MeanOfNetworks(Constant(za), Constant(zb + 100), "softmax")
    assert mean(torch.zeros(1)).argmax(1).item() == 0


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_weights_load_strictly_with_and_without_deep_supervision(kind, dim):
    trained = duo(kind, dim, "softplus")
    trained.regions.fill_(1)
    predicting = duo(kind, dim, "softplus", deep_supervision=False)
    predicting.load_state_dict(trained.state_dict(), strict=True)
    x = torch.randn(2, 1, *[16] * dim)
    with torch.no_grad():
        assert torch.equal(predicting(x), trained(x)[0])
    assert predicting.regions.item() == 1
    stock = plan_network(configuration(kind, dim))
    stock.load_state_dict(trained.a.state_dict(), strict=True)


def test_networks_are_compiled_one_by_one(monkeypatch):
    mean = duo()
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    MeanOfNetworks.compile(mean)
    assert compiled == [mean.a, mean.b]
