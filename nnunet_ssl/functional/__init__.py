"""Pure functions on tensors: losses, mixing, selection, ramps, EMA.

All take 2D (B, C, H, W) and 3D (B, C, D, H, W) tensors on any device, work in float32 inside, and
never wait for the device (`largest_component` excepted).
"""

from nnunet_ssl.functional.consistency import prob_mse, sigmoid_mse, softmax_mse
from nnunet_ssl.functional.ema import ema_decay_at, ema_update
from nnunet_ssl.functional.mixing import exchange, random_boxes
from nnunet_ssl.functional.outputs import confidence, downsample, full_res, hard_labels, to_prob
from nnunet_ssl.functional.ramps import rampup_between, sigmoid_rampup

__all__ = [
    "confidence",
    "downsample",
    "ema_decay_at",
    "ema_update",
    "exchange",
    "full_res",
    "hard_labels",
    "prob_mse",
    "rampup_between",
    "random_boxes",
    "sigmoid_mse",
    "sigmoid_rampup",
    "softmax_mse",
    "to_prob",
]
