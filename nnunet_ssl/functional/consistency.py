"""Squared distances between soft predictions."""

from torch import Tensor

from nnunet_ssl.functional.joint import shared_count


def prob_mse(prob: Tensor, target_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance between probabilities.

    Args:
        prob: student, (B, C, *), in [0, 1].
        target_prob: (B, C, *), in [0, 1]; detached here.
        mask: (B, 1, *) or (B, C, *), voxels to count (bool, or weights >= 0); None counts all.

    Returns:
        Scalar mean over counted voxels and classes, float32; 0 if none count.

    Raises:
        ValueError: shapes differ.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780, Sec. 2.
    """
    if prob.shape != target_prob.shape:
        raise ValueError(
            f"Prediction {tuple(prob.shape)} and target {tuple(target_prob.shape)} differ in shape."
        )
    squared = (prob.float() - target_prob.detach().float()) ** 2
    if mask is None:
        return squared.mean()
    if mask.shape not in (prob.shape, (prob.shape[0], 1, *prob.shape[2:])):
        raise ValueError(
            f"Mask {tuple(mask.shape)} does not fit the prediction {tuple(prob.shape)}: "
            "expected the same shape with 1 or all channels."
        )
    weight = mask.detach().float().expand_as(squared)
    return (squared * weight).sum() / shared_count(weight.sum())


def softmax_mse(logits: Tensor, target_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance between class probabilities.

    Its gradient vanishes where the student is already sure, right or wrong.

    Args:
        logits: student, (B, C, *), before softmax.
        target_prob: (B, C, *), in [0, 1]; detached here.
        mask: (B, 1, *), voxels to count; None counts all.

    Returns:
        Scalar mean over counted voxels and classes, float32; 0 if none count.

    Raises:
        ValueError: shapes differ.

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780, Sec. 2.
    """
    return prob_mse(logits.float().softmax(1), target_prob, mask)


def sigmoid_mse(logits: Tensor, target_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance between region probabilities: `softmax_mse` for region datasets.

    Args:
        logits: student, (B, R, *), before the sigmoid.
        target_prob: (B, R, *), in [0, 1]; detached here.
        mask: (B, 1, *) or (B, R, *), voxels to count; None counts all.

    Returns:
        Scalar mean over counted voxels and regions, float32; 0 if none count.

    Raises:
        ValueError: shapes differ.
    """
    return prob_mse(logits.float().sigmoid(), target_prob, mask)
