"""Pure functions on tensors: losses, mixing, selection, ramps, EMA.

All take 2D (B, C, H, W) and 3D (B, C, D, H, W) tensors on any device, work in float32 inside, and
never wait for the device, except `largest_component`, `choose_windows`, `fit_ellipses`,
`contour_roughness` and `released_scores`. `ellipses`, `symmetry` and `shape_scores` are 2D only.
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
from nnunet_ssl.functional.competition import competition_loss, competition_score, view_cosine
from nnunet_ssl.functional.components import largest_component, largest_component_regions
from nnunet_ssl.functional.consistency import prob_mse, sigmoid_mse, softmax_mse
from nnunet_ssl.functional.curriculum import curriculum_weight, relative_rank
from nnunet_ssl.functional.cutmix import cutmix, cutmix_boxes, random_partners
from nnunet_ssl.functional.cutout import cutout
from nnunet_ssl.functional.diffusion import (
    Sampled,
    alpha_bars,
    clean_state,
    ddim,
    ddim_steps,
    q_sample,
)
from nnunet_ssl.functional.displacement import (
    Windows,
    choose_windows,
    coarse_maps,
    displace,
    largest_region,
    window_means,
)
from nnunet_ssl.functional.ellipses import (
    Ellipses,
    ellipse_distance,
    fit_ellipses,
    refine_by_ellipse,
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
from nnunet_ssl.functional.guided import guided_count, guided_share
from nnunet_ssl.functional.haar import fft_bands, haar_split, laplacian_bands
from nnunet_ssl.functional.joint import (
    copy_from_first,
    gather,
    joint_roll,
    joint_share,
    joint_sum,
    process_count,
    shared_count,
)
from nnunet_ssl.functional.masked_loss import masked_ce_dice
from nnunet_ssl.functional.meta_labels import (
    partition,
    retrieval,
    slice_features,
    slice_positions,
)
from nnunet_ssl.functional.mixing import exchange, random_boxes
from nnunet_ssl.functional.outputs import confidence, downsample, full_res, hard_labels, to_prob
from nnunet_ssl.functional.overlap import soft_target_dice_loss, squared_dice_loss
from nnunet_ssl.functional.propagation import draw_per_class, propagation_loss
from nnunet_ssl.functional.pseudo_loss import deep_supervised, pseudo_ce_dice
from nnunet_ssl.functional.ramps import rampup_between, sigmoid_rampup, warmup_cosine
from nnunet_ssl.functional.scan import selective_scan
from nnunet_ssl.functional.selection import (
    Places,
    draw_places,
    gather_places,
    iuc_contrast,
    outcome_contrast,
)
from nnunet_ssl.functional.self_paced import (
    PairLosses,
    pace_at,
    pace_bounds,
    pair_losses,
    pair_weights,
    weighted_contrast,
)
from nnunet_ssl.functional.shape_scores import (
    boundary_excess,
    contour_roughness,
    released_scores,
    select_best,
)
from nnunet_ssl.functional.slices import from_slices, to_slices
from nnunet_ssl.functional.soft_targets import soft_target_kl
from nnunet_ssl.functional.symmetry import (
    Mirror,
    half_mirrored,
    mirror_at,
    mirror_mse,
    mirrored_image,
    perturbed,
    reflect,
    sample_mse,
)
from nnunet_ssl.functional.transfer import (
    Moments,
    class_shift,
    expected_ce,
    merged_moments,
    region_shift,
    sampled_moments,
)

__all__ = [
    "Ellipses",
    "Mirror",
    "Moments",
    "Opinion",
    "PairLosses",
    "Places",
    "Sampled",
    "Windows",
    "add_noise",
    "affinity",
    "alpha_bars",
    "apply_flips",
    "apply_rot90",
    "binary_logits",
    "boundary_excess",
    "cached_gradients",
    "choose_windows",
    "class_shift",
    "clean_state",
    "clustering_loss",
    "coarse_maps",
    "competition_loss",
    "competition_score",
    "confidence",
    "contour_roughness",
    "copy_from_first",
    "curriculum_weight",
    "cutmix",
    "cutmix_boxes",
    "cutout",
    "ddim",
    "ddim_steps",
    "deep_supervised",
    "dirichlet_logits",
    "displace",
    "downsample",
    "draw_per_class",
    "draw_places",
    "early_gradients",
    "ellipse_distance",
    "ema_decay_at",
    "ema_update",
    "exchange",
    "expected_ce",
    "feature_cosine",
    "feature_l1",
    "fft_bands",
    "fisher_evidential_loss",
    "fit_ellipses",
    "from_slices",
    "full_res",
    "fuse_opinions",
    "gather",
    "gather_places",
    "guided_count",
    "guided_share",
    "haar_split",
    "half_mirrored",
    "hard_labels",
    "iuc_contrast",
    "joint_roll",
    "joint_share",
    "joint_sum",
    "laplacian_bands",
    "largest_component",
    "largest_component_regions",
    "largest_region",
    "masked_ce_dice",
    "merged_moments",
    "mirror_at",
    "mirror_mse",
    "mirrored_image",
    "normalized_entropy",
    "opinion",
    "outcome_contrast",
    "pace_at",
    "pace_bounds",
    "pair_losses",
    "pair_weights",
    "partition",
    "perturbed",
    "prob_mse",
    "process_count",
    "propagation_loss",
    "pseudo_ce_dice",
    "q_sample",
    "rampup_between",
    "random_blocks",
    "random_boxes",
    "random_flips",
    "random_partners",
    "random_rot90",
    "refine_by_ellipse",
    "reflect",
    "region_shift",
    "relative_rank",
    "released_scores",
    "retrieval",
    "sample_mse",
    "sampled_moments",
    "select_best",
    "selective_scan",
    "shared_count",
    "sigmoid_mse",
    "sigmoid_rampup",
    "slice_features",
    "slice_positions",
    "soft_target_dice_loss",
    "soft_target_kl",
    "softmax_mse",
    "squared_dice_loss",
    "strong_intensity",
    "to_prob",
    "to_slices",
    "view_cosine",
    "voxel_reliability",
    "warmup_cosine",
    "weighted_contrast",
    "window_means",
]
