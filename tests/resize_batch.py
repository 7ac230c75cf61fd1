"""Batches of other sizes than the plan's."""

import dataclasses

import torch
from torch import Tensor

from nnunet_ssl.data.batch import Batch


def resized(data, size):
    """The batch with so many samples; repeated ones differ by their intensity."""

    def part(value):
        if isinstance(value, Tensor):
            repeated = value.repeat(-(-size // len(value)), *[1] * (value.ndim - 1))[:size]
            if repeated.is_floating_point():
                repeated += torch.arange(size).view(-1, *[1] * (value.ndim - 1)) * 0.1
            return repeated
        if isinstance(value, list):
            return [part(v) for v in value] if value and isinstance(value[0], Tensor) else value
        return {k: part(v) for k, v in value.items()} if isinstance(value, dict) else value

    return Batch(**{f.name: part(getattr(data, f.name)) for f in dataclasses.fields(data)})
