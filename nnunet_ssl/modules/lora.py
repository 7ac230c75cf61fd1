"""Low-rank adaptation: a frozen network learns by small additions to its layers."""

import math

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen layer plus a trained one of low rank beside it.

        y = layer(x) + alpha / rank * up(down(dropout(x)))

    `up` starts at 0, so that training starts at the frozen layer. The layer's bias is trained. A
    layer with fewer inputs or outputs than `rank` gets that many: more rank says nothing new.

    Args:
        layer: `nn.Linear`, or `nn.Conv2d` of one group; `down` then has its kernel, `up` is 1 x 1.
        rank: of the addition.
        alpha: size of the addition, in units of `rank`.
        dropout: on the input of the addition.

    Source: Hu et al. 2022 (LoRA), arXiv:2106.09685; start of `down` as in their code.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.layer = layer
        self.layer.weight.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            rank = min(rank, layer.in_features, layer.out_features)
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            if layer.groups != 1 or isinstance(layer.padding, str):
                raise ValueError(f"No low-rank addition for {layer}: groups, or padding by name.")
            rank = min(rank, layer.in_channels, layer.out_channels)
            # TensorFlow's padding depends on the size of the image: it is in the class
            kind: type[nn.Conv2d] = nn.Conv2d
            mode = {"padding_mode": layer.padding_mode}
            if isinstance(layer, Conv2dSame):
                kind, mode = Conv2dSame, {}
            self.down = kind(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=False,
                **mode,  # type: ignore[arg-type]
            )
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the addition."""
        return self.layer(x) + self.scale * self.up(self.down(self.dropout(x)))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight of the one layer that does the same without dropout."""
        down, up = self.down.weight.flatten(1), self.up.weight.flatten(1)  # type: ignore
        return self.layer.weight + self.scale * (up @ down).view_as(self.layer.weight)


def add_low_rank(network: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Freeze a network but for biases and norms, and give its layers low-rank additions, in place.

    All linear layers get one; in a network without any, all ungrouped convolutions.

    Raises:
        ValueError: the network has neither.
    """
    network.requires_grad_(False)
    for module in network.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(is_norm or name == "bias")
    chosen: list[nn.Module] = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not chosen:
        chosen = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    if not chosen:
        raise ValueError(f"{type(network).__name__} has no layer for a low-rank addition.")
    ids = {id(m) for m in chosen}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in ids:
                setattr(parent, name, LowRank(child, rank, alpha, dropout))  # type: ignore
