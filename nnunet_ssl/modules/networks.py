"""Two networks in one: the other architecture of a plan, and a network that averages two."""

from typing import Any, Literal

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ssl.functional import dirichlet_logits, to_prob

MIN_PROB = 1e-6  # logits stay within what half precision holds
Link = Literal["softmax", "softplus", "exp"]


def other_network(
    configuration: ConfigurationManager,
    input_channels: int,
    output_channels: int,
    deep_supervision: bool,
) -> nn.Module:
    """Build the plan's network in the other architecture.

    Stages, features, kernels, strides and norm are the plan's, so outputs of both have the same
    shapes at each scale. Beside a PlainConvUNet stands a ResidualEncoderUNet with one block a stage
    and one convolution a decoder stage (0.83 to 0.90 of the operations of nnU-Net's default plans);
    beside a ResidualEncoderUNet a PlainConvUNet with two convolutions a stage, nnU-Net's own
    default (0.45 to 0.67 of the operations of its ResEnc plans).

    Raises:
        NotImplementedError: the plan names another architecture.
    """
    name = configuration.network_arch_class_name.rpartition(".")[2]
    kwargs = dict(configuration.network_arch_init_kwargs)
    stages = kwargs["n_stages"]
    other: type[nn.Module]
    if name == PlainConvUNet.__name__:
        other = ResidualEncoderUNet
        del kwargs["n_conv_per_stage"]
        kwargs.pop("nonlin_first", None)
        kwargs |= {
            "n_blocks_per_stage": [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
        }
    elif name == ResidualEncoderUNet.__name__:
        other = PlainConvUNet
        for key in ("n_blocks_per_stage", "block", "bottleneck_channels", "stem_channels"):
            kwargs.pop(key, None)
        kwargs |= {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    else:
        raise NotImplementedError(
            f"The plan's network {name} has no other architecture; PlainConvUNet and "
            f"ResidualEncoderUNet have."
        )
    return get_network_from_plans(
        f"{other.__module__}.{other.__name__}",
        kwargs,
        configuration.network_arch_init_kwargs_req_import,
        input_channels,
        output_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )


def linked_prob(logits: Tensor, link: Link, regions: bool) -> Tensor:
    """Return the class probabilities that logits stand for.

    Args:
        logits: (B, K, *), any precision.
        link: "softmax" (sigmoid for regions); "softplus" or "exp": the logits give the evidence of
            a Dirichlet distribution by this function, the probability is its expectation, see
            `functional.evidence`.
        regions: channels are independent regions.

    Returns:
        (B, K, *) in fp32.
    """
    if link != "softmax":
        logits = dirichlet_logits(logits, regions, link)
    return to_prob(logits, regions)


class MeanOfNetworks(nn.Module):
    """Predicts with the mean probability of two networks.

    The result is given as logits, so that nnU-Net's softmax (sigmoid for regions) gives the mean:
    log p, or logit p for regions, with p at least 1e-6.

    Args:
        a: network of the plan.
        b: network of the same output shapes.
        link: what their logits stand for, see `linked_prob`.

    Attributes:
        regions: buffer, 1 if channels are independent regions; set by the trainer, since a network
            is built without knowledge of the data set.
    """

    regions: Tensor

    def __init__(self, a: nn.Module, b: nn.Module, link: Link):
        super().__init__()
        self.a, self.b, self.link = a, b, link
        self.register_buffer("regions", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits of the mean, (B, K, *), or a list of them under deep supervision.

        Args:
            x: (B, C, *).
        """
        outputs = self.a(x), self.b(x)
        if isinstance(outputs[0], Tensor):
            return self._mean(*outputs)
        return [self._mean(za, zb) for za, zb in zip(*outputs, strict=True)]

    def _mean(self, za: Tensor, zb: Tensor) -> Tensor:
        regions = bool(self.regions)
        p = (linked_prob(za, self.link, regions) + linked_prob(zb, self.link, regions)) / 2
        if regions:
            return p.clamp(MIN_PROB, 1 - MIN_PROB).logit()
        return p.clamp(MIN_PROB).log()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile both networks; training calls them one by one."""
        self.a.compile(*args, **kwargs)
        self.b.compile(*args, **kwargs)
