"""PROMISE12: prostate in T2 MRI, challenge of 2012; 50 annotated scans from several scanners.

Reads CaseXX.mhd and CaseXX_segmentation.mhd with their .raw files at any depth, for example

  TrainingData_Part1/Case00.mhd, Case00.raw, Case00_segmentation.mhd, Case00_segmentation.raw
  TestData/Case00.mhd, Case00.raw

Scans below a folder with `test` in its name and scans without mask are the challenge's test scans,
whose masks are not public. They are left out, or used without masks (--use-test-images; called
test_Case00, ..., as the numbers are used twice).

Splits: 35/5/10 training, validation and test scans, --labeled 3 or 7. The challenge gives none, and
papers differ; this is the one in the code of Chi et al. 2024, by number: Case00-34 train in this
order, 35-39 validate, 40-49 test. Numbers are no random order, so report several --draw, or give
another order with --list and --test.

Examples:
  nnunet_ssl convert PROMISE12 -i promise12 -d 50 --labeled 7
  nnunet_ssl convert PROMISE12 -i promise12 -d 51 --labeled 7 --draw 1

Source: https://promise12.grand-challenge.org (its terms); Litjens et al. 2014,
doi:10.1016/j.media.2013.12.002; split: Chi et al. 2024, arXiv:2405.00378
"""

import argparse
import re
from pathlib import Path

from nnunet_ssl.dataset_conversion.core import (
    Case,
    Release,
    Scan,
    add_split_options,
    add_test_images_option,
    run_script,
)
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    read_image,
)
from nnunet_ssl.errors import UserError

FILE = re.compile(r"case(\d+)(_segmentation)?\.mhd", re.IGNORECASE)
PARTS = {"train": range(35), "val": range(35, 40), "test": range(40, 50)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, and what happens to the challenge's test scans."""
    add_split_options(parser)
    add_test_images_option(parser, "the challenge's test scans")


def find(source: Path, options: argparse.Namespace) -> Release:
    """Pair scans and masks by number."""
    scans, masks, hidden = _sort(source)
    if not scans or not masks:
        raise UserError(
            f"{source} holds {len(scans)} CaseXX.mhd for training and {len(masks)} "
            f"CaseXX_segmentation.mhd: {describe_folder(source)}. Give the folder of the training "
            f"data."
        )
    alone = [name for name in masks if name not in scans]
    if alone:
        raise UserError(
            f"The scan beside {masks[alone[0]]} is missing, as of {listed(alone)}. Unpack the "
            f"training data again."
        )
    cases = [Case(name, (scans[name],), masks[name]) for name in sorted(masks)]
    splits = {k: [f"Case{i:02d}" for i in numbers] for k, numbers in PARTS.items()}
    notes = []
    if options.use_test_images:
        if not hidden:
            raise UserError(f"{source} holds no test scans. Drop --use-test-images.")
        cases += [Case(name, (path,)) for name, path in hidden.items()]
        splits["train"] += hidden
    elif hidden:
        notes = [f"{len(hidden)} test scan(s) of the challenge left out (--use-test-images)."]
    return Release(
        name="PROMISE12",
        cases=cases,
        channels=["T2-MRI"],
        labels={"background": 0, "prostate": 1},
        splits=splits,
        list_name="Chi et al. 2024, by number, 35/5/10",
        about={
            "reference": "Litjens et al. 2014, doi:10.1016/j.media.2013.12.002",
            "licence": "terms at promise12.grand-challenge.org",
        },
        notes=notes,
    )


def _sort(source: Path) -> tuple[dict[str, Path], dict[str, Path], dict[str, Path]]:
    """Return name -> file of training scans, their masks, and test scans."""
    masks: dict[str, Path] = {}
    images: dict[str, list[Path]] = {}
    hidden: list[tuple[str, Path]] = []
    for path in files_below(source, ".mhd"):
        if not (match := FILE.fullmatch(path.name)):
            continue
        name = f"Case{int(match[1]):02d}"
        if not _in_test(path.relative_to(source)):
            if match[2]:
                _add(masks, name, path)
            else:
                images.setdefault(name, []).append(path)
        elif not match[2]:
            hidden.append((name, path))
    scans: dict[str, Path] = {}
    for name, paths in images.items():
        beside = [p for p in paths if name in masks and p.parent == masks[name].parent]
        for path in paths:
            if name in masks and (not beside or path in beside):
                _add(scans, name, path)
            else:
                hidden.append((name, path))
    tests: dict[str, Path] = {}
    for name, path in hidden:
        _add(tests, f"test_{name}", path)
    return scans, masks, tests


def _in_test(path: Path) -> bool:
    return any("test" in part.lower() for part in path.parent.parts)


def _add(found: dict[str, Path], name: str, path: Path) -> None:
    if name in found:
        raise UserError(f"{found[name]} and {path} are both {name}. Remove one copy.")
    found[name] = path


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one scan."""
    mask = None if case.mask is None else read_image(case.mask)
    return Scan([read_image(case.images[0])], mask)


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
