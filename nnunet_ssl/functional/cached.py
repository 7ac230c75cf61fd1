"""Losses that join many patches, with the memory of a few."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = tuple[Tensor, ...]


def cached_gradients(
    forward: Callable[[T], Outputs],
    inputs: Sequence[T],
    joint: Callable[[list[Outputs]], dict[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Yield terms whose gradients, added up, are those of a loss over all inputs at once.

    All inputs run without gradient first; the loss is taken on their outputs; then each runs again
    with gradient, one at a time, and gets the loss's gradient at its outputs. The price is one
    more forward pass; the graphs of two inputs are never alive together.

    Args:
        forward: network and what follows it; the same input gives the same outputs (no random
            numbers inside). Outputs are handed on in fp32.
        inputs: chunks, one back-propagation each.
        joint: the loss, from the outputs of all chunks to named scalars.

    Yields:
        One dict per chunk that the loss depends on. The values of the joint loss stand in the
        first; the others are 0. All gradient flows through the first name.

    Source: Gao et al. 2021, arXiv:2101.06983 (gradient cache).
    """
    with torch.no_grad():
        outputs = [tuple(t.float() for t in forward(x)) for x in inputs]
    leaves = [tuple(t.requires_grad_() for t in chunk) for chunk in outputs]
    flat = [t for chunk in leaves for t in chunk]
    with torch.enable_grad():
        terms = joint(leaves)
        total = torch.stack(list(terms.values())).sum()
    found = torch.autograd.grad(total, flat, allow_unused=True)
    values = {key: value.detach() for key, value in terms.items()}
    name = next(iter(terms))
    del terms, total, leaves, flat, outputs
    each = len(found) // len(inputs)
    for i, x in enumerate(inputs):
        grads = found[i * each : (i + 1) * each]
        if all(g is None for g in grads):
            continue  # the loss does not depend on this chunk
        products = [
            (t.float() * g).sum() for t, g in zip(forward(x), grads, strict=True) if g is not None
        ]
        surrogate = torch.stack(products).sum()
        carried = surrogate - surrogate.detach()
        yield {**values, name: values[name] + carried} if values else {name: carried}
        values = {}
