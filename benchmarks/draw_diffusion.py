r"""What the diffusion network of a trained SSLTrainerDiffCL draws over its sampling steps.

One patch of one case: image and annotation; at each step the noisy map that the network sees (its
strongest foreground channel) and what it takes the clean map for, with the Dice to the annotation;
last the student, which predicts. In 3D the slice with most foreground is shown.

    python benchmarks/draw_diffusion.py --picture docs/images/diff_cl.png \
        --checkpoint SSLTrainerDiffCL__nnUNetPlans__2d/fold_all/checkpoint_final.pth \
        --images case_0000.nii.gz --truth case.nii.gz
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.checkpoint import load_checkpoint
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import Sampled, ddim_steps, hard_labels, to_prob
from nnunet_ssl.naming import resolve
from nnunet_ssl.trainers import SSLTrainerDiffCL

COLUMNS = 6  # steps that are shown at most, the first and the last among them
COLORS = ("tab:orange", "tab:cyan", "tab:green", "tab:pink", "tab:olive")


class Model(NamedTuple):
    """Both networks of a checkpoint, and what their plan says."""

    trainer: type[SSLTrainerDiffCL]
    student: Any
    diffusion: Any
    plans: PlansManager
    configuration: Any
    dataset: dict
    labels: Any


class Patch(NamedTuple):
    """One patch: image (1, C, *), masks of the classes or regions (K, *), the slice to show."""

    image: Tensor
    truth: Tensor
    shown: int


def main() -> None:
    """Load, sample, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="with training state")
    parser.add_argument("--images", nargs="+", required=True, help="channels of a case, in order")
    parser.add_argument("--truth", required=True, help="its annotation")
    parser.add_argument("--picture", type=Path, required=True, help="where to write it")
    parser.add_argument("--steps", type=int, help="of the sampler; as in training by default")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    try:
        model = load_model(args.checkpoint)
        patch = read_patch(model, args.images, args.truth)
    except UserError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    sampled = sample(model, patch, args.steps or model.trainer.ddim_steps)
    with torch.no_grad():
        student = to_prob(model.student(patch.image), model.labels.has_regions)
    draw(model, patch, sampled, student, args.picture)
    print(f"{len(sampled)} steps drawn: {args.picture}")


def load_model(path: Path) -> Model:
    """Return both networks of a checkpoint, for inference.

    Raises:
        UserError: damaged, exported, or of another trainer.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("ssl_state", {})
    cls: Any = resolve(state["trainer"]) if state else object
    if not issubclass(cls, SSLTrainerDiffCL):
        raise UserError(
            f"{path} holds no diffusion network. Give a checkpoint that SSLTrainerDiffCL wrote in "
            f"training, not an exported one."
        )
    init = checkpoint["init_args"]
    plans = PlansManager(init["plans"])
    configuration = plans.get_configuration(init["configuration"])
    labels = plans.get_label_manager(init["dataset_json"])
    channels = determine_num_input_channels(plans, configuration, init["dataset_json"])
    size = plans, configuration, channels, labels.num_segmentation_heads, False
    student = cls.build_network_architecture(*size)
    student.load_state_dict(state["student"])
    diffusion = cls.build_diffusion_network(*size)
    diffusion.load_state_dict(state["companions"]["diffusion"])
    return Model(
        cls, student.eval(), diffusion.eval(), plans, configuration, init["dataset_json"], labels
    )


def read_patch(model: Model, images: Sequence[str], truth: str) -> Patch:
    """Preprocess a case as nnU-Net does; return the patch around its foreground.

    Raises:
        UserError: a file is missing, or the annotation is empty.
    """
    for file in (*images, truth):
        if not Path(file).is_file():
            raise UserError(f"{file} does not exist.")
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    data, seg, _ = preprocessor.run_case(
        list(images), truth, model.plans, model.configuration, model.dataset
    )
    sets = model.labels.foreground_regions if model.labels.has_regions else None
    values = [np.atleast_1d(v) for v in sets or model.labels.foreground_labels]
    masks = np.stack([np.isin(seg[0], v) for v in values])
    foreground: Any = masks.any(0)
    if not foreground.any():
        raise UserError(f"{truth} has no foreground. Give another case.")
    size = list(model.configuration.patch_size)
    if len(size) == 2:
        plane = int(foreground.sum((1, 2)).argmax())
        data, masks, foreground = data[:, plane], masks[:, plane], foreground[plane]
    cut, margin = [], [(0, 0)]
    for axis, length in enumerate(size):
        middle = np.flatnonzero(foreground.any(tuple(set(range(len(size))) - {axis})))
        start = (int(middle[0] + middle[-1] + 1) - length) // 2
        start = min(max(start, 0), max(foreground.shape[axis] - length, 0))
        cut.append(slice(start, start + length))
        margin.append((0, max(length - foreground.shape[axis], 0)))
    box = (slice(None), *cut)
    data, masks = (np.pad(a[box], margin) for a in (data, masks))
    shown = int(masks.any(0).sum((1, 2)).argmax()) if len(size) == 3 else 0
    return Patch(torch.from_numpy(data).float()[None], torch.from_numpy(masks), shown)


def sample(model: Model, patch: Patch, steps: int) -> list[Sampled]:
    """Return the steps of the sampler on a patch, from noise of the global generator."""
    noise = torch.randn(1, model.labels.num_segmentation_heads, *patch.image.shape[2:])
    denoised = ddim_steps(
        lambda state, time: model.diffusion(patch.image, state, time),
        noise,
        model.diffusion.alpha_bars,
        steps,
        model.labels.has_regions,
    )
    return list(denoised)


def foreground_masks(model: Model, prob: Tensor) -> Tensor:
    """Return the decision as masks of the foreground classes or regions, (K, *) bool."""
    decision = hard_labels(prob, model.labels.has_regions)[0]
    if model.labels.has_regions:
        return decision
    return torch.cat([decision == label for label in range(1, prob.shape[1])])


def dice(found: Tensor, truth: Tensor) -> float:
    """Return the mean Dice of the classes that are annotated in the patch, both (K, *) bool."""
    found, truth = found.flatten(1), truth.flatten(1)
    total = found.sum(1) + truth.sum(1)
    return float((2 * (found & truth).sum(1) / total.clamp_min(1))[truth.any(1)].mean())


def draw(
    model: Model, patch: Patch, sampled: Sequence[Sampled], student: Tensor, path: Path
) -> None:
    """Draw image and annotation, the steps, and the student."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = min(COLUMNS, len(sampled))
    chosen = np.linspace(0, len(sampled) - 1, number).round().astype(int)

    def plane(volume: Tensor) -> Tensor:
        return volume[patch.shown] if volume.ndim == 3 else volume

    image = plane(patch.image[0, 0])
    shown = {"cmap": "gray", "vmin": image.quantile(0.01), "vmax": image.quantile(0.99)}
    first = 0 if model.labels.has_regions else 1  # behind background

    def outlines(axis: Any, masks: Tensor, title: str) -> None:
        axis.imshow(image, **shown)
        for k, mask in enumerate(masks):
            inside = plane(mask).float()
            if 0 < inside.mean() < 1:
                axis.contour(inside, [0.5], colors=COLORS[k % len(COLORS)], linewidths=1.5)
        axis.set_xlabel(title, fontsize=9)

    width = 1.6 * (number + 2)
    figure, rows = plt.subplots(2, number + 2, figsize=(width, 3.5), layout="constrained")
    for axis in rows.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    rows[0, 0].imshow(image, **shown)
    rows[0, 0].set_title("image", fontsize=9)
    outlines(rows[1, 0], patch.truth, "annotation")
    for column, i in enumerate(chosen, 1):
        step = sampled[i]
        strongest = plane(step.state[0, first:].amax(0))
        rows[0, column].imshow(strongest, cmap="gray", vmin=-2, vmax=2)
        rows[0, column].set_title(f"noisy map, t = {step.time}", fontsize=9)
        masks = foreground_masks(model, step.prob)
        outlines(rows[1, column], masks, f"Dice {dice(masks, patch.truth):.2f}")
    rows[0, -1].imshow(plane(student[0, first:].amax(0)), cmap="gray", vmin=0, vmax=1)
    rows[0, -1].set_title("student", fontsize=9)
    masks = foreground_masks(model, student)
    outlines(rows[1, -1], masks, f"Dice {dice(masks, patch.truth):.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
