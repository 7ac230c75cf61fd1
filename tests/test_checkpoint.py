"""One atomic checkpoint, whatever happens while it is written."""

import errno
import io
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunet_ssl import checkpoint as checkpoints
from nnunet_ssl.checkpoint import (
    load_checkpoint,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    to_cpu,
)
from nnunet_ssl.errors import UserError

CPU = torch.device("cpu")


def state(value=0.0, size=10, **ssl):
    return {
        "network_weights": {"w": torch.full((size,), value)},
        "ssl_state": {"format": checkpoints.STATE_FORMAT, "trainer": "SSLTrainer", **ssl},
    }


# ---------------------------------------------------------------- to_cpu


def test_nested_state_keeps_its_shape():
    shared = torch.arange(6.0, requires_grad=True)
    original = {
        "a": [shared, (shared[:3], 2)],
        "b": {"c": shared, "d": None, "e": "text"},
        3: np.arange(2),
        "rng": random.getstate(),
    }
    copied = to_cpu(original)
    assert type(copied["a"]) is list and type(copied["a"][1]) is tuple
    assert not copied["a"][0].requires_grad
    assert copied["a"][0].data_ptr() == copied["b"]["c"].data_ptr()
    assert torch.equal(copied["a"][1][0], torch.arange(3.0)) and copied["a"][1][1] == 2
    assert copied["b"]["d"] is None and copied["b"]["e"] == "text"
    assert copied[3] is original[3] and copied["rng"] == original["rng"]
    assert shared.requires_grad  # the original is left alone


class Device(Tensor):
    """A tensor that says it lies on another device and counts its transfers."""

    transfers = 0

    @property
    def device(self):
        return torch.device("cuda", 0)

    def cpu(self):
        Device.transfers += 1
        return self.as_subclass(Tensor).clone()


def test_a_tensor_with_several_names_is_copied_from_the_device_once():
    Device.transfers = 0
    weight = torch.arange(6.0).reshape(2, 3).as_subclass(Device)
    other = weight.clone().as_subclass(Device)  # equal, but not the same
    empty = torch.empty(0).as_subclass(Device), torch.empty(0, 3).as_subclass(Device)
    copied = to_cpu(
        {"a": weight, "b": {"c": weight.detach()}, "d": other, "t": weight.t(), "e": empty}
    )
    assert all(type(copied[k]) is Tensor for k in "adt")
    assert copied["a"].data_ptr() == copied["b"]["c"].data_ptr()
    assert copied["d"].data_ptr() != copied["a"].data_ptr()
    assert torch.equal(copied["t"], torch.arange(6.0).reshape(2, 3).t())  # another view of it
    assert [tuple(e.shape) for e in copied["e"]] == [(0,), (0, 3)]
    assert Device.transfers == 5


@pytest.mark.gpu
def test_sharing_survives_the_way_from_a_gpu():
    network = unet().cuda()
    weights = network.state_dict()
    copied = to_cpu({"x": weights, "y": network.state_dict()})
    for key, value in weights.items():
        assert torch.equal(copied["x"][key], value.cpu())
        assert copied["x"][key].data_ptr() == copied["y"][key].data_ptr() or value.numel() == 0
    distinct = {v.data_ptr() for v in weights.values()}
    assert len({v.data_ptr() for v in copied["x"].values()}) == len(distinct)


def same(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def unet():
    return PlainConvUNet(
        1,
        3,
        (16, 32, 32),
        nn.Conv3d,
        3,
        ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        (2, 2, 2),
        3,
        (2, 2),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )


def test_names_of_the_same_weights_do_not_multiply_the_file(tmp_path):
    student, teacher = unet(), unet()
    names = student.state_dict()
    assert len(names) > 1.5 * len({v.data_ptr() for v in names.values()})  # nnU-Net's many names
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(
        {
            "network_weights": teacher.state_dict(),
            "ssl_state": {
                "student": student.state_dict(),
                "companions": {"teacher": teacher.state_dict()},
            },
        },
        path,
    )
    once = sum(4 * p.numel() for m in (student, teacher) for p in m.parameters())
    assert once < path.stat().st_size < 1.25 * once
    loaded = load_checkpoint(path)
    fresh = unet()
    fresh.load_state_dict(loaded["ssl_state"]["student"])
    assert same(fresh, student)
    fresh.load_state_dict(loaded["network_weights"])
    assert same(fresh, teacher)


# ---------------------------------------------------------------- loading


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pth does not exist\. Give the path"):
        load_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.3, 0.7, -100, -1])
def test_cut_short(keep, tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(state(size=10_000), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))] if 0 < abs(keep) < 1 else whole[:keep])
    assert len(path.read_bytes()) < len(whole)
    for load in (load_checkpoint, lambda p: load_training_state(p, "SSLTrainer")):
        with pytest.raises(UserError) as error:
            load(path)
        assert f"{path} cannot be read, it is damaged or cut short" in str(error.value)
        assert "Delete it" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x05.", b"\0" * 5000, b"PK\x03\x04" + b"x" * 99]
)
def test_no_torch_file(content, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, torch.ones(3), None])
def test_no_checkpoint_of_nnunet(content, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"a\.pth is not an nnU-Net checkpoint\. Give another"):
        load_checkpoint(path)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), MemoryError()])
def test_a_good_file_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(state(), path)

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    if isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            load_checkpoint(path)
    else:
        with pytest.raises(UserError, match=r"a\.pth is not readable\. Change its permissions"):
            load_checkpoint(path)


def test_training_state_of_this_trainer_alone(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(state(3.0), path)
    loaded = load_training_state(path, "SSLTrainer")
    assert torch.equal(loaded["network_weights"]["w"], torch.full((10,), 3.0))

    with pytest.raises(UserError) as error:
        load_training_state(path, "SSLTrainerBCP+seed=1")
    for word in (str(path), "trainer SSLTrainer, not SSLTrainerBCP+seed=1", "-tr SSLTrainer."):
        assert word in str(error.value)

    save_checkpoint(state(format=checkpoints.STATE_FORMAT + 1), path)
    with pytest.raises(UserError, match=r"another version of nnunet_ssl .*Install the version"):
        load_training_state(path, "SSLTrainer")

    save_checkpoint({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, path)
    with pytest.raises(UserError) as error:
        load_training_state(path, "SSLTrainer")
    for word in ("no semi-supervised state", f"-pretrained_weights {path}"):
        assert word in str(error.value)


# ---------------------------------------------------------------- saving in trouble


class FullDisk(io.FileIO):
    """A file on a disk that fills up after some bytes."""

    space = 0

    def write(self, data):
        if self.tell() + len(data) > self.space:
            super().write(memoryview(data).cast("B")[: max(0, self.space - self.tell())])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("space", [0, 10, 1000, 50_000, 399_000, 400_500])
@pytest.mark.parametrize("buffered", [False, True])
def test_full_disk_leaves_the_old_checkpoint(space, buffered, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint(state(1.0), path)

    def open_full(file, mode):
        raw = FullDisk(file, mode)
        raw.space = space
        return io.BufferedWriter(raw) if buffered else raw

    monkeypatch.setattr(checkpoints, "open", open_full, raising=False)
    with pytest.raises(UserError) as error:
        save_checkpoint(state(2.0, size=100_000), path)
    assert f"Cannot write {path}: the disk is full. Free some space" in str(error.value)
    assert os.listdir(tmp_path) == ["checkpoint_latest.pth"]
    assert torch.equal(load_checkpoint(path)["network_weights"]["w"], torch.full((10,), 1.0))

    monkeypatch.undo()
    save_checkpoint(state(2.0), path)
    assert load_checkpoint(path)["network_weights"]["w"][0] == 2


def test_folder_gone(tmp_path):
    with pytest.raises(UserError, match=r"gone/a\.pth: its folder does not exist"):
        save_checkpoint(state(), tmp_path / "gone" / "a.pth")


def test_an_error_that_is_no_failed_write_passes_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(state(1.0), path)

    def fail(*args):
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        save_checkpoint(state(2.0), path)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert load_checkpoint(path)["network_weights"]["w"][0] == 1


LIMITED = """
import resource, sys
import torch
from nnunet_ssl import checkpoint
from nnunet_ssl.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save_checkpoint({"network_weights": {"w": torch.ones(100_000)}}, sys.argv[1])
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_really_too_large_for_the_file_system(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(state(1.0), path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Cannot write {path}: "), done.stdout
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert load_checkpoint(path)["network_weights"]["w"][0] == 1


# writes a little of the second checkpoint, tells so, and waits to be killed
KILLED = """
import io, os, sys
import torch
from nnunet_ssl import checkpoint

path, until = sys.argv[1], int(sys.argv[2])
checkpoint.save_checkpoint({"network_weights": {"w": torch.ones(10)}}, path)

class Waiting(io.FileIO):
    def write(self, data):
        written = super().write(data)
        if self.tell() > until:
            os.write(1, b"writing")
            os.read(0, 1)
        return written

def replace(*args):
    os.write(1, b"written")
    os.read(0, 1)

checkpoint.open = Waiting
os.replace = replace
checkpoint.save_checkpoint({"network_weights": {"w": torch.zeros(100_000)}}, path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("until", [100_000, 10_000_000])
def test_kill_while_saving_leaves_a_checkpoint_that_loads(until, tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(until)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    told = child.stdout.read(7)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert told == (b"writing" if until < 400_000 else b"written")
    part = tmp_path / "checkpoint_latest.pth.part"
    assert part.stat().st_size > 50_000
    assert torch.equal(load_checkpoint(path)["network_weights"]["w"], torch.ones(10))
    save_checkpoint(state(5.0), path)  # the next run is not held up by what is left
    assert not part.exists()
    assert load_checkpoint(path)["network_weights"]["w"][0] == 5


# ---------------------------------------------------------------- random numbers


def draws():
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), torch.randn(1)


def test_random_state_goes_through_a_checkpoint(tmp_path):
    seed_everything(3)
    draws()
    np.random.randn()  # leaves half of a pair behind
    save_checkpoint(state(rng=random_state(CPU)), tmp_path / "a.pth")
    expected = draws()
    normal = np.random.randn()
    seed_everything(4)
    assert draws() != expected
    loaded = load_checkpoint(tmp_path / "a.pth")
    restore_random_state(loaded["ssl_state"]["rng"], CPU)
    assert draws() == expected
    assert np.random.randn() == normal


def test_seeds_repeat_and_differ():
    results = []
    for seed in (1, 1, 2, 2**32 + 1):
        seed_everything(seed)
        results.append(draws())
    assert results[0] == results[1] != results[2]
    assert results[3][0] != results[0][0]  # torch itself takes 32 bits on a CPU


@pytest.mark.gpu
def test_random_state_of_a_gpu():
    device = torch.device("cuda", 0)
    seed_everything(3)
    kept = to_cpu(random_state(device))
    expected = torch.rand(3, device=device)
    restore_random_state(kept, device)
    assert torch.equal(torch.rand(3, device=device), expected)
