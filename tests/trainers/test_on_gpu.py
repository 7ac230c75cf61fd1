"""Every trainer with mixed precision and `torch.compile`, as nnU-Net has them on a GPU.

Without one, `-m slow` drives the same tests with a few trainers on the CPU: in single precision,
their networks traced but not compiled.
"""

import gc
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from make_trainers import start, with_needed
from test_family import (
    FULL,
    NAMES,
    SEMI,
    TAUGHT,
    assert_predicts_as_declared,
    whole_and_continued,
    widened,
)
from test_family import states as states_of

from nnunet_ssl.estimate import KeptBytes
from nnunet_ssl.history import read_log
from nnunet_ssl.naming import resolve

LENGTH = "+num_epochs=3+num_iterations_per_epoch=4+num_val_iterations_per_epoch=1"
ON_CPU = ("SSLTrainer", "SSLTrainerBCP", "SSLTrainerDiffCL", "SSLTrainerMEDL")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
)
# of how far weights and optimizers moved since the interruption; CUDA adds in any order
TOLERANCE = {"cuda": 0.1, "cpu": 0.0}


def on_devices(names, on_cpu):
    on_gpu = [pytest.param(name, "cuda", marks=GPU) for name in names]
    return on_gpu + [pytest.param(name, "cpu", marks=pytest.mark.slow) for name in on_cpu]


def staged(name):
    """The settings with which all terms act, after one epoch of the first stage if there is one."""
    return re.sub(r"\+(warmup|rampup_end|pretrain|supervised)=0\b", r"+\1=0.3", FULL.get(name, ""))


@pytest.fixture(autouse=True)
def as_nnunet_has_it(request, monkeypatch, compile_on_cpu):
    """Compile, fail instead of giving up compiling, and let convolutions repeat themselves."""
    monkeypatch.delenv("nnUNet_compile", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if request.node.callspec.params["device"] == "cpu":
        compile_on_cpu()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def distance(a, b):
    """Euclidean distance of all numbers of a state; those that one of them lacks count as 0."""
    total = 0.0
    for key in a.keys() | b.keys():
        x, y = (s[key].double() if key in s else 0.0 for s in (a, b))
        total += float(torch.as_tensor(x - y).square().sum())
    return total**0.5


def assert_same_end(whole, continued, before, tolerance):
    """Compare two trainings, of which the second was interrupted in the states `before`."""
    ends = states_of(whole), states_of(continued)
    assert ends[0].keys() == ends[1].keys() == before.keys()
    for part, end in ends[0].items():
        assert end.keys() == ends[1][part].keys()
        assert all(value.isfinite().all() for value in end.values()), part
        moved = distance(end, before[part])
        assert distance(end, ends[1][part]) <= tolerance * moved, part
        if not part.startswith("companions"):
            assert moved > 0, part


@pytest.mark.parametrize(("name", "device"), on_devices(NAMES, ON_CPU))
def test_trains_continues_and_predicts(name, device, make_trainer, monkeypatch, tmp_path):
    def make():
        torch._dynamo.reset()  # as in a process of its own
        full = f"{name}{staged(name)}{LENGTH}+seed=1+save_every=1"
        return make_trainer(full, short=False, device=device)

    whole, continued, before = whole_and_continued(make, monkeypatch, tmp_path / "second")
    assert any(m._compiled_call_impl is not None for m in whole.network.modules())
    assert_same_end(whole, continued, before, TOLERANCE[device])
    if device == "cuda":
        assert whole.grad_scaler.get_scale() == continued.grad_scaler.get_scale() > 0
    logs = [read_log(Path(t.output_folder) / "ssl_log.jsonl") for t in (whole, continued)]
    for a, b in zip(*logs, strict=True):
        assert a["terms"].keys() == b["terms"].keys()
        for key, value in a["terms"].items():
            assert b["terms"][key] == pytest.approx(value, rel=TOLERANCE[device], abs=1e-12), key
        assert a["steps_left_out"] == a["steps_without_pseudo"] == 0
        assert None not in a["terms"].values()  # NaN
        assert device == "cpu" or a["gpu_peak_mb"] > 0
    if name in SEMI and name not in TAUGHT:  # their terms need a trained network
        assert any(value for key, value in logs[0][-1]["terms"].items() if key.startswith("unsup"))

    predictor = assert_predicts_as_declared(whole, atol=1e-2 if device == "cuda" else 1e-5)
    size = [n + n // 2 for n in whole.configuration_manager.patch_size]
    if len(size) == 2:
        size = [2, *size]
    scan = torch.randn(whole.num_input_channels, *size)
    logits = predictor.predict_logits_from_preprocessed_data(scan)
    assert logits.shape == (whole.num_heads, *size) and logits.isfinite().all()


@pytest.mark.parametrize(("name", "device"), on_devices(["SSLTrainer"], ["SSLTrainer"]))
def test_search_for_foreground_with_a_compiled_teacher(name, device, make_trainer):
    full = f"{name}{FULL[name]}{LENGTH}+unlabeled_foreground=0.5"
    trainer = make_trainer(full, configuration="2d", short=False, device=device)
    trainer.run_training()
    assert trainer._places.number == 3  # one an epoch
    assert trainer._places.path(3).is_file()


@pytest.mark.parametrize("exchange", [0, 1])
@pytest.mark.parametrize(("name", "device"), on_devices(["SSLTrainer"], ["SSLTrainer"]))
def test_peak_memory_of_the_default(name, device, exchange, make_trainer):
    def peak(full):
        gc.collect()
        torch._dynamo.reset()
        on_gpu = device == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        full = with_needed(full + LENGTH)
        trainer = make_trainer(full, configuration="3d_fullres", short=False, device=device)
        if on_gpu:
            trainer.configuration_manager.configuration["patch_size"] = [64, 96, 96]
        start(widened(trainer))
        counter = KeptBytes(trainer.network, trainer.companions)
        with nullcontext() if on_gpu else counter:
            for _ in range(3):
                trainer.train_step(next(trainer.dataloader_train))
        return torch.cuda.max_memory_allocated() - before if on_gpu else counter.peak

    twin = peak(resolve(name).twin)
    full = FULL[name].replace("exchange_probability=0.5", f"exchange_probability={exchange}")
    assert 0 < peak(name + full) <= 1.25 * twin
