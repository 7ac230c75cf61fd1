"""Scores of the latest samples."""

import torch
from torch import Tensor, nn


class ScoreMemory(nn.Module):
    """Keep the two scores of the latest samples, for `functional.select_best`.

    State: buffers `scores` (N, 2) and `count`, samples written so far.

    Args:
        size: N.
    """

    scores: Tensor
    count: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("scores", torch.zeros(size, 2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, scores: Tensor) -> None:
        """Add the scores of a batch, (B, 2), in place of the oldest; the last N of it if larger."""
        scores = scores[-len(self.scores) :]
        index = (self.count + torch.arange(len(scores), device=scores.device)) % len(self.scores)
        self.scores.index_copy_(0, index, scores.to(self.scores.dtype))
        self.count.add_(len(scores))

    def seen(self) -> Tensor:
        """Return which entries exist: (N,) bool."""
        return torch.arange(len(self.scores), device=self.count.device) < self.count
