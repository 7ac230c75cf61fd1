"""Diffusion of label maps: noise forwards, deterministic sampling backwards.

A label map is a state of one channel a class (region), 1 inside and -1 outside. The network that
takes the noise out gives logits of the clean map, not the noise (x0 prediction).
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.functional.outputs import to_prob


class Sampled(NamedTuple):
    """One step of the sampler.

    Attributes:
        time: t, from T - 1 down to 0.
        state: x_t that the network saw, (B, K, *) float32.
        prob: what it takes the clean map for, (B, K, *) in [0, 1], float32.
    """

    time: int
    state: Tensor
    prob: Tensor


def alpha_bars(steps: int = 1000, first: float = 1e-4, last: float = 2e-2) -> Tensor:
    """Return the share of the clean map's variance that is left at each time, (steps,) float32.

    The noise of a single step grows linearly from `first` to `last`. Of 1000 times, 0.9999 is left
    at t = 0, 0.897 at 99, 0.0786 at 499, 4e-5 at 999.

    Source: Ho et al. 2020 (DDPM), arXiv:2006.11239; the same in GenericSSL and Diff-UNet.
    """
    return (1 - torch.linspace(first, last, steps, dtype=torch.float64)).cumprod(0).float()


def clean_state(
    label: Tensor, num_classes: int, regions: bool, known: Tensor | None = None
) -> Tensor:
    """Return a label map as the state x_0 of the diffusion.

    Args:
        label: (B, 1, *) integers, in [0, K) where known; for regions (B, R, *) bool.
        num_classes: K with background; not read for regions.
        regions: channels are independent regions.
        known: (B, 1, *) bool; the state is 0 elsewhere, between inside and outside. None: all.

    Returns:
        (B, K or R, *) float32 of -1, 0 and 1.
    """
    if regions:
        inside = label.bool()
    else:
        classes = torch.arange(num_classes, device=label.device)
        inside = label == classes.view(1, -1, *[1] * (label.ndim - 2))
    state = 2 * inside.float() - 1
    return state if known is None else state * known


def q_sample(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the state after noise: sqrt(a) x_0 + sqrt(1 - a) n.

    Args:
        clean: x_0, (B, K, *).
        noise: n, standard normal, the same shape.
        alpha_bar: a of each sample's time, (B,).

    Source: Ho et al. 2020, Eq. 4.
    """
    a = alpha_bar.view(-1, *[1] * (clean.ndim - 1))
    return a.sqrt() * clean + (1 - a).sqrt() * noise


@torch.no_grad()
def ddim_steps(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    alpha_bars: Tensor,
    steps: int,
    regions: bool,
) -> Iterator[Sampled]:
    """Yield the steps of the deterministic sampler, from pure noise to a clean map.

    With p the network's probability at x_t, x_0 = 2 p - 1 and e = (x_t - sqrt(a_t) x_0) / sqrt(1 -
    a_t), the next state is sqrt(a_s) x_0 + sqrt(1 - a_s) e. The times are even between T - 1 and 0.

    Args:
        denoise: from a state (B, K, *) and times (B,) to logits of the clean map, (B, K, *).
        noise: standard normal, (B, K, *) float32.
        alpha_bars: (T,), from `alpha_bars`.
        steps: passes of the network; 1 looks at the noise alone.
        regions: sigmoid instead of softmax.

    Raises:
        ValueError: `steps` is not between 1 and T.

    Source: Song et al. 2021 (DDIM), arXiv:2010.02502, eta 0. GenericSSL and Diff-UNet clamp the
        logits to [-1, 1] and take these for x_0, though they train them as logits; not done here.
    """
    last = len(alpha_bars) - 1
    if not 1 <= steps <= last + 1:
        raise ValueError(f"The sampler takes 1 to {last + 1} steps; got {steps}.")
    times = [round(last - last * i / max(steps - 1, 1)) for i in range(steps)]
    state = noise
    for t, s in zip(times, [*times[1:], -1], strict=True):
        logits = denoise(state, torch.full((len(state),), t, device=state.device))
        prob = to_prob(logits, regions)
        yield Sampled(t, state, prob)
        if s >= 0:
            clean, here, there = 2 * prob - 1, alpha_bars[t], alpha_bars[s]
            error = (state - here.sqrt() * clean) / (1 - here).sqrt()
            state = there.sqrt() * clean + (1 - there).sqrt() * error


def ddim(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    alpha_bars: Tensor,
    steps: int,
    regions: bool,
) -> Tensor:
    """Return the probabilities that the sampler ends with, (B, K, *) float32; see `ddim_steps`."""
    (last,) = deque(ddim_steps(denoise, noise, alpha_bars, steps, regions), maxlen=1)
    return last.prob
