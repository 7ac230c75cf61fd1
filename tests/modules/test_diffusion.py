import pytest
import torch
from torch import nn

from nnunet_ssl.functional import full_res
from nnunet_ssl.modules import DiffusionNetwork

from .test_networks import CASES, configuration, plan_network


def network(kind="PlainConvUNet", dim=2, channels=2, classes=3, deep_supervision=False):
    plan = plan_network(configuration(kind, dim), channels + classes, classes, deep_supervision)
    return DiffusionNetwork(plan)


def inputs(dim=2, size=16, samples=2, channels=2, classes=3):
    image = torch.randn(samples, channels, *[size] * dim)
    return image, torch.randn(samples, classes, *[size] * dim)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_starts_as_the_plans_network_whatever_the_time(kind, dim, deep_supervision):
    diffusion = network(kind, dim, deep_supervision=deep_supervision)
    image, state = inputs(dim)
    for time in ([0, 0], [3, 999]):
        output = diffusion(image, state, torch.tensor(time))
        own = diffusion.unet(torch.cat([image, state], 1))
        pairs = zip(output, own, strict=True) if deep_supervision else [(output, own)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_gradient_reaches_the_time(kind, dim):
    diffusion = network(kind, dim)
    for film in diffusion.films:  # zeros let none through to the embedding
        nn.init.normal_(film.linear.weight, std=0.05)
    image, state = inputs(dim)
    weight = torch.randn(2, 3, *[16] * dim)
    (weight * diffusion(image, state, torch.tensor([5, 700]))).sum().backward()
    unused = {n for n, p in diffusion.named_parameters() if p.grad is None}
    assert all("decoder.seg_layers" in n for n in unused)  # of deep supervision
    for name, parameter in diffusion.named_parameters():
        if name.startswith(("films", "time")):
            assert parameter.grad.abs().sum() > 0, name


def test_time_reaches_the_interior_by_scale_and_not_by_shift_alone():
    """A shift of a channel is constant: convolution and instance norm take it out again.

    Not at the bottleneck, behind which a transposed convolution stands.
    """
    torch.manual_seed(0)
    diffusion = network().double()
    image, state = (t.double() for t in inputs(size=128, samples=1))
    for film in diffusion.films[:-1]:
        nn.init.normal_(film.linear.weight, std=0.3)

    def variation():
        with torch.no_grad():
            outputs = torch.cat(
                [diffusion(image, state, torch.tensor([t])) for t in (0, 300, 600, 999)]
            )[..., 48:80, 48:80]
        return ((outputs - outputs.mean(0)).std() / outputs.std()).item()

    both = variation()
    for film in diffusion.films:  # the scales' half
        nn.init.zeros_(film.linear.weight[: len(film.linear.weight) // 2])
    assert both > 0.2
    assert variation() < 0.1 * both


def test_each_sample_has_its_own_time():
    diffusion = network()
    for film in diffusion.films:
        nn.init.normal_(film.linear.weight, std=0.1)
    image, state = inputs()
    together = diffusion(image, state, torch.tensor([10, 800]))
    for i, t in enumerate((10, 800)):
        alone = diffusion(image[i : i + 1], state[i : i + 1], torch.tensor([t]))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)


def test_embedding_tells_times_apart_and_tables_are_not_saved():
    diffusion = network()
    embedded = diffusion.time(torch.tensor([0, 1, 10, 998, 999]))
    distance = torch.cdist(embedded, embedded) + torch.eye(5)
    assert (distance > 1e-3).all() and embedded.isfinite().all()
    assert not [n for n in diffusion.state_dict() if "alpha_bars" in n or "frequencies" in n]


def test_same_under_autocast_with_the_embedding_in_float32():
    diffusion = network(deep_supervision=True)
    for film in diffusion.films:
        nn.init.normal_(film.linear.weight, std=0.1)
    image, state = inputs()
    time = torch.tensor([3, 901])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = full_res(diffusion(image, state, time))
    whole = full_res(diffusion(image, state, time))
    assert half.dtype == torch.bfloat16
    assert (half - whole).abs().max() < 0.1 * whole.std() + 0.05
