"""The head that contrast works on."""

from torch import nn


class Projector(nn.Sequential):
    """Two linear layers: features to the space in which samples are contrasted.

    It keeps the features general: what only serves the contrast stays in the head.

    Args:
        features: F, of the input.
        embedding: E, of the hidden layer and the output.

    Source: Peng et al. 2021, arXiv:2107.13741, code (heads.py); without its pooling and norm.
    """

    def __init__(self, features: int, embedding: int = 256):
        super().__init__(
            nn.Linear(features, embedding), nn.LeakyReLU(0.01), nn.Linear(embedding, embedding)
        )
