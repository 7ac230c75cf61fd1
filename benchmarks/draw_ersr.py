r"""What a trained SSLTrainerERSR makes of scans without masks: pseudo-labels, ellipses, selection.

Each row is an image: image, the teacher's probability with its outline at theta, the ellipse that
fits it, the refined pseudo-label; and whether it would be kept, all unlabelled images being one
batch. Whole images, where training has patches. Without --cases: those whose scores rank best,
median and worst, and the worst of those with an ellipse.

    python benchmarks/draw_ersr.py --picture docs/images/ersr_pseudo_labels.png \
        --model runs/nnUNet_results/Dataset001_X/SSLTrainerERSR+...__nnUNetSmallPlans__2d \
        --preprocessed runs/nnUNet_preprocessed/Dataset001_X
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    ellipse_distance,
    fit_ellipses,
    refine_by_ellipse,
    select_best,
    sigmoid_rampup,
)

MULTIPLE = 64  # sides are padded to one of it, which every stride of a network divides
COLOR = "tab:orange"


class Label(NamedTuple):
    """Pseudo-label of one image; all (H, W) but the scores, (2,)."""

    image: Tensor
    prob: Tensor
    distance: Tensor | None  # None without an ellipse
    refined: Tensor
    scores: Tensor


def main() -> None:
    """Load the model, label all scans, draw some."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="TRAINER__PLANS__2d")
    parser.add_argument("--preprocessed", type=Path, required=True, help="of the data set")
    parser.add_argument("--picture", type=Path, required=True, help="where to write it")
    parser.add_argument("--fold", default="all")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--cases", nargs="+", help="which scans without masks")
    parser.add_argument(
        "--stage", type=float, default=0.0, help="of the second stage, in [0, 1]: what is kept"
    )
    args = parser.parse_args()
    if not 0 <= args.stage <= 1:
        parser.error(f"--stage {args.stage} is not in [0, 1]")
    try:
        with tempfile.TemporaryDirectory() as logs:
            trainer = load_trainer(args.model, args.fold, args.checkpoint, args.preprocessed, logs)
        labels = label_all(trainer)
        kept, places = select(trainer, labels, args.stage)
        cases = args.cases or choose(labels, places)
        unknown = [case for case in cases if case not in labels]
        if unknown:
            raise UserError(f"{unknown[0]} is no scan without mask. There are: {list(labels)}.")
    except UserError as error:
        parser.error(str(error))
    draw({case: labels[case] for case in cases}, kept, places, args.picture, trainer.threshold)
    found = sum(label.distance is not None for label in labels.values())
    print(f"{len(labels)} scans, {found} with an ellipse, {sum(kept.values())} kept")
    print(f"Drawn: {', '.join(cases)}; {args.picture}")


def load_trainer(model: Path, fold: str, checkpoint: str, preprocessed: Path, logs: str) -> Any:
    """Return the trainer with the weights and scores of a checkpoint; `logs` gets its messages."""
    name, _, configuration = model.resolve().name.split("__")
    # nnU-Net reads these when it is imported, and makes folders where a trainer would train
    os.environ |= {"nnUNet_preprocessed": str(preprocessed.resolve().parent)}
    os.environ |= {"nnUNet_results": logs, "nnUNet_raw": logs}
    from nnunet_ssl.naming import resolve

    plans, dataset = (
        json.loads((model / file).read_text(encoding="utf-8"))
        for file in ("plans.json", "dataset.json")
    )
    cls: Any = resolve(name)
    if not hasattr(cls, "min_inside"):
        raise UserError(f"{model} was trained by {name}. Give a model of SSLTrainerERSR.")
    plans["continue_training"] = False
    trainer = cls(plans, configuration, fold, dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.load_checkpoint(str(model / f"fold_{fold}" / checkpoint))
    trainer.teacher.eval()
    return trainer


@torch.no_grad()
def label_all(trainer: Any) -> dict[str, Label]:
    """Return the refined pseudo-label of each scan without mask, as in a training step."""
    data = trainer._unlabeled_cases()
    return {case: label(trainer, data, case) for case in tqdm(data.identifiers, desc="Labelling")}


def label(trainer: Any, data: Any, case: str) -> Label:
    """Return the pseudo-label of one case."""
    values, seg, _, _ = data.load_case(case)
    image, outside = (torch.from_numpy(np.asarray(a[:])).float()[:, 0] for a in (values, seg))
    height, width = image.shape[1:]
    margin = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    x = pad(image, margin)[None]
    valid = pad(outside >= 0, margin)[None]
    head = trainer.head(trainer.teacher_prob(x))
    ellipses = fit_ellipses((head > trainer.threshold) & valid, valid, trainer.min_inside)
    distance = ellipse_distance(ellipses, x.shape[2:])
    _, mask = refine_by_ellipse(head, distance, trainer.threshold)
    trainer.select(head, mask, valid, ellipses.found)
    (scores,) = trainer._observed.pop("scores")

    def own(plane: Tensor) -> Tensor:
        return plane[0, 0, :height, :width]

    found = bool(ellipses.found)
    return Label(own(x), own(head), own(distance) if found else None, own(mask) & found, scores[0])


def select(
    trainer: Any, labels: dict[str, Label], stage: float
) -> tuple[dict[str, bool], dict[str, float]]:
    """Return which cases are kept, and their place by both scores, 0 best to 1 worst."""
    scores = torch.stack([label.scores for label in labels.values()])
    memory = trainer.companions["scores"]
    keep = trainer.keep_start + (1 - trainer.keep_start) * sigmoid_rampup(stage, 1)
    ranked, share = trainer.score != "released", trainer.boundary_share
    good = select_best(
        scores,
        memory.scores,
        memory.seen(),
        keep=keep,
        min_keep=trainer.min_keep,
        share=share,
        ranked=ranked,
    )
    kept = {
        case: bool(k) and label.distance is not None
        for (case, label), k in zip(labels.items(), good, strict=True)
    }
    parts = scores.argsort(0).argsort(0).float() if ranked else scores
    total = share * parts[:, 0] + (1 - share) * parts[:, 1]
    places = total.argsort().argsort() / max(1, len(total) - 1)
    return kept, dict(zip(labels, places.tolist(), strict=True))


def choose(labels: dict[str, Label], places: dict[str, float]) -> list[str]:
    """Return the best, the median and the worst by score, and the worst with an ellipse."""
    ordered = sorted(labels, key=places.__getitem__)
    fitted = [case for case in ordered if labels[case].distance is not None] or ordered
    return list(dict.fromkeys([ordered[0], ordered[len(ordered) // 2], fitted[-1], ordered[-1]]))


def draw(
    labels: dict[str, Label],
    kept: dict[str, bool],
    places: dict[str, float],
    path: Path,
    threshold: float,
) -> None:
    """Draw a row for each case."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(
        len(labels), 4, figsize=(10, 1.6 * len(labels)), layout="constrained", squeeze=False
    )
    titles = ("image", "teacher's probability", "fitted ellipse", "refined pseudo-label")
    for axis, title in zip(rows[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axes, (case, label) in zip(rows, labels.items(), strict=True):
        grey = {"cmap": "gray", "vmin": label.image.quantile(0.01)}
        grey["vmax"] = label.image.quantile(0.99)
        for axis in axes:
            axis.imshow(label.image, **grey)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[1].imshow(label.prob, cmap="gray", vmin=0, vmax=1)
        outlines = [(axes[1], label.prob, threshold), (axes[3], label.refined.float(), 0.5)]
        if label.distance is not None:
            outlines.append((axes[2], label.distance, 1.0))
        for axis, plane, level in outlines:
            if plane.min() < level < plane.max():
                axis.contour(plane, [level], colors=COLOR, linewidths=1.5)
        verdict = "kept" if kept[case] else "filtered"
        if label.distance is None:
            text = f"{case}\n{verdict}\nno ellipse"
        else:
            boundary, contour = label.scores.tolist()
            text = f"{case}\n{verdict}, rank {100 * places[case]:.0f} %"
            text += f"\nboundary {boundary:.2f}\ncontour {contour:.2f}"
        axes[0].set_ylabel(text, fontsize=9, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
