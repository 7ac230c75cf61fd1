"""Pure functions on tensors: losses, mixing, selection, ramps, EMA.

All take 2D (B, C, H, W) and 3D (B, C, D, H, W) tensors on any device, work in float32 inside, and
never wait for the device (`largest_component` and `choose_windows` excepted).
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
from nnunet_ssl.functional.cached import cached_gradients, early_gradients
from nnunet_ssl.functional.clustering import affinity, clustering_loss
from nnunet_ssl.functional.components import largest_component, largest_component_regions
from nnunet_ssl.functional.consistency import prob_mse, sigmoid_mse, softmax_mse
from nnunet_ssl.functional.curriculum import curriculum_weight, relative_rank
from nnunet_ssl.functional.cutmix import cutmix, cutmix_boxes, random_partners
from nnunet_ssl.functional.cutout import cutout
from nnunet_ssl.functional.displacement import (
    Windows,
    choose_windows,
    coarse_maps,
    displace,
    largest_region,
    window_means,
)
from nnunet_ssl.functional.ema import ema_decay_at, ema_update
from nnunet_ssl.functional.entropy import normalized_entropy
from nnunet_ssl.functional.evidence import (
    Opinion,
    binary_logits,
    dirichlet_logits,
    fisher_evidential_loss,
    fuse_opinions,
    opinion,
    voxel_reliability,
)
from nnunet_ssl.functional.features import feature_cosine, feature_l1
from nnunet_ssl.functional.mixing import exchange, random_boxes
from nnunet_ssl.functional.outputs import confidence, downsample, full_res, hard_labels, to_prob
from nnunet_ssl.functional.overlap import squared_dice_loss
from nnunet_ssl.functional.pseudo_loss import deep_supervised, pseudo_ce_dice
from nnunet_ssl.functional.ramps import rampup_between, sigmoid_rampup
from nnunet_ssl.functional.transfer import (
    Moments,
    class_shift,
    expected_ce,
    merged_moments,
    region_shift,
    sampled_moments,
)

__all__ = [
    "Moments",
    "Opinion",
    "Windows",
    "add_noise",
    "affinity",
    "apply_flips",
    "apply_rot90",
    "binary_logits",
    "cached_gradients",
    "choose_windows",
    "class_shift",
    "clustering_loss",
    "coarse_maps",
    "confidence",
    "curriculum_weight",
    "cutmix",
    "cutmix_boxes",
    "cutout",
    "deep_supervised",
    "dirichlet_logits",
    "displace",
    "downsample",
    "early_gradients",
    "ema_decay_at",
    "ema_update",
    "exchange",
    "expected_ce",
    "feature_cosine",
    "feature_l1",
    "fisher_evidential_loss",
    "full_res",
    "fuse_opinions",
    "hard_labels",
    "largest_component",
    "largest_component_regions",
    "largest_region",
    "merged_moments",
    "normalized_entropy",
    "opinion",
    "prob_mse",
    "pseudo_ce_dice",
    "rampup_between",
    "random_blocks",
    "random_boxes",
    "random_flips",
    "random_partners",
    "random_rot90",
    "region_shift",
    "relative_rank",
    "sampled_moments",
    "sigmoid_mse",
    "sigmoid_rampup",
    "softmax_mse",
    "squared_dice_loss",
    "strong_intensity",
    "to_prob",
    "voxel_reliability",
    "window_means",
]
