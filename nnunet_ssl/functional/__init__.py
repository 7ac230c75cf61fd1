"""Pure functions on tensors: losses, mixing, selection, ramps, EMA.

All take 2D (B, C, H, W) and 3D (B, C, D, H, W) tensors on any device, work in float32 inside, and
never wait for the device (`largest_component` excepted).
"""

from nnunet_ssl.functional.augment import (
    add_noise,
    apply_flips,
    apply_rot90,
    random_flips,
    random_rot90,
    strong_intensity,
)
from nnunet_ssl.functional.blocks import random_blocks
from nnunet_ssl.functional.cached import cached_gradients
from nnunet_ssl.functional.components import largest_component, largest_component_regions
from nnunet_ssl.functional.consistency import prob_mse, sigmoid_mse, softmax_mse
from nnunet_ssl.functional.ema import ema_decay_at, ema_update
from nnunet_ssl.functional.features import feature_cosine, feature_l1
from nnunet_ssl.functional.mixing import exchange, random_boxes
from nnunet_ssl.functional.outputs import confidence, downsample, full_res, hard_labels, to_prob
from nnunet_ssl.functional.pseudo_loss import deep_supervised, pseudo_ce_dice
from nnunet_ssl.functional.ramps import rampup_between, sigmoid_rampup

__all__ = [
    "add_noise",
    "apply_flips",
    "apply_rot90",
    "cached_gradients",
    "confidence",
    "deep_supervised",
    "downsample",
    "ema_decay_at",
    "ema_update",
    "exchange",
    "feature_cosine",
    "feature_l1",
    "full_res",
    "hard_labels",
    "largest_component",
    "largest_component_regions",
    "prob_mse",
    "pseudo_ce_dice",
    "rampup_between",
    "random_blocks",
    "random_boxes",
    "random_flips",
    "random_rot90",
    "sigmoid_mse",
    "sigmoid_rampup",
    "softmax_mse",
    "strong_intensity",
    "to_prob",
]
