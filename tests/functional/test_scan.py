import sys
from types import ModuleType

import pytest
import torch
from torch import library
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.functional import scan as module
from nnunet_ssl.functional import selective_scan
from nnunet_ssl.functional.scan import blockwise_scan


def naive(u, dt, a, b, c, skip):
    """The recurrence, token by token."""
    h, rows = u.new_zeros(u.shape[0], *a.shape), []
    for x, step, into, out in zip(u.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1), strict=True):
        h = torch.exp(step[..., None] * a) * h + (step * x)[..., None] * into[:, None]
        rows.append((h * out[:, None]).sum(-1) + skip * x)
    return torch.stack(rows, 1)


def inputs(length, batch=2, channels=3, states=4, dtype=torch.float64):
    torch.manual_seed(length)
    u, dt = torch.randn(batch, length, channels), torch.rand(batch, length, channels) / 2
    a, skip = -4 * torch.rand(channels, states) - 0.1, torch.randn(channels)
    b, c = torch.randn(2, batch, length, states)
    return [x.to(dtype).requires_grad_() for x in (u, dt, a, b, c, skip)]


def kept_bytes(run, *args):
    """Return how much autograd keeps, each piece of memory once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        result = run(*args)  # lives until all is counted, so no address is used twice
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 97])
def test_it_is_the_recurrence_in_values_and_gradients(length, dtype, close):
    args = inputs(length, dtype=dtype)
    fast, slow = selective_scan(*args), naive(*args)
    torch.testing.assert_close(fast, slow, rtol=close, atol=close)
    weight = torch.randn_like(slow)
    grads = [torch.autograd.grad(y, args, weight) for y in (fast, slow)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * close, atol=10 * close)


@pytest.mark.parametrize(
    "length", [1, 2, 17]
)  # blocks of 1, 1 and 2 tokens, the last one filled up
def test_gradients_are_those_of_finite_differences(length):
    args = inputs(length, batch=1, channels=2, states=2)
    assert gradcheck(selective_scan, args)
    with pytest.raises(GradcheckError):  # the check sees a wrong gradient
        gradcheck(lambda u, *rest: selective_scan(u + u.detach(), *rest), args)


def test_a_token_acts_on_itself_and_on_later_ones_only():
    args = inputs(97)
    changed = [x.detach().clone() for x in args]
    for x in (changed[0], changed[1], changed[3], changed[4]):
        x[:, 50] += 1
    before, after = selective_scan(*args), selective_scan(*changed)
    assert torch.equal(before[:, :50], after[:, :50])
    assert (before[:, 50:] != after[:, 50:]).any(-1).all()


def test_samples_do_not_mix():
    args = inputs(64)
    alone = selective_scan(*(x[:1] if x.ndim == 3 else x for x in args))
    torch.testing.assert_close(alone, selective_scan(*args)[:1])


def test_a_step_of_zero_copies_the_state():
    u, dt, a, _, _, _ = (x.detach() for x in inputs(97))
    b = c = torch.ones(2, 97, 4, dtype=u.dtype)
    dt[:, 20:] = 0
    y = selective_scan(u, dt, a, b, c, torch.zeros(3, dtype=u.dtype))
    torch.testing.assert_close(y[:, 20:], y[:, 19:20].expand(-1, 77, -1), rtol=0, atol=1e-13)
    assert y[:, 19].abs().min() > 0


def test_constant_input_gives_the_geometric_series():
    length, dt, rate = 97, 0.3, -0.7
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    decay = torch.full((1, 1), rate, dtype=torch.float64)
    y = selective_scan(ones, dt * ones, decay, ones, ones, ones[0, 0])
    q = torch.tensor(dt * rate, dtype=torch.float64).exp()
    series = dt * (1 - q ** torch.arange(1, length + 1)) / (1 - q) + 1
    torch.testing.assert_close(y[0, :, 0], series)


def test_strong_decay_does_not_overflow():
    u, dt, a, b, c, skip = (x.detach() for x in inputs(600, dtype=torch.float32))
    args = [x.requires_grad_() for x in (u, 10 + dt, 100 * a, b, c, skip)]
    y = selective_scan(*args)
    torch.testing.assert_close(y, naive(*args), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), args))


def test_only_the_inputs_are_kept():
    args = inputs(1024, batch=1, channels=32, states=16, dtype=torch.float32)
    kept = kept_bytes(selective_scan, *args)
    assert kept == sum(4 * x.numel() for x in args)
    assert 10 * kept < kept_bytes(naive, *args)


def test_a_checkpoint_around_it_changes_nothing():
    args, weight = inputs(97), torch.randn(2, 97, 3, dtype=torch.float64)
    plain = selective_scan(*args)
    again = checkpoint(selective_scan, *args, use_reentrant=False)
    assert torch.equal(plain, again)
    grads = [torch.autograd.grad(y, args, weight) for y in (plain, again)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_gradients_of_the_scan_are_not_differentiated_again():
    args = inputs(9)
    (grad,) = torch.autograd.grad(selective_scan(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_gradients"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_but_not_inside(dtype):
    args = [x.detach().to(dtype).requires_grad_() for x in inputs(500)]
    exact = [x.detach().float().requires_grad_() for x in args]
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(*args)
        reference = selective_scan(*exact)
    assert y.dtype == dtype and reference.dtype == torch.float32
    assert torch.equal(y, reference.to(dtype))
    torch.testing.assert_close(reference, naive(*exact), rtol=1e-5, atol=1e-5)
    weight = torch.randn(y.shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # as in a backward pass under autocast
        grads = torch.autograd.grad(y, args, weight)
    expected = torch.autograd.grad(naive(*exact), exact, weight.float())
    for grad, other in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.float(), other, rtol=2e-2, atol=2e-2)


def test_a_compiled_function_keeps_it_whole():
    def scaled(*x):
        return 2 * selective_scan(*(2 * y for y in x))

    results = []
    for function in (scaled, torch.compile(scaled, backend="aot_eager", fullgraph=True)):
        args = inputs(64)
        y = function(*args)
        results.append([y, *torch.autograd.grad(y.square().sum(), args)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    library.opcheck(blockwise_scan, inputs(10))


def test_wrong_shapes_are_named():
    args = inputs(8)
    args[3] = args[3][:, :-1]
    with pytest.raises(ValueError, match=r"b is \(2, 7, 4\).*need \(2, 8, 4\)"):
        selective_scan(*args)


# ---------------------------------------------------------------------- the kernel of mamba-ssm


@pytest.fixture
def fake_package(monkeypatch):
    """Stand in for mamba_ssm with an interface that has these attributes."""

    def install(**attributes):
        names = "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[names[1]].selective_scan_interface = sys.modules[names[2]]
        vars(sys.modules[names[2]]).update(attributes)

    module.cuda_kernel.cache_clear()
    yield install
    module.cuda_kernel.cache_clear()


def kernel(u, dt, a, b, c, skip):
    """Stand in for the kernel, in its layout."""
    assert all(x.dtype == torch.float32 for x in (u, dt, a, b, c, skip))
    last = [x.transpose(1, 2) for x in (u, dt, b, c)]
    return naive(*last[:2], a, *last[2:], skip).transpose(1, 2)


@pytest.mark.parametrize(
    "attributes",
    [
        {"selective_scan_cuda": None, "selective_scan_fn": kernel},
        {"selective_scan_fn": kernel},
        {"selective_scan_cuda": object()},
    ],
)
def test_a_package_without_the_extension_is_not_used(fake_package, attributes):
    fake_package(**attributes)
    assert module.cuda_kernel() is None


def test_a_package_that_breaks_at_import_is_not_used(fake_package, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name.startswith("mamba_ssm"):
                raise OSError("libcudart.so: undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert module.cuda_kernel() is None


def test_the_extension_is_used_on_cuda_only(fake_package):
    fake_package(selective_scan_cuda=object(), selective_scan_fn=None)
    selective_scan(*inputs(8))
    assert module.cuda_kernel.cache_info().misses == 0  # not even looked for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gets_its_layout(fake_package, dtype):
    fake_package(selective_scan_cuda=object(), selective_scan_fn=kernel)
    args = inputs(33, dtype=dtype)
    y = module._run_kernel(*args)
    assert y.dtype == dtype
    torch.testing.assert_close(y, selective_scan(*args))
    grads = torch.autograd.grad(y.sum(), args)
    expected = torch.autograd.grad(selective_scan(*args).sum(), args)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
        )


@pytest.mark.gpu
def test_on_cuda_it_is_the_recurrence_with_and_without_the_kernel(monkeypatch):
    args = [x.detach().cuda().requires_grad_() for x in inputs(97, dtype=torch.float32)]
    slow = naive(*args)
    expected = torch.autograd.grad(slow.sum(), args)
    runs = [lambda: module.blockwise_scan(*args)]
    if module.cuda_kernel() is not None:
        runs.append(lambda: selective_scan(*args))
    for run in runs:
        y = run()
        torch.testing.assert_close(y, slow, rtol=1e-4, atol=1e-4)
        for one, other in zip(torch.autograd.grad(y.sum(), args), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
