"""Losses that join many patches, with the memory of a few."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = tuple[Tensor, ...]
Terms = dict[str, Tensor]


def cached_gradients(
    forward: Callable[[T], Outputs],
    inputs: Sequence[T],
    joint: Callable[[list[Outputs]], Terms | Iterable[Terms]],
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
    leaves = [tuple(t.detach().float().requires_grad_() for t in chunk) for chunk in outputs]
    del outputs
    flat = [t for chunk in leaves for t in chunk]
    found: list[Tensor | None] = [None] * len(flat)
    values: Terms = {}
    with torch.enable_grad():
        result = joint(leaves)
        for terms in [result] if isinstance(result, dict) else result:
            total = torch.stack(list(terms.values())).sum()
            new = torch.autograd.grad(total, flat, allow_unused=True)
            found = [
                a if b is None else b if a is None else a + b
                for a, b in zip(found, new, strict=True)
            ]
            for key, value in terms.items():
                values[key] = values.get(key, 0) + value.detach()
            del terms, total, new
    name, each, ahead = next(iter(values)), len(leaves[0]), first is not None
    del result, leaves, flat
    for i in range(len(found) // each):
        grads = found[i * each : (i + 1) * each]
        chunk, first = first, None
        if all(g is None for g in grads):
            continue  # the loss does not depend on this chunk
        if chunk is None:
            chunk = forward(inputs[i - ahead])
        products = [
            (t.float() * g).sum() for t, g in zip(chunk, grads, strict=True) if g is not None
        ]
        surrogate = torch.stack(products).sum()
        carried = surrogate - surrogate.detach()
        del chunk, products, surrogate
        yield {**values, name: values[name] + carried} if values else {name: carried}
        del carried
        values = {}
