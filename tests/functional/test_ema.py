import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_ssl.functional import ema_decay_at, ema_update


def unet(norm=nn.InstanceNorm2d):
    return PlainConvUNet(
        1, 3, (4, 8, 8), nn.Conv2d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), conv_bias=True,
        norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
    )  # fmt: skip


def test_decay_starts_as_a_mean():
    assert [ema_decay_at(k, 0.99) for k in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert ema_decay_at(98, 0.99) == pytest.approx(0.99 - 1 / 9900)
    assert ema_decay_at(99, 0.99) == ema_decay_at(10**6, 0.99) == 0.99


def test_every_tensor_moves_once_per_step_though_nnunet_names_it_several_times():
    teacher, student = unet(), unet()
    names = teacher.state_dict(keep_vars=True)
    assert len(names) > len({id(t) for t in names.values()})  # the trap is there
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    frozen = {k: v.clone() for k, v in student.state_dict().items()}
    for _ in range(5):
        ema_update(teacher, student, 0.9)
    for key, now in teacher.state_dict().items():
        expected = frozen[key] + 0.9**5 * (before[key] - frozen[key])
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-6, msg=key)
        assert torch.equal(student.state_dict()[key], frozen[key])


def test_first_step_copies_and_teacher_has_no_gradient():
    teacher, student = unet(), unet()
    ema_update(teacher, student, ema_decay_at(0, 0.99))
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(t, s)
        assert t.grad is None and t.grad_fn is None
        assert t.data_ptr() != s.data_ptr()


def test_buffers_are_copied():
    teacher, student = unet(nn.BatchNorm2d), unet(nn.BatchNorm2d)
    student(torch.randn(2, 1, 16, 16))
    ema_update(teacher, student, 0.99)
    for t, s in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(t, s)


def test_different_networks_are_refused():
    with pytest.raises(ValueError, match="same architecture"):
        ema_update(nn.Linear(2, 2), nn.Linear(2, 3), 0.9)
    with pytest.raises(ValueError, match="different buffers"):
        ema_update(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3), 0.9)
