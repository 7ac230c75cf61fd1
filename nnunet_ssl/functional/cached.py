"""Losses that join many patches, with the memory of a few."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Outputs = tuple[Tensor, ...]
Terms = dict[str, Tensor]
Gradients = list[Tensor | None]  # one an output, None where the loss does not depend on it
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
        first; the others are 0. All gradient of the names with one beginning ("sup", "unsup": what
        stands before the first "_") flows through the first of them.

    Source: Gao et al. 2021, arXiv:2101.06983 (gradient cache).
    """
    with torch.no_grad():
        outputs = [forward(x) for x in inputs]
    if first is not None:
        outputs.insert(0, first)
    values, found = _gradients_at(outputs, joint)
    ahead = first is not None
    del outputs
    for i, grads in enumerate(found):
        chunk, first = first, None
        if not grads:
            continue  # the loss does not depend on this chunk
        if chunk is None:
            chunk = forward(inputs[i - ahead])
        carried = _carry(chunk, grads)
        del chunk
        yield values | {name: values.get(name, 0) + value for name, value in carried.items()}
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
        The values by name. Gradient as in `cached_gradients`.
    """
    values, (grads,) = _gradients_at([outputs], joint)
    carried = _carry(outputs, grads)
    return values | {name: values[name] + value for name, value in carried.items()}


def _gradients_at(
    outputs: Sequence[Outputs], joint: Joint
) -> tuple[Terms, list[dict[str, Gradients]]]:
    """Return the values of a loss, and for each chunk its gradient at each output.

    The gradient of a chunk is given by the names of terms that carry it.
    """
    leaves = [tuple(t.detach().float().requires_grad_() for t in chunk) for chunk in outputs]
    flat = [t for chunk in leaves for t in chunk]
    carriers: dict[str, str] = {}  # beginning of a name -> the first such name
    found: dict[str, Gradients] = {}
    values: Terms = {}
    with torch.enable_grad():
        result = joint(leaves)
        for terms in [result] if isinstance(result, dict) else result:
            totals: Terms = {}
            for key, value in terms.items():
                carrier = carriers.setdefault(key.partition("_")[0], key)
                totals[carrier] = totals[carrier] + value if carrier in totals else value
                values[key] = values.get(key, 0) + value.detach()
            del terms
            while totals:
                carrier, total = totals.popitem()
                # autocast is on where the outputs were made, and would take this backward as well
                with torch.autocast(flat[0].device.type, enabled=False):
                    grads = torch.autograd.grad(
                        total, flat, allow_unused=True, retain_graph=bool(totals)
                    )
                old = found.get(carrier, [None] * len(flat))
                found[carrier] = [
                    b if a is None else a if b is None else a + b
                    for a, b in zip(old, grads, strict=True)
                ]
            del total
    ends = [sum(len(chunk) for chunk in leaves[: i + 1]) for i in range(len(leaves))]
    per_chunk = []
    for end, chunk in zip(ends, leaves, strict=True):
        own = {name: grads[end - len(chunk) : end] for name, grads in found.items()}
        per_chunk.append({n: g for n, g in own.items() if any(t is not None for t in g)})
    return values, per_chunk


def _carry(outputs: Outputs, grads: dict[str, Gradients]) -> Terms:
    """Return for each name a 0 whose gradient at the outputs is the given one."""
    carried = {}
    for name, of_name in grads.items():
        pairs = zip(outputs, of_name, strict=True)
        surrogate = torch.stack([(t.float() * g).sum() for t, g in pairs if g is not None]).sum()
        carried[name] = surrogate - surrogate.detach()
    return carried
