"""A copy of a fully annotated data set at a fraction of its resolution.

For 3D trainings on a CPU whose patch still holds most of a scan. Every N x N x N voxels become one:
their mean in the images, their most frequent label in the masks. What remains at the far ends is
cut off.

    python benchmarks/shrink_dataset.py Dataset011_LA_cropped 311 3

writes Dataset311_LA_croppedBy3 into nnUNet_raw; specs/la_3d_cpu.yaml runs on it.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_ssl.io import environment_folder


def shrunken_mask(mask: sitk.Image, factor: int) -> sitk.Image:
    """Return the most frequent label of each block; of equally frequent ones the smallest."""
    labels = np.unique(sitk.GetArrayViewFromImage(mask))
    shares = [
        sitk.BinShrink(sitk.Cast(mask == int(label), sitk.sitkFloat32), [factor] * 3)
        for label in labels
    ]
    most = np.argmax([sitk.GetArrayViewFromImage(share) for share in shares], axis=0)
    shrunken = sitk.GetImageFromArray(labels[most].astype(np.uint8))
    shrunken.CopyInformation(shares[0])
    return shrunken


def shrink(source: Path, target: Path, factor: int) -> None:
    """Write a data set with shrunken images and masks of all training cases.

    Raises:
        FileExistsError: the copy is there already.
    """
    dataset = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    images, masks = target / "imagesTr", target / "labelsTr"
    target.mkdir()
    images.mkdir()
    masks.mkdir()
    for name in ("dataset.json", "conversion.json"):
        shutil.copy(source / name, target)
    for path in tqdm(sorted((source / "imagesTr").glob(f"*{dataset['file_ending']}")), "images"):
        image = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
        sitk.WriteImage(sitk.BinShrink(image, [factor] * 3), str(images / path.name))
    for path in tqdm(sorted((source / "labelsTr").glob(f"*{dataset['file_ending']}")), "masks"):
        mask = shrunken_mask(sitk.ReadImage(str(path)), factor)
        sitk.WriteImage(mask, str(masks / path.name))


def main() -> None:
    """Read the arguments and write the copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder in nnUNet_raw, 3D")
    parser.add_argument("id", type=int, help="free id of the copy")
    parser.add_argument("factor", type=int, help="voxels along each axis that become one")
    args = parser.parse_args()
    raw = environment_folder("nnUNet_raw")
    target = raw / f"Dataset{args.id:03d}_{args.source.partition('_')[2]}By{args.factor}"
    shrink(raw / args.source, target, args.factor)
    print(target)


if __name__ == "__main__":
    main()
