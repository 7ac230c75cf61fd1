"""Exponential moving average of a network."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def ema_decay_at(step: int, decay: float) -> float:
    """Return the weight of the teacher's old value: min(1 - 1 / (step + 1), decay).

    The first steps form a plain mean of the student's weights; step 0 copies the student.

    Args:
        step: optimizer steps done before this one, from 0.
        decay: weight of the old value per step, late in training, in [0, 1].

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780 (code).
    """
    return min(1 - 1 / (step + 1), decay)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Set teacher <- decay * teacher + (1 - decay) * student, in place; buffers are copied.

    nnU-Net registers the same tensor under up to four names. `parameters()` and `buffers()` give
    each once, while a loop over `state_dict()` keys would average it four times per step.

    Args:
        teacher: changed in place.
        student: same architecture; not changed.
        decay: weight of the old value; 0 copies.

    Raises:
        ValueError: the networks differ in number or shape of parameters or buffers.
    """
    averaged, new = _pairs(teacher.parameters(), student.parameters(), "parameters")
    copied, source = _pairs(teacher.buffers(), student.buffers(), "buffers")
    if averaged:
        torch._foreach_lerp_(averaged, new, 1 - decay)
    if copied:
        torch._foreach_copy_(copied, source)


def _pairs(
    teacher: Iterable[Tensor], student: Iterable[Tensor], what: str
) -> tuple[list[Tensor], list[Tensor]]:
    t, s = list(teacher), list(student)
    if [x.shape for x in t] != [x.shape for x in s]:
        raise ValueError(
            f"Teacher ({len(t)}) and student ({len(s)}) have different {what}. Build both with the "
            "same architecture."
        )
    return t, s
