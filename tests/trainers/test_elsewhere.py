"""Every trainer on a device that is not the host, in mixed precision as on a GPU.

This is for machines without a GPU: `pretend_device.py` tells what shows there. `test_on_gpu.py`
asks a real one.
"""

import pytest
import torch
import torch.nn.functional as F
from make_trainers import start
from pretend_device import pretended_device, waits
from test_family import FULL, NAMES, assert_predicts_as_declared, states, whole_and_continued
from test_on_gpu import staged

pytestmark = pytest.mark.elsewhere


@pytest.fixture
def elsewhere(monkeypatch):
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no device that is written in Python")
    monkeypatch.setenv("nnUNet_compile", "f")
    with pretended_device() as device:
        try:
            torch.ones(1, device=device, requires_grad=True).sum().backward()
        except RuntimeError as error:
            # PyTorch starts its threads, one a device, with the first gradient
            if "device_ready_queues_" not in str(error):
                raise
            pytest.skip("takes a process of its own: pytest -m elsewhere")
        yield device


def amp(trainer):
    """Give it what nnU-Net and the base class give on a GPU."""
    trainer._autocast = lambda cache=False: torch.autocast(
        "pretend", dtype=torch.half, cache_enabled=cache
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    return trainer


def test_the_device_notices_what_a_gpu_would(elsewhere):
    there, here = torch.ones(3, device=elsewhere), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"add.*on the host"):
        there + here
    with pytest.raises(RuntimeError, match=r"cat.*on the host"):
        torch.cat([there, here[:1]])
    with pytest.raises(RuntimeError, match="indices on the device"):
        here[there > 0]
    with pytest.raises(RuntimeError, match=r"index_put.*on the host"):
        there[torch.tensor([0, 1])] = here[:2]
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device=elsewhere)
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    # a number, and indices, may come from the host
    assert (there + torch.tensor(2.0))[torch.tensor([0, 1])].tolist() == [3, 3]
    there[there > 0] = 2.0
    assert there.cpu().tolist() == [2, 2, 2]


def test_mixed_precision_there_is_that_of_cuda(elsewhere):
    x = torch.randn(1, 2, 4, 4, 4).to(elsewhere)
    weight = torch.randn(3, 2, 3, 3, 3).to(elsewhere).requires_grad_()
    with torch.autocast("pretend", dtype=torch.half):
        y = F.conv3d(x, weight)
        assert y.dtype == (y * y).dtype == F.instance_norm(y).dtype == torch.half
        assert {f(y).dtype for f in (torch.exp, torch.sum, F.softplus)} == {torch.float}
        assert y.softmax(1).dtype == torch.cat([y, x[:, :1, :2, :2, :2]], 1).dtype == torch.float
        with torch.autocast("pretend", enabled=False):
            assert F.conv3d(x, weight).dtype == torch.float
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(y.float().sigmoid(), y.float().sigmoid())
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float and weight.grad.device == elsewhere


def test_what_makes_the_host_wait_is_noticed(elsewhere):
    there = torch.ones(3, device=elsewhere)
    for wait in (
        lambda: there.sum().item(),
        lambda: bool(there.any()),
        lambda: there.cpu(),
        lambda: torch.zeros(3).copy_(there),
        lambda: there[there > 0],
        lambda: there[torch.tensor([0])],
        lambda: there.nonzero(),
        lambda: torch.zeros(3).to(elsewhere),
        lambda: torch.tensor([1.0, 2.0], device=elsewhere),
    ):
        waits.clear()
        wait()
        assert len(waits) == 1
    waits.clear()
    there[there.long()] + torch.zeros(3).to(elsewhere, non_blocking=True).where(there > 0, 1.0)
    torch.full((2,), 3.0, device=elsewhere)
    assert not waits


@pytest.mark.parametrize(
    ("name", "configuration", "before"),
    [
        ("SSLTrainer", "3d_fullres", []),
        ("SSLTrainer", "2d", ["aten::_to_copy"]),  # pieces are found on the host
        ("SSLTrainerSupervised", "3d_fullres", []),
    ],
)
def test_a_step_waits_once(name, configuration, before, make_trainer, elsewhere):
    """For whether the gradients are finite; no loss, threshold or gauge reads a value."""
    made = make_trainer(f"{name}{FULL.get(name, '')}", "Toy", configuration, device=elsewhere)
    trainer = start(made)
    trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_train)
    waits.clear()
    trainer.train_step(batch)
    assert waits == [*before, "aten::_local_scalar_dense"]


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_predicts_in_mixed_precision(name, make_trainer, elsewhere):
    length = "+num_epochs=1+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1+seed=1"
    full = f"{name}{FULL.get(name, '')}{length}"
    trainer = amp(make_trainer(full, short=False, device=elsewhere))
    trainer.run_training()
    assert {p.device for p in trainer.network.parameters()} == {elsewhere}
    assert trainer._skipped_steps == trainer._dropped_pseudo == 0
    for part in states(trainer).values():
        assert all(value.isfinite().all() for value in part.values())
    assert_predicts_as_declared(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_continues_as_if_it_had_not_stopped(name, make_trainer, elsewhere, monkeypatch, tmp_path):
    length = "+num_epochs=3+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1+save_every=1"

    def make():
        return make_trainer(f"{name}{staged(name)}{length}+seed=1", short=False, device=elsewhere)

    whole, continued, _ = whole_and_continued(make, monkeypatch, tmp_path / "second")
    ends = states(whole), states(continued)
    for part, end in ends[0].items():
        assert end.keys() == ends[1][part].keys()
        for key, value in end.items():
            assert torch.equal(value.cpu(), ends[1][part][key].cpu()), (part, key)
