"""Losses that join many patches, with the memory of a few."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = tuple[Tensor, ...]
Terms = dict[str, Tensor]
Joint = Callable[[list[Outputs]], Terms | Iterable[Terms]]


def cached_gradients(
    forward: Callable[[T], Outputs],
    inputs: Sequence[T],
    joint: Joint,
    first: Outputs | None = None,
) -> Iterator[Terms]:
    """Yield terms whose gradients, added up, are those of a loss over all inputs at once.

    All inputs run without gradient first; the loss is taken on their outputs; then each runs again
    with gradient, one at a time, and gets the loss's gradient at its outputs. The price is one
    more forward pass an input; the graphs of two inputs are never alive together.

    Args:
        forward: network and what follows it; the same input gives the same outputs (no random
            numbers inside). Outputs are handed on in fp32.
        inputs: chunks, one back-propagation each.
        joint: the loss, from the outputs of all chunks to named scalars, or a generator of such
            dicts, whose graphs are freed one by one. What it depends on beside the outputs gets no
            gradient.
        first: outputs of a further chunk that the caller ran with gradient. It is the first one for
            `joint` and is not run again, so it saves a forward pass; its graph stays meanwhile.

    Yields:
        One dict per chunk that the loss depends on. The values of the joint loss stand in the
        first; the others are 0. All gradient flows through the first name.

    Source: Gao et al. 2021, arXiv:2101.06983 (gradient cache).
    """
    with torch.no_grad():
        outputs = [forward(x) for x in inputs]
    if first is not None:
        outputs.insert(0, first)
    values, found = _gradients_at(outputs, joint)
    name, ahead = next(iter(values)), first is not None
    del outputs
    for i, grads in enumerate(found):
        chunk, first = first, None
        if all(g is None for g in grads):
            continue  # the loss does not depend on this chunk
        if chunk is None:
            chunk = forward(inputs[i - ahead])
        carried = _carry(chunk, grads)
        del chunk
        yield {**values, name: values[name] + carried} if values else {name: carried}
        del carried
        values = {}


def early_gradients(outputs: Outputs, joint: Joint) -> Terms:
    """Return terms of a loss on outputs whose own graph is gone; its gradient at them stays.

    For losses that save more than the network: with a generator as `joint` the graphs of two
    terms are never alive together.

    Args:
        outputs: of a network, with gradient.
        joint: as for `cached_gradients`, with one chunk.

    Returns:
        The values by name. All gradient flows through the first name.
    """
    values, (grads,) = _gradients_at([outputs], joint)
    name = next(iter(values))
    return {**values, name: values[name] + _carry(outputs, grads)}


def _gradients_at(
    outputs: Sequence[Outputs], joint: Joint
) -> tuple[Terms, list[list[Tensor | None]]]:
    """Return the values of a loss and its gradient at each output of each chunk."""
    leaves = [tuple(t.detach().float().requires_grad_() for t in chunk) for chunk in outputs]
    flat = [t for chunk in leaves for t in chunk]
    found: list[Tensor | None] = [None] * len(flat)
    values: Terms = {}
    with torch.enable_grad():
        result = joint(leaves)
        for terms in [result] if isinstance(result, dict) else result:
            total = torch.stack(list(terms.values())).sum()
            for i, grad in enumerate(torch.autograd.grad(total, flat, allow_unused=True)):
                old = found[i]
                found[i] = grad if old is None else old if grad is None else old + grad
            for key, value in terms.items():
                values[key] = values.get(key, 0) + value.detach()
            del terms, total
    ends = [sum(len(chunk) for chunk in leaves[: i + 1]) for i in range(len(leaves))]
    return values, [found[end - len(chunk) : end] for end, chunk in zip(ends, leaves, strict=True)]


def _carry(outputs: Outputs, grads: Sequence[Tensor | None]) -> Tensor:
    """Return a 0 whose gradient at the outputs is the given one."""
    products = [(t.float() * g).sum() for t, g in zip(outputs, grads, strict=True) if g is not None]
    surrogate = torch.stack(products).sum()
    return surrogate - surrogate.detach()
