"""How well ERSR's scores of a predicted head tell its error: rank correlations on corrupted heads.

The heads are annotations of HC18 at 224 x 224 pixels, as in the paper. Each is corrupted twelve
times: a smoothly displaced outline, fine or coarse; a bite; a bump; another size; always with a
blurred edge and noise. A score is as good as its rank correlation with 1 - Dice to the annotation.
The truth is elliptic here, which flatters the distance to the ellipse ("residual").

    python benchmarks/shape_scores.py --annotations training_set --picture docs/images/ersr.png

Results: benchmarks/results/shape_scores.json. The picture shows one corrupted head, its ellipse,
and the two mirror images that the student gets.
"""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.stats import rankdata, spearmanr
from skimage.io import imread
from skimage.transform import resize
from tqdm import tqdm

from nnunet_ssl.ellipse import largest_piece
from nnunet_ssl.functional import (
    boundary_excess,
    contour_roughness,
    ellipse_distance,
    fit_ellipses,
    mirror_at,
    mirrored_image,
    refine_by_ellipse,
    released_scores,
)
from nnunet_ssl.io import write_json

SIZE, CASES, REPEATS, THRESHOLD = 224, 100, 12, 0.6
RESULTS = Path(__file__).parent / "results" / "shape_scores.json"


def main() -> None:
    """Corrupt, score, correlate; write the results and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", type=Path, required=True, help="*_Annotation.png of HC18")
    parser.add_argument("--picture", type=Path, help="where to write the picture")
    args = parser.parse_args()
    files = sorted(args.annotations.glob("*_Annotation.png"))
    files = files[:: max(1, len(files) // CASES)][:CASES]
    if not files:
        parser.error(f"{args.annotations} holds no *_Annotation.png")
    rng = np.random.default_rng(0)
    rows = [
        score(head, corrupted(head, rng))
        for head in map(read_head, tqdm(files, desc="Heads"))
        for _ in range(REPEATS)
    ]
    rows = [row for row in rows if row is not None]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    error = columns.pop("error")
    columns["released, both"] = (columns["released boundary"] + columns["released contour"]) / 2
    ranks = [rankdata(columns[f"corrected {part}"]) for part in ("boundary", "contour")]
    columns["corrected, both"] = np.mean(ranks, axis=0)
    content = {
        "what": __doc__.splitlines()[0],
        "heads": len(files),
        "samples": len(rows),
        "mean_error": round(float(error.mean()), 3),
        "rank_correlation": {
            name: round(float(spearmanr(error, values).statistic), 2)
            for name, values in columns.items()
        },
        "command": "python benchmarks/shape_scores.py --annotations training_set",
        "versions": {n: version(n) for n in ("numpy", "scipy", "torch")}
        | {"python": platform.python_version()},
    }
    write_json(content, RESULTS)
    print(content["rank_correlation"])
    if args.picture:
        draw(files[len(files) // 3], args.picture)


def read_head(path: Path) -> np.ndarray:
    """Return the filled annotation, (SIZE, SIZE) bool."""
    lines = imread(path)
    lines = lines[..., 0] if lines.ndim == 3 else lines
    return resize(largest_piece(lines > 0).astype(float), (SIZE, SIZE)) > 0.5


def smooth(rng: np.random.Generator, width: float) -> np.ndarray:
    """Return a random field of unit variance, smooth over so many pixels."""
    field = gaussian_filter(rng.normal(size=(SIZE, SIZE)), width)
    return field / field.std()


def corrupted(head: np.ndarray, rng: np.random.Generator, kind: int | None = None) -> np.ndarray:
    """Return a soft prediction of the head with an error, (SIZE, SIZE) in [0, 1]."""
    depth = distance_transform_edt(head) - distance_transform_edt(~head)  # inside is positive
    strength = rng.uniform()
    edge = np.argwhere(np.abs(depth) < 2)
    center = edge[rng.integers(len(edge))]
    around = np.hypot(*(np.indices(head.shape) - center[:, None, None]))
    changed = (
        lambda: depth + 25 * strength * smooth(rng, 12),
        lambda: depth + 10 * strength * smooth(rng, 4),
        lambda: np.minimum(depth, around - 40 * strength),
        lambda: np.maximum(depth, 40 * strength - around),
        lambda: depth + 15 * strength * rng.normal() + 10 * strength * smooth(rng, 25),
    )[rng.integers(5) if kind is None else kind]()
    noise = rng.uniform(0, 0.6) * smooth(rng, 2)
    return 1 / (1 + np.exp(-(changed / rng.uniform(1, 6) + noise)))


def score(head: np.ndarray, prob: np.ndarray) -> dict[str, float] | None:
    """Return the error and all scores of a prediction; None without an ellipse."""
    p = torch.from_numpy(prob).float()[None, None]
    valid = torch.ones_like(p, dtype=torch.bool)
    ellipses = fit_ellipses(p > THRESHOLD, valid)
    if not ellipses.found.all():
        return None
    _, refined = refine_by_ellipse(p, ellipse_distance(ellipses, p.shape[2:]), THRESHOLD)
    decided = p > 0.5
    boundary, contour = released_scores(p)[0].tolist()
    return {
        "error": 1 - dice(decided.numpy()[0, 0], head),
        "released boundary": boundary,
        "released contour": contour,
        "corrected boundary": boundary_excess(p, valid).item(),
        "corrected contour": contour_roughness(decided, valid).item(),
        "residual": 1 - dice(decided.numpy(), refined.numpy()),
    }


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Dice of two masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def draw(annotation: Path, path: Path) -> None:
    """Draw one head: prediction, ellipse, refined pseudo-label, mirror images."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    image = imread(annotation.with_name(annotation.name.replace("_Annotation", "")))
    image = resize(image[..., 0] if image.ndim == 3 else image, (SIZE, SIZE), anti_aliasing=True)
    rng = np.random.default_rng(3)
    prob = np.minimum(*(corrupted(read_head(annotation), rng, kind) for kind in (1, 2)))
    p, x = (torch.from_numpy(a).float()[None, None] for a in (prob, image))
    ellipses = fit_ellipses(p > THRESHOLD, torch.ones_like(p, dtype=torch.bool))
    distance = ellipse_distance(ellipses, p.shape[2:])
    _, refined = refine_by_ellipse(p, distance, THRESHOLD)
    mirror = mirror_at(ellipses, p.shape[2:])
    torch.manual_seed(4)
    halves = [
        mirrored_image(x, refined, torch.ones_like(refined), mirror, side, True)
        for side in ("left", "right")
    ]
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), layout="constrained")
    titles = (
        "image",
        "prediction, ellipse, axis",
        "refined pseudo-label",
        "left half",
        "right half",
    )
    shown = (image, prob, refined[0, 0].float().numpy(), *(h[0, 0].numpy() for h in halves))
    for axis, title, values in zip(axes, titles, shown, strict=True):
        axis.imshow(values, cmap="gray", vmin=0, vmax=1 if title != "image" else None)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    axes[1].contour(distance[0, 0].numpy(), [1.0], colors="tab:orange", linewidths=1.2)
    (row, column), (down, right) = ellipses.center[0].tolist(), ellipses.along[0].tolist()
    long = ellipses.axes[0, 0].item()
    ends = [[c - long * d, c + long * d] for c, d in ((column, right), (row, down))]
    axes[1].plot(*ends, color="tab:orange", linewidth=1.0)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
