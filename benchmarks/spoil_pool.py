"""A copy of a fully annotated data set in which every second unlabelled scan is inverted.

For the question whether scans of another kind make the default worse than its twin. The scans of a
list that are neither annotated in draw 0 (the first N) nor test cases (the last M) are the pool;
its first, third, fifth ... scan gets intensities max + min - x. Masks stay as they are: the runner
hides those of the pool.

    python benchmarks/spoil_pool.py Dataset004_Hippocampus 104 LIST --labeled 4 --test 40

writes Dataset104_HippocampusHalfInverted into nnUNet_raw; LIST is specs/lists/hippocampus.txt, and
specs/hippocampus_inverted.yaml runs on it.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_ssl.dataset_conversion.reading import read_list
from nnunet_ssl.io import environment_folder


def inverted(image: np.ndarray) -> np.ndarray:
    """Return the image with bright and dark exchanged, of the same type and range."""
    exact = image.astype(np.int64) if image.dtype.kind in "iu" else image
    return (exact.max() + exact.min() - exact).astype(image.dtype)


def pool_of(listed: Path, labeled: int, test: int) -> list[str]:
    """Return the cases of a list between the first `labeled` and the last `test`."""
    cases = read_list(listed)
    return cases[labeled : len(cases) - test]


def spoil(source: Path, target: Path, cases: list[str]) -> None:
    """Copy a data set and invert these cases of the copy, all channels.

    Raises:
        FileExistsError: the copy is there already.
    """
    shutil.copytree(source, target)
    for case in tqdm(cases, "inverting"):
        for path in sorted((target / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9].*")):
            image = sitk.ReadImage(str(path))
            changed = sitk.GetImageFromArray(inverted(sitk.GetArrayFromImage(image)))
            changed.CopyInformation(image)
            path.unlink()  # it may be a link to the source's file
            sitk.WriteImage(changed, str(path))


def main() -> None:
    """Read the arguments and write the copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder in nnUNet_raw")
    parser.add_argument("id", type=int, help="free id of the copy")
    parser.add_argument("list", type=Path, help="all cases in their order, one a line")
    parser.add_argument("--labeled", type=int, required=True, help="of draw 0")
    parser.add_argument("--test", type=int, required=True, help="last cases of the list")
    args = parser.parse_args()
    raw = environment_folder("nnUNet_raw")
    name = args.source.partition("_")[2]
    target = raw / f"Dataset{args.id:03d}_{name}HalfInverted"
    spoil(raw / args.source, target, pool_of(args.list, args.labeled, args.test)[::2])
    print(target)


if __name__ == "__main__":
    main()
