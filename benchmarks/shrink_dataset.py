"""A copy of a fully annotated data set at a fraction of its resolution.

For trainings on a CPU whose patch still holds most of a scan or slice. Every X x Y x Z voxels
become one: their mean in the images, their most frequent label in the masks. What remains at the
far ends is cut off.

    python benchmarks/shrink_dataset.py Dataset011_LA_cropped 311 3 3 3

writes Dataset311_LA_croppedBy3x3x3 into nnUNet_raw; specs/la_3d_cpu.yaml runs on it. Files that do
not tell their spacing say 1 x 1 x 1 mm: shrunken in the plane alone, their slices would seem thin,
and nnU-Net would plan 2D across them. `--spacing` tells the copy's.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_ssl.io import environment_folder


def shrunken_mask(mask: sitk.Image, factors: list[int]) -> sitk.Image:
    """Return the most frequent label of each block; of equally frequent ones the smallest."""
    labels = np.unique(sitk.GetArrayViewFromImage(mask))
    shares = [
        sitk.BinShrink(sitk.Cast(mask == int(label), sitk.sitkFloat32), factors) for label in labels
    ]
    most = np.argmax([sitk.GetArrayViewFromImage(share) for share in shares], axis=0)
    shrunken = sitk.GetImageFromArray(labels[most].astype(np.uint8))
    shrunken.CopyInformation(shares[0])
    return shrunken


def shrink(
    source: Path, target: Path, factors: list[int], spacing: list[float] | None = None
) -> None:
    """Write a data set with shrunken images and masks of all training cases.

    Args:
        source: folder in nnUNet_raw.
        target: made here.
        factors: voxels along x, y and z that become one.
        spacing: mm along x, y and z, of every case of the copy; by default that of its source
            times `factors`.

    Raises:
        FileExistsError: the copy is there already.
    """
    dataset = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    images, masks = target / "imagesTr", target / "labelsTr"
    target.mkdir()
    images.mkdir()
    masks.mkdir()
    for name in ("dataset.json", "conversion.json", "cases.csv"):
        if (source / name).is_file():
            shutil.copy(source / name, target)
    for path in tqdm(sorted((source / "imagesTr").glob(f"*{dataset['file_ending']}")), "images"):
        image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
        write(sitk.BinShrink(image, factors), images / path.name, spacing)
    for path in tqdm(sorted((source / "labelsTr").glob(f"*{dataset['file_ending']}")), "masks"):
        mask = shrunken_mask(sitk.ReadImage(str(path)), factors)
        write(mask, masks / path.name, spacing)


def write(image: sitk.Image, path: Path, spacing: list[float] | None) -> None:
    """Write an image, with another spacing where one is given."""
    if spacing is not None:
        image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def main() -> None:
    """Read the arguments and write the copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder in nnUNet_raw, 3D")
    parser.add_argument("id", type=int, help="free id of the copy")
    help_text = "voxels along x, y and z that become one"
    parser.add_argument("factors", type=int, nargs=3, metavar=("X", "Y", "Z"), help=help_text)
    parser.add_argument("--spacing", type=float, nargs=3, help="mm along x, y and z of the copy")
    args = parser.parse_args()
    raw = environment_folder("nnUNet_raw")
    name = args.source.partition("_")[2] + "By" + "x".join(map(str, args.factors))
    target = raw / f"Dataset{args.id:03d}_{name}"
    shrink(raw / args.source, target, args.factors, args.spacing)
    print(target)


if __name__ == "__main__":
    main()
