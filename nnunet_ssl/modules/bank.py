"""Latest features of each class."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class ClassBank(nn.Module):
    """Keep the latest feature vectors of each group of voxels.

    State: buffers `vectors` (G, Q, E), each of length 1, and `count` (G,), vectors written so far.

    Args:
        groups: G, classes; for regions 2 R, outside and inside of each.
        size: Q, vectors a group.
        embedding: E.

    Source: class-wise memory of Wu et al. 2022 (SS-Net), as a queue without its learned ranking.
    """

    vectors: Tensor
    count: Tensor

    def __init__(self, groups: int, size: int, embedding: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(groups, size, embedding))
        self.register_buffer("count", torch.zeros(groups, dtype=torch.int64))

    @torch.no_grad()
    def update(self, vectors: Tensor, found: Tensor) -> None:
        """Write vectors in place of the oldest ones.

        Args:
            vectors: (G, n, E) of any length but 0, n at most Q; those that are not finite are left
                out.
            found: (G, n) bool, False leaves a vector out.

        Raises:
            ValueError: n is above Q.
        """
        groups, size, embedding = self.vectors.shape
        if vectors.shape[1] > size:
            raise ValueError(f"A bank of {size} vectors a class got {vectors.shape[1]} at once.")
        found = found & vectors.isfinite().all(2)
        place = (self.count[:, None] + found.cumsum(1) - 1) % size
        # what was not found goes to a further place, which is cut off
        place = torch.where(found, place, size)[:, :, None].expand(-1, -1, embedding)
        longer = torch.cat([self.vectors, self.vectors.new_zeros(groups, 1, embedding)], 1)
        longer.scatter_(1, place, normalize(vectors.float(), dim=2))
        self.vectors.copy_(longer[:, :size])
        self.count.add_(found.sum(1))

    def prototypes(self) -> Tensor:
        """Return the direction of the mean vector of each group, (G, E); zeros where there is none.

        Vectors that were never written are zeros and do not change it.
        """
        return normalize(self.vectors.sum(1), dim=1)

    def seen(self) -> Tensor:
        """Return which groups have vectors: (G,) bool."""
        return self.count > 0
