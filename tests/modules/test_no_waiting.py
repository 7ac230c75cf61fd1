"""Nothing in `functional` and `modules` waits for the device.

Tensors on the meta device have no values, so whatever reads one (`.item()`, `if mask.any()`,
`mask.nonzero()`) fails there; on CUDA PyTorch itself reports waiting.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nnunet_ssl import functional as f
from nnunet_ssl.modules import (
    ClassBrake,
    ClassMoments,
    ClassThresholds,
    HighFrequencyMamba,
    ScoreMemory,
    TokenClusters,
    class_shares,
)


def run_everything(device, spatial):
    n = len(spatial)
    x = torch.zeros(3, 2, *spatial, device=device)
    logits = torch.zeros(3, 3, *spatial, device=device)
    label = torch.zeros(3, 1, *spatial, device=device, dtype=torch.int64)
    multi = torch.zeros(3, 3, *spatial, device=device, dtype=torch.bool)
    valid = torch.zeros(3, 1, *spatial, device=device, dtype=torch.bool)

    f.ema_update(nn.Linear(2, 2, device=device), nn.Linear(2, 2, device=device), 0.9)
    inside = f.random_boxes(3, spatial, 0.5, 0.8, device=device)
    f.exchange(x, x, inside)
    boxes = f.cutmix_boxes(3, spatial, 0.1, 0.4, device=device)
    f.cutmix(boxes, f.random_partners(3), x, label, valid)
    f.random_blocks(3, spatial, 4, 0.5, [1] * n, device=device)
    for distance in (f.feature_l1, f.feature_cosine):
        distance(x, x, valid)
    f.cutout(x, 0.5, 0.02, 0.4, valid)
    half = tuple(s // 2 for s in spatial)
    windows = f.Windows((0,) * n, half, half, torch.ones(half, dtype=torch.bool))
    f.displace(x, x, [windows, None, windows], [1] * n, "region")
    f.downsample(valid, [[1.0] * n, [0.5] * n])
    f.softmax_mse(logits, f.to_prob(logits, False), valid)
    f.sigmoid_mse(logits, f.to_prob(logits, True), multi)
    f.add_noise(x, 0.1, clip=0.2)
    f.strong_intensity(x, ops=(7, 7))
    f.apply_flips(x, f.random_flips(3, range(n)), range(n))
    f.apply_rot90(x, f.random_rot90(3))
    f.pseudo_ce_dice(logits, label, valid, valid, min_voxels=16)
    f.pseudo_ce_dice(logits, multi, multi, valid, regions=True, min_voxels=16)

    f.competition_score(logits, label, valid, 0.5)
    f.competition_loss(logits, logits, valid.any(), 0.1, valid)
    f.view_cosine(logits, logits, valid)
    for by_outcome, contrast in ((True, f.outcome_contrast), (False, f.iuc_contrast)):
        places = f.draw_places(label, label, valid, 3, 50, by_outcome)
        rows = f.gather_places(logits, places)
        contrast(rows, rows, rows.argmax(1), rows.argmax(1), places.counted, 3, 0.1)

    for regions, target in ((False, label), (True, multi)):
        prob = f.to_prob(logits, regions)
        f.coarse_maps(prob, valid, [2] * n, regions)
        f.squared_dice_loss(logits, target, valid, regions)
        f.normalized_entropy(prob, regions)
        shares = class_shares(target, valid, 3, regions, torch.ones(3, dtype=torch.bool))
        with torch.device(device):
            thresholds, brake = ClassThresholds(3, regions=regions), ClassBrake(len(shares))
        thresholds.update(prob, valid)
        thresholds.mask(prob)
        brake.update(shares, shares)
        for activation in ("softplus", "exp"):
            rows = f.binary_logits(logits) if regions else logits
            counted = valid.repeat_interleave(3, 0) if regions else valid
            one = f.opinion(rows, activation)
            belief, unsure = f.fuse_opinions(one, one)
            decision = belief.argmax(1, keepdim=True)
            f.voxel_reliability(belief, unsure, counted)
            f.curriculum_weight(unsure, counted, 0.3, 0.5)
            f.fisher_evidential_loss(one.alpha, decision, 0.05)
            f.dirichlet_logits(logits, regions, activation)
        brake.value()


def run_transfer(device, spatial):
    x = torch.zeros(2, 4, *spatial, device=device)
    mask = torch.zeros(2, 1, *spatial, device=device, dtype=torch.bool)
    with torch.device(device):
        memory, clusters = ClassMoments(3, 4), TokenClusters(4, 3)
    memory.update(f.sampled_moments(x, [mask] * 3, 50, 8))
    table = f.class_shift(torch.zeros(3, 4, device=device), memory.mean, memory.covariance, 0.5)
    f.expected_ce(x[:, :3], mask.long(), table, mask, balanced=True)
    gap, cov = torch.zeros(4, 2, 4, device=device), torch.zeros(4, 2, 4, 4, device=device)
    table = f.region_shift(torch.zeros(4, 4, device=device), gap, cov, 0.5)
    f.expected_ce(x, x > 0, table, mask, regions=True)
    places = x.flatten(2).transpose(1, 2)
    affinities = f.affinity(places, 2.0)
    f.clustering_loss(affinities, clusters(places, affinities))


def run_shapes(device):
    prob = torch.zeros(5, 1, 16, 16, device=device)
    valid = prob > 0
    pairs = (torch.zeros(5, 2, device=device) for _ in range(3))
    ellipses = f.Ellipses(*pairs, valid[:, 0, 0, 0])
    soft, mask = f.refine_by_ellipse(prob, f.ellipse_distance(ellipses, (16, 16)), 0.6)
    mirror = f.mirror_at(ellipses, (16, 16))
    f.mirrored_image(prob.expand(-1, 2, -1, -1), mask, valid, mirror, "left", True)
    f.sample_mse(soft, f.half_mirrored(soft, mirror, "right"), valid)
    f.mirror_mse(soft, mirror, valid)
    f.boundary_excess(prob, valid)
    with torch.device(device):
        memory = ScoreMemory(4)
    scores = torch.zeros(5, 2, device=device)
    memory.update(scores)
    settings = {"keep": 0.5, "min_keep": 0.8, "share": 0.5, "ranked": True}
    f.select_best(scores, memory.scores, memory.seen(), **settings)


def run_scan(device, spatial):
    with torch.device(device):
        module = HighFrequencyMamba(4, len(spatial), "fft")
    module(torch.zeros(2, 4, *spatial, device=device)).sum().backward()


@pytest.mark.parametrize("spatial", [(16, 16), (8, 16, 16)])
def test_no_value_is_read_on_the_host(spatial, monkeypatch):
    run_everything("meta", spatial)
    # there is no autocast of the meta device, not even one to switch off
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    run_transfer("meta", spatial)
    run_scan("meta", spatial)
    run_shapes("meta")


@pytest.mark.gpu
@pytest.mark.parametrize("spatial", [(16, 16), (8, 16, 16)])
def test_cuda_is_never_waited_for(spatial):
    def run():
        run_everything("cuda", spatial)
        run_transfer("cuda", spatial)
        run_scan("cuda", spatial)
        run_shapes("cuda")

    run()  # first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
