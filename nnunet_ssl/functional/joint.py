"""Sums over the processes of a training on several GPUs; with one process they change nothing.

Each process computes its loss from its part of the batch and from joint sums, and the gradients of
all are averaged. The result is the gradient of the joint batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def process_count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def joint_sum(value: Tensor) -> Tensor:
    """Return the sum over processes, the same in all of them.

    Its gradient is the sum of all processes' gradients, so that their mean over processes is that
    of one loss on the joint batch.
    """
    return all_reduce(value.contiguous()) if process_count() > 1 else value


def shared_count(count: Tensor) -> Tensor:
    """Return what a process divides its own sum by: the mean count of a process.

    The mean of these quotients over processes is the mean over the joint batch.

    Args:
        count: what counts in this process, a scalar, 0 or more.

    Returns:
        Scalar above 0; a joint count of 0 is taken as 1.
    """
    processes = process_count()
    joint = joint_sum(count)
    joint = torch.where(joint > 0, joint, 1)
    return joint / processes if processes > 1 else joint


def joint_share(part: Tensor, whole: Tensor) -> Tensor:
    """Return the part's share of the whole, both summed over processes; NaN of an empty whole."""
    part, whole = joint_sum(torch.stack([part.float(), whole.float()]))
    return part / whole


def joint_roll(value: Tensor) -> Tensor:
    """Return the joint batch moved by one sample, last one first: this process's part of it.

    Args:
        value: (B, *), the same shape and type in every process; without gradient.
    """
    last = value[-1:]
    if (processes := process_count()) > 1:
        sent = last.contiguous().view(torch.uint8)  # NCCL sends no 16-bit integers
        received = [torch.empty_like(sent) for _ in range(processes)]
        dist.all_gather(received, sent)
        last = received[dist.get_rank() - 1].view(value.dtype)
    return torch.cat([last, value[:-1]])


def gather(value: Any) -> list[Any]:
    """Return every process's object, in the order of their ranks; waits for all."""
    processes = process_count()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def copy_from_first(tensors: list[Tensor]) -> None:
    """Set tensors of all processes to those of the first one, in place."""
    if process_count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
