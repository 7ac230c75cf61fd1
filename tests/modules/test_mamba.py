import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from nnunet_ssl.modules import HighFrequencyMamba, SelectiveSSM

HIGH_PASS = ("haar", "fft", "laplacian")


def opened(*args, **kwargs):
    """A module whose gate has learned something."""
    torch.manual_seed(0)
    module = HighFrequencyMamba(*args, **kwargs)
    torch.nn.init.normal_(module.gate.weight)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high_pass", HIGH_PASS)
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (4, 6, 8), (5, 1, 3)])
def test_a_new_module_changes_no_bit(size, high_pass, dtype):
    module = HighFrequencyMamba(4, len(size), high_pass)
    x = torch.randn(2, 4, *size).to(dtype)
    x[0, 0].fill_(-0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = module(x)
    assert y.dtype == dtype and y.shape == x.shape
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(as_bits), x.view(as_bits))


@pytest.mark.parametrize("high_pass", HIGH_PASS)
@pytest.mark.parametrize("size", [(7, 6), (3, 4, 5)])
def test_every_parameter_learns_once_the_gate_is_open(size, high_pass):
    module, x = opened(4, len(size), high_pass), torch.randn(2, 4, *size, requires_grad=True)
    y = module(x)
    assert (y / x).min() > 0 and (y / x).max() < 2
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_at_first_only_the_gate_learns():
    module = HighFrequencyMamba(4, 2)
    module(torch.randn(2, 4, 8, 8)).square().sum().backward()
    moved = {name for name, p in module.named_parameters() if p.grad.any()}
    assert moved == {"gate.weight", "gate.bias"}


def test_the_gate_sees_edges_and_far_places_but_no_level():
    module, x = opened(4, 2), torch.randn(1, 4, 16, 16)
    gates = module(x) / x
    raised = x + 5  # another level, the same high frequencies
    torch.testing.assert_close(module(raised) / raised, gates, rtol=1e-3, atol=1e-3)
    for corner, far in (((0, 0), (-1, -1)), ((-1, -1), (0, 0))):  # scans of both directions
        other = x.clone()
        other[(..., *corner)] += 3
        assert (module(other)[(..., *far)] != module(x)[(..., *far)]).any()


def test_a_cell_shares_its_gate():
    x = torch.randn(2, 4, 5, 6)
    gates = opened(4, 2)(x) / x
    for i, j in ((0, 0), (2, 4)):
        cell = gates[..., i : i + 2, j : j + 2].flatten(2)
        torch.testing.assert_close(cell, cell[..., :1].expand_as(cell))
    assert gates.std(dim=(2, 3)).min() > 1e-3


@pytest.mark.parametrize("channels", [4, 40])
def test_tokens_see_earlier_ones_only(channels):
    torch.manual_seed(0)
    mixer, tokens = SelectiveSSM(channels), torch.randn(2, 33, channels)
    changed = tokens.clone()
    changed[:, 20] += 1
    before, after = mixer(tokens), mixer(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=0)
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_a_mamba_block_starts_as_published():
    mixer = SelectiveSSM(40, state=16, expand=2, conv=4)
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17).expand(80, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() * 1.001 >= 0.001 and steps.max() <= 0.1001 and steps.std() > 0.01
    assert mixer.dt_proj.in_features == 3  # 40 / 16, rounded up
    free = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert free == {"A_log", "skip"}
    assert all(p.dtype == torch.float32 for p in mixer.parameters())
    assert mixer(torch.randn(1, 1, 40)).shape == (1, 1, 40)  # shorter than the convolution


def test_autocast_and_large_values_stay_finite():
    module = opened(4, 3)
    for scale in (1.0, 1e4):
        x = (scale * torch.randn(1, 4, 6, 6, 6)).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
        y.float().mean().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_the_module_keeps_no_states_for_the_backward_pass():
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    module, x = opened(8, 2), torch.randn(1, 8, 64, 64)
    with saved_tensors_hooks(keep, lambda x: x):
        y = module(x)  # lives until all is counted, so no address is used twice
    assert y.requires_grad
    states = 2 * 4 * 1024 * 16 * 16  # both scans: bytes, tokens, inner channels, states
    assert sum(kept.values()) < states


@pytest.mark.parametrize("half", [False, True])
def test_compiled_it_is_the_same(half):
    module, x = opened(4, 2), torch.randn(2, 4, 7, 6)
    results = []
    for run in (module, torch.compile(module, backend="eager")):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_weights_move_to_a_network_of_the_same_kind():
    one, other, x = opened(4, 2), HighFrequencyMamba(4, 2), torch.randn(1, 4, 8, 8)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert not any("cuda" in name or "kernel" in name for name in one.state_dict())


@pytest.mark.parametrize("wrong", [{"dim": 1}, {"dim": 2, "high_pass": "sobel"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match="high_pass is haar, fft or laplacian and dim 2 or 3"):
        HighFrequencyMamba(4, **wrong)
