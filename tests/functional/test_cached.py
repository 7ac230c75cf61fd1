import weakref

import pytest
import torch
from torch import nn

from nnunet_ssl.functional import cached_gradients, early_gradients


def network(dim=2):
    torch.manual_seed(0)
    conv = nn.Conv2d if dim == 2 else nn.Conv3d
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.Tanh(), conv(4, 3, 3, padding=1))


def contrast(outputs):
    """Couples every voxel with every other one, within and across chunks."""
    rows = torch.cat([y.flatten(2).movedim(1, -1).reshape(-1, 3) for y, *_ in outputs])
    similarity = rows @ rows.T
    return {"unsup_contrast": similarity.logsumexp(1).mean(), "unsup_size": rows.square().mean()}


def gradients(module, terms_of_each_yield):
    module.zero_grad()
    values: dict[str, float] = {}
    for terms in terms_of_each_yield:
        sum(terms.values()).backward()
        for key, value in terms.items():
            values[key] = values.get(key, 0.0) + value.item()
    return [p.grad.clone() for p in module.parameters()], values


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b, strict=True))


def in_parts(outputs):
    for key, value in contrast(outputs).items():
        yield {key: value}


@pytest.mark.parametrize("joint", [contrast, in_parts])
@pytest.mark.parametrize("dim", [2, 3])
def test_equals_one_joint_backward(dim, joint):
    net = network(dim)
    xs = [torch.randn(n, 1, *[5] * dim) for n in (2, 1, 3)]
    expected, values = gradients(net, [contrast([(net(x),) for x in xs])])
    found, logged = gradients(net, cached_gradients(lambda x: (net(x),), xs, joint))
    assert close(expected, found)
    assert logged == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("joint", [contrast, in_parts])
def test_chunk_that_ran_ahead_is_not_run_again(joint):
    net = network()
    xs = [torch.randn(2, 1, 5, 5) for _ in range(3)]
    runs = []

    def forward(x):
        runs.append(x)
        return (net(x),)

    expected, values = gradients(net, [contrast([(net(x),) for x in xs])])
    found, logged = gradients(net, cached_gradients(forward, xs[1:], joint, first=(net(xs[0]),)))
    assert close(expected, found)
    assert logged == pytest.approx(values, rel=1e-5)
    assert [id(x) for x in runs] == [id(x) for x in (xs[1], xs[2], xs[1], xs[2])]


def test_values_stand_in_the_first_yield_and_gradient_in_the_first_name():
    net = network()
    xs = [torch.randn(1, 1, 4, 4) for _ in range(2)]
    first, second = cached_gradients(lambda x: (net(x),), xs, contrast)
    expected = contrast([(net(x),) for x in xs])
    assert {k: v.item() for k, v in first.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}
    )
    assert list(second) == ["unsup_contrast"] and second["unsup_contrast"].item() == 0
    assert first["unsup_contrast"].requires_grad and not first["unsup_size"].requires_grad


@pytest.mark.parametrize("ahead", [True, False])
def test_chunks_and_outputs_without_influence_are_left_out(ahead):
    net = network()
    xs = [torch.randn(1, 1, 4, 4) for _ in range(3)]
    runs = []

    def forward(x):
        runs.append(id(x))
        return net(x), x.clone()  # the second output is never used

    first = forward(xs[0]) if ahead else None
    del runs[:]
    terms = cached_gradients(
        forward,
        xs[1:] if ahead else xs,
        lambda outputs: {"unsup": outputs[1][0].square().mean()},
        first,
    )
    found, logged = gradients(net, terms)
    expected, values = gradients(net, [{"unsup": net(xs[1]).square().mean()}])
    assert close(expected, found)
    assert logged == pytest.approx(values)
    assert runs.count(id(xs[1])) == 2 and runs.count(id(xs[2])) == 1


def test_nothing_but_the_outputs_gets_gradient():
    net, scale = network(), nn.Parameter(torch.ones(()))
    xs = [torch.randn(1, 1, 4, 4) for _ in range(2)]
    terms = cached_gradients(
        lambda x: (net(x),),
        xs,
        lambda out: {"unsup": scale * sum(y.square().mean() for (y,) in out)},
    )
    gradients(net, terms)
    assert scale.grad is None


def test_loss_scale_and_half_precision_outputs():
    net = network()
    xs = [torch.randn(1, 1, 6, 6) for _ in range(2)]

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return (net(x),)

    def collect(scale):
        scaled = (
            {k: scale * v for k, v in t.items()} for t in cached_gradients(forward, xs, joint)
        )
        return gradients(net, scaled)[0]

    def joint(outputs):
        assert all(y.dtype == torch.float32 for (y,) in outputs)
        return contrast(outputs)

    assert forward(xs[0])[0].dtype == torch.bfloat16
    for a, b in zip(collect(1.0), collect(1024.0), strict=True):
        assert torch.allclose(1024 * a, b, rtol=0.02, atol=1e-3)


def test_one_graph_is_alive_at_a_time():
    net = network()
    xs = [torch.randn(1, 1, 8, 8) for _ in range(4)]
    alive, peak = weakref.WeakSet(), 0

    class Saved:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor = tensor
            alive.add(self)
            peak = max(peak, len(alive))

    def saved_while(run):
        nonlocal peak
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor):
            run()
        return peak

    one = saved_while(lambda: net(xs[0]).sum().backward())
    whole = saved_while(lambda: sum(net(x).sum() for x in xs).backward())
    assert whole >= 3 * one

    def total(outputs):
        return {"unsup": sum(y.sum() for (y,) in outputs)}

    def cached():
        gradients(net, cached_gradients(lambda x: (net(x),), xs, total))

    assert saved_while(cached) <= one + 3  # the product with the gradient saves that


@pytest.mark.parametrize("joint", [contrast, in_parts])
def test_early_gradients_equal_the_plain_backward(joint):
    net = network()
    x = torch.randn(2, 1, 5, 5)
    expected, values = gradients(net, [contrast([(net(x), x)])])
    found, logged = gradients(net, [early_gradients((net(x), x), joint)])
    assert close(expected, found)
    assert logged == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("ahead", [True, False])
def test_the_annotated_part_can_be_taken_alone(ahead):
    """As the base does after a gradient that is not finite: "sup..." and nothing else."""
    net = network()
    xs = [torch.randn(2, 1, 5, 5) for _ in range(2)]

    def joint(outputs):
        (one,), (two,) = outputs
        yield {"sup": (one * two).mean(), "unsup": (one * two).square().sum()}
        yield {"unsup_late": two.exp().sum(), "sup_late": one.abs().mean()}

    one, two = (net(x) for x in xs)
    net.zero_grad()
    ((one * two).mean() + one.abs().mean()).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    first = (net(xs[0]),) if ahead else None
    for terms in cached_gradients(lambda x: (net(x),), xs[ahead:], joint, first):
        sum(value for name, value in terms.items() if name.startswith("sup")).backward()
    assert close(expected, [p.grad for p in net.parameters()])
