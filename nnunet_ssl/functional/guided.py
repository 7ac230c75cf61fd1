"""How many unlabelled patches a batch takes, by the learning rate."""

import math

# Deviates: whole patches of a smaller batch would leave most of the schedule out
EXACT_FROM = 5  # patches; the published batch


def guided_share(progress: float, start: float) -> float:
    """Grow linearly from 0 at `start` to 1 at the end of training.

    This is how far a learning rate that starts anew at `start` has decayed: 1 - (lr / lr0)^(1 / p)
    for nnU-Net's polynomial of power p, arccos(2 lr / lr0 - 1) / pi for half a cosine.

    Args:
        progress: fraction of training done, in [0, 1].
        start: fraction at which training with unlabelled patches starts, in [0, 1).

    Raises:
        ValueError: `start` is out of range.

    Source: Yeung et al. 2025 (M&N), arXiv:2509.15167, learning-rate-guided sampling (code).
    """
    if not 0 <= start < 1:
        raise ValueError(f"The start is a fraction of training, in [0, 1); got {start}.")
    return min(max((progress - start) / (1 - start), 0.0), 1.0)


def guided_count(share: float, batch: int, draw: float) -> int:
    """Return how many of a batch's patches are unlabelled.

    At least one patch stays labelled, unless the batch is a single one.

    Args:
        share: of unlabelled patches that is wanted, in [0, 1].
        batch: patches.
        draw: random number, uniform in [0, 1): batches of fewer than 5 round at random, so that the
            mean over steps is min(share * batch, batch - 1). Larger ones round down, as published.

    Raises:
        ValueError: share or draw is out of range.

    Source: Yeung et al. 2025 (M&N), arXiv:2509.15167 (code).
    """
    if not (0 <= share <= 1 and 0 <= draw < 1):
        raise ValueError(f"Share {share} must be in [0, 1], draw {draw} in [0, 1).")
    # a share that is whole in theory must not be rounded down for the last bit of its float
    wanted = share * batch + (draw if batch < EXACT_FROM else 1e-9)
    return min(math.floor(wanted), max(batch - 1, 1))
