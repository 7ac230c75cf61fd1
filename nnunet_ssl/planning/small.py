"""Plans for a small network: demo, tests, CPU."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any


def shrink_plans(
    plans: Mapping[str, Any],
    configuration: str,
    features: Sequence[int],
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    convs_per_stage: int = 1,
) -> dict[str, Any]:
    """Return plans whose network for one configuration has `len(features)` stages.

    Preprocessed data stay valid: neither spacing nor normalisation changes. Works for
    PlainConvUNet and ResidualEncoderUNet plans.

    Args:
        plans: nnU-Net's plans; not changed.
        configuration: "2d", "3d_lowres" or "3d_fullres".
        features: channels of each stage, at least three: deep supervision gives the lowest scale no
            weight, so two stages would have no loss.
        patch_size: voxels, (H, W) or (D, H, W); None keeps it.
        batch_size: None keeps it.
        convs_per_stage: convolutions (or residual blocks) of each stage.

    Raises:
        ValueError: more stages than the planned network has, or a patch of another dimension.
    """
    new = deepcopy(dict(plans))
    config = new["configurations"][configuration]
    kwargs = config["architecture"]["arch_kwargs"]
    stages = len(features)
    if not 3 <= stages <= kwargs["n_stages"]:
        raise ValueError(
            f"{stages} stages asked for; the plans of {configuration} have {kwargs['n_stages']} "
            f"and at least 3 are needed"
        )
    size = [int(i) for i in (config["patch_size"] if patch_size is None else patch_size)]
    if len(size) != len(config["patch_size"]):
        raise ValueError(f"patch_size {size} has not the dimension of {config['patch_size']}")

    strides = []
    remaining = size
    for planned in kwargs["strides"][:stages]:
        # an axis is halved only where it stays whole and larger than one voxel
        stride = [
            s if n % s == 0 and n // s > 1 else 1 for n, s in zip(remaining, planned, strict=True)
        ]
        remaining = [n // s for n, s in zip(remaining, stride, strict=True)]
        strides.append(stride)

    blocks = "n_conv_per_stage" if "n_conv_per_stage" in kwargs else "n_blocks_per_stage"
    kwargs.update(
        {
            "n_stages": stages,
            "features_per_stage": [int(f) for f in features],
            "kernel_sizes": kwargs["kernel_sizes"][:stages],
            "strides": strides,
            blocks: [convs_per_stage] * stages,
            "n_conv_per_stage_decoder": [convs_per_stage] * (stages - 1),
        }
    )
    config["patch_size"] = size
    if batch_size is not None:
        config["batch_size"] = int(batch_size)
    return new
