"""Weights that grow with training progress."""

import math


def sigmoid_rampup(progress: float, length: float) -> float:
    """Grow from exp(-5) = 0.0067 at progress 0 to 1 at `length`, then stay.

    Args:
        progress: fraction of training done, in [0, 1].
        length: fraction of training at which 1 is reached; 0 gives 1 from the start.

    Raises:
        ValueError: `length` is negative.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780 (code); Laine & Aila 2017.
    """
    if length < 0:
        raise ValueError(f"The ramp-up length is a fraction of training, 0 or more; got {length}.")
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(max(progress / length, 0.0), 1.0)) ** 2)


def rampup_between(progress: float, start: float, end: float) -> float:
    """Stay at 0 before `start`, grow like `sigmoid_rampup` up to `end`, then stay at 1.

    Args:
        progress: fraction of training done, in [0, 1].
        start: first progress with a weight above 0.
        end: first progress with weight 1; equal to `start` gives a step.

    Raises:
        ValueError: `end` lies before `start`.
    """
    if end < start:
        raise ValueError(f"The ramp-up ends ({end}) before it starts ({start}).")
    if progress < start:
        return 0.0
    return sigmoid_rampup(progress - start, end - start)


def warmup_cosine(progress: float, warmup: float, first: float, last: float) -> float:
    """Grow linearly from `first` to 1 at `warmup`, then fall to `last` along half a cosine.

    Args:
        progress: fraction of training done, in [0, 1].
        warmup: fraction of training at which 1 is reached, in [0, 1); 0 leaves the growth out.
        first: value at progress 0.
        last: value at progress 1.

    Raises:
        ValueError: `warmup` is out of range.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"The warm-up is a fraction of training, in [0, 1); got {warmup}.")
    if progress < warmup:
        return first + (1 - first) * progress / warmup
    done = (min(progress, 1.0) - warmup) / (1 - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2
