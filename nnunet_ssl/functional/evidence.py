"""Logits read as Dirichlet evidence: opinions, their fusion, reliability, Fisher information.

An opinion gives each class a belief b_k and keeps a mass u for "don't know": sum b_k + u = 1.
Regions are opinions of two classes each, (against, for), see `binary_logits`; all functions then
work on rows of (N, K, *) with N = B, or N = B * R and K = 2.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

MAX_EVIDENCE = 1e4  # beyond it the determinant of the Fisher matrix is lost in float32
ACTIVATIONS = ("softplus", "exp")
FUSIONS = ("caef", "dempster", "precursor")
RELIABILITIES = ("max", "upcol", "pignistic")


class Opinion(NamedTuple):
    """Dirichlet parameters, and the opinion they express.

    Attributes:
        alpha: (N, K, *), at least 1.
        belief: (N, K, *), in [0, 1).
        uncertainty: (N, 1, *), in (0, 1]; 1 without any evidence.
    """

    alpha: Tensor
    belief: Tensor
    uncertainty: Tensor


def evidence(logits: Tensor, activation: str = "softplus") -> Tensor:
    """Return the evidence that logits stand for, in float32, in [0, 1e4].

    Args:
        logits: any shape and precision.
        activation: "softplus", or "exp" of L tanh(logits / L), L = log 1e4: nearly exp of small
            logits, with a gradient at large ones.

    Raises:
        ValueError: unknown activation.
    """
    logits = logits.float()
    if activation == "softplus":
        return softplus(logits).clamp(max=MAX_EVIDENCE)
    if activation == "exp":
        limit = math.log(MAX_EVIDENCE)
        return (limit * (logits / limit).tanh()).exp()
    raise ValueError(f"Evidence must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")


def binary_logits(logits: Tensor) -> Tensor:
    """Give each region its own two channels, against and for: (B, R, *) to (B * R, 2, *).

    The evidence for a region comes from z, that against it from -z, so nnU-Net's single channel a
    region suffices; ignorance and conflict look alike for it.
    """
    return torch.stack((-logits, logits), 2).flatten(0, 1)


def opinion(logits: Tensor, activation: str = "softplus") -> Opinion:
    """Read logits (N, K, *) as an opinion.

    alpha = e + 1, s = sum alpha, b = e / s, u = K / s.

    Source: He et al. 2025 (MEDL), arXiv:2505.12418, Eq. 1; Sensoy et al. 2018, arXiv:1806.01768.
    """
    e = evidence(logits, activation)
    strength = e.sum(1, keepdim=True) + e.shape[1]
    return Opinion(e + 1, e / strength, e.shape[1] / strength)


def dirichlet_logits(logits: Tensor, regions: bool, activation: str = "softplus") -> Tensor:
    """Return logits whose softmax (sigmoid for regions) is the expected Dirichlet probability.

    So nnU-Net's losses work on p_k = alpha_k / sum alpha as they are.

    Args:
        logits: (B, K, *), from which the evidence comes.
        regions: channels are independent regions.
        activation: see `evidence`.

    Returns:
        (B, K, *) in float32: log alpha, or log alpha_for - log alpha_against.
    """
    log_alpha = evidence(logits, activation).log1p()
    return log_alpha - evidence(-logits, activation).log1p() if regions else log_alpha


def fuse_opinions(a: Opinion, b: Opinion, rule: str = "caef") -> tuple[Tensor, Tensor]:
    """Combine two opinions on the same voxels.

        b_k ~ b1_k b2_k + g (b1_k u2 + b2_k u1),    u ~ u1 u2,    normalised to sum b + u = 1

    Conflict is dropped and the rest normalised, as in Dempster's rule. Smaller g leaves more
    uncertainty, with caef more so the more classes there are: only the order of the fused
    uncertainty within a sample means something.

    Args:
        a: opinion, (N, K, *).
        b: another one on the same voxels; their order does not matter.
        rule: "caef" g = 1 / (K + 1); "precursor" g = 1 / K; "dempster" g = 1.

    Returns:
        belief (N, K, *) and uncertainty (N, 1, *); without any belief where two certain opinions
        contradict each other.

    Raises:
        ValueError: unknown rule.

    Source: He et al. 2025 (MEDL), arXiv:2505.12418, Eq. 3; precursor: He & Li, arXiv:2404.06177.
    """
    if rule not in FUSIONS:
        raise ValueError(f"Fusion rule must be one of {', '.join(FUSIONS)}; got {rule!r}.")
    classes = a.belief.shape[1]
    g = {"caef": 1 / (classes + 1), "precursor": 1 / classes, "dempster": 1.0}[rule]
    cross = a.belief * b.uncertainty + b.belief * a.uncertainty
    belief = a.belief * b.belief + g * cross
    unknown = a.uncertainty * b.uncertainty
    total = belief.sum(1, keepdim=True) + unknown
    apart = total < torch.finfo(total.dtype).tiny  # certain of different classes
    total = torch.where(apart, 1, total)
    return belief / total, torch.where(apart, 1, unknown / total)


@torch.no_grad()
def voxel_reliability(
    belief: Tensor,
    uncertainty: Tensor,
    valid: Tensor,
    mode: Literal["max", "upcol", "pignistic"] = "max",
) -> Tensor:
    """Return how far the decision of an opinion can be trusted, relative to its sample.

        U = exp(u) * (- sum_k b_k log2 b_k),    w = 1 - U / max U

    The belief does not sum to 1, so U falls again where nearly nothing is known; "pignistic"
    spreads the uncertainty over the classes inside the entropy and does not have that.

    Args:
        belief: (N, K, *).
        uncertainty: (N, 1, *).
        valid: (N, 1, *) bool, voxels that count.
        mode: "max" as above; "pignistic" with b_k + u / K in the entropy; "upcol" with sum U for
            max U, which is the published normaliser and leaves all weights near 1.

    Returns:
        (N, 1, *) in [0, 1], 0 where not valid; without gradient.

    Raises:
        ValueError: unknown mode.

    Source: He et al. 2025 (MEDL), arXiv:2505.12418, Eq. 4; Lu et al. 2023 (UPCoL).
    """
    if mode not in RELIABILITIES:
        raise ValueError(f"Reliability must be one of {', '.join(RELIABILITIES)}; got {mode!r}.")
    b = belief + uncertainty / belief.shape[1] if mode == "pignistic" else belief
    entropy = -torch.xlogy(b, b).sum(1, keepdim=True) / math.log(2)
    doubt = torch.where(valid, uncertainty.exp() * entropy, 0)
    axes = tuple(range(1, doubt.ndim))
    norm = doubt.sum(axes, keepdim=True) if mode == "upcol" else doubt.amax(axes, keepdim=True)
    return (1 - doubt / norm.clamp_min(1e-12)).clamp(0, 1) * valid


def fisher_evidential_loss(alpha: Tensor, label: Tensor, det_weight: float) -> Tensor:
    """Expected squared error of a Dirichlet distribution, classes weighted by Fisher information.

        sum_k [(y_k - a_k / s)^2 + a_k (s - a_k) / (s^2 (s + 1))] psi1(a_k)  -  c log |I(a)|
        log |I(a)| = sum_k log psi1(a_k) + log(1 - sum_k psi1(s) / psi1(a_k))

    Little evidence for a class makes its error weigh more; the determinant keeps evidence from
    growing without need and stands in for the KL term of other evidential losses.

    Args:
        alpha: (N, K, *), at least 1.
        label: (N, 1, *) integers in [0, K).
        det_weight: c.

    Returns:
        (N, 1, *) per voxel; gradient into alpha.

    Source: Deng et al. 2023 (I-EDL), arXiv:2303.02045, Eq. 10-16 and code; as used by He et al.
        2025 (MEDL), arXiv:2505.12418, Eq. 7.
    """
    strength = alpha.sum(1, keepdim=True)
    p = alpha / strength
    y = torch.zeros_like(alpha).scatter_(1, label, 1)
    information = torch.polygamma(1, alpha)
    squared = (y - p) ** 2 + p * (1 - p) / (strength + 1)
    rest = 1 - (torch.polygamma(1, strength) / information).sum(1, keepdim=True)
    log_det = information.log().sum(1, keepdim=True) + rest.clamp_min(1e-6).log()
    return (squared * information).sum(1, keepdim=True) - det_weight * log_det
