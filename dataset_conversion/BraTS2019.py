"""BraTS2019: brain tumours in MRI of four kinds, challenge of 2019, 335 scans; also that of 2020.

Reads, at any depth (HGG/, LGG/, a folder per scan, or all in one), .nii and .nii.gz:

  BraTS19_TCIA02_370_1_flair.nii, ..._t1.nii, ..._t1ce.nii, ..._t2.nii, ..._seg.nii
  BraTS20_Training_001_flair.nii, ...      one mask of 2020 has another name (W39_..._Segm.nii)

and with --flair-whole-tumour also SSL4MIS's BraTS19_TCIA02_370_1.h5. The challenge's validation
scans have no masks and are skipped.

Masks: 1 necrosis and other core that does not enhance, 2 oedema, 4 enhancing tumour, which becomes
3 (turn predictions back before submitting). Trained are overlapping regions, as the challenge
scores them: whole tumour (1, 2, 3), tumour core (1, 3), enhancing tumour (3). Many low-grade
tumours have no enhancing part.

With --flair-whole-tumour the data set is BraTS2019FlairWT, what most semi-supervised papers use:
FLAIR alone, whole tumour against background. The h5 files of it are cut to the brain (not around
the mask), clipped at the upper 0.1 % and z-scored, and marked `cropped`; their voxels are 1 mm as
in the scans. From NIfTI files the scans stay whole and the intensities as they are: nnU-Net cuts
and z-scores them.

Splits: of 2019 those of SSL4MIS, 250 training scans in their order (--labeled 25 or 50), 25 for
validation, 60 for test. Of 2020 none is published: order by hash of the name (the last numbers are
low-grade tumours), --test N holds N out, --list FILE gives another order. Most scans of 2019 are
in 2020 again under other names: do not train on one and test on the other.

cases.csv, of training scans below HGG/ or LGG/: high_grade (1 or 0).

Examples:
  nnunet_ssl convert BraTS2019 -i MICCAI_BraTS_2019_Data_Training -d 43 --labeled 25
  nnunet_ssl convert BraTS2019 -i MICCAI_BraTS_2019_Data_Training -d 44 --labeled 25 \
      --flair-whole-tumour
  nnunet_ssl convert BraTS2019 -i MICCAI_BraTS2020_TrainingData -d 45 --test 60 --labeled 30

Source: https://www.med.upenn.edu/cbica/brats-2019/ (research use, on registration); Menze et al.
2015, doi:10.1109/TMI.2014.2377694; Bakas et al. 2017, doi:10.1038/sdata.2017.117; splits: SSL4MIS,
Luo et al.
"""

import argparse
import re
from pathlib import Path

from nnunet_ssl.dataset_conversion.core import (
    CROPPED,
    Case,
    Release,
    Scan,
    add_split_options,
    run_script,
)
from nnunet_ssl.dataset_conversion.literature import read_h5
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    published_list,
    read_image,
)
from nnunet_ssl.dataset_conversion.selection import by_hash
from nnunet_ssl.errors import UserError

CHANNELS = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
FILE = re.compile(r"(BraTS\w+?)_(flair|t1|t1ce|t2|seg)\.nii(\.gz)?", re.IGNORECASE)
REGIONS = {
    "background": 0,
    "whole tumour": [1, 2, 3],
    "tumour core": [1, 3],
    "enhancing tumour": [3],
}
CLASS_ORDER = [2, 1, 3]  # what is whole tumour but no core is 2, core that does not enhance is 1
HINTS = {"labels": "Take the masks of BraTS 2019 or 2020; the enhancing tumour is 4 there."}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits, and the protocol of the literature."""
    add_split_options(parser)
    parser.add_argument(
        "--flair-whole-tumour",
        action="store_true",
        help="FLAIR alone, whole tumour alone, as most semi-supervised papers",
    )


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the scans of one year and their files."""
    scans, notes = _scans(source)
    packed = [p for p in files_below(source, ".h5") if p.stem.startswith("BraTS19_")]
    if not scans and not packed:
        raise UserError(
            f"{source} holds no BraTS19_..._flair.nii or BraTS20_..._flair.nii, but "
            f"{describe_folder(source)}. Give the folder with HGG and LGG, or with a folder per "
            f"scan."
        )
    if scans and packed:
        raise UserError(
            f"{source} holds two releases, {describe_folder(source)}. Give the folder of one."
        )
    if packed and not options.flair_whole_tumour:
        raise UserError(
            f"{source} holds h5 files, which have FLAIR and the whole tumour only. Add "
            f"--flair-whole-tumour, or give the NIfTI files."
        )
    years = {
        re.sub(r"^(BraTS\d*).*", r"\1", n, flags=re.IGNORECASE)
        for n in scans or [p.stem for p in packed]
    }
    if years not in ({"BraTS19"}, {"BraTS20"}):
        raise UserError(
            f"{source} holds scans named {listed([f'{y}...' for y in sorted(years)])}. Give a "
            f"folder with those of 2019 (BraTS19_...) or of 2020 (BraTS20_Training_...) alone."
        )
    splits = None
    if years == {"BraTS19"}:
        splits = {k: published_list(f"BraTS2019_{k}.txt") for k in ("train", "val", "test")}
    if packed:
        cases = [Case(path.stem, (path,), path) for path in packed]
    else:
        kinds = ["flair"] if options.flair_whole_tumour else list(CHANNELS)
        needed = {n for names in (splits or {}).values() for n in names}
        needed |= {n for n in scans if "_training_" in n.lower()}
        cases = _cases(scans, kinds, needed, notes)
    whole = options.flair_whole_tumour
    year = "BraTS2019" if splits else "BraTS2020"
    return Release(
        name=f"{year}FlairWT" if whole else year,
        cases=cases,
        channels=["FLAIR"] if whole else list(CHANNELS.values()),
        labels={"background": 0, "whole tumour": 1} if whole else REGIONS,
        label_map={0: 0, 1: 1, 2: 1, 4: 1} if whole else {0: 0, 1: 1, 2: 2, 4: 3},
        splits=splits,
        list_name="SSL4MIS, 250/25/60" if splits else "by hash of the name (none is published)",
        protocol=CROPPED if packed else "raw",
        about={
            "reference": "Menze et al. 2015, doi:10.1109/TMI.2014.2377694; Bakas et al. 2017, "
            "doi:10.1038/sdata.2017.117",
            "licence": "research use, on registration",
            **({} if whole else {"regions_class_order": CLASS_ORDER}),
        },
        notes=notes,
    )


def _scans(source: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Return scan -> {flair, t1, t1ce, t2, seg} -> file; and what is odd."""
    scans: dict[str, dict[str, Path]] = {}
    folders: dict[Path, set[str]] = {}
    others, notes = [], []
    for path in files_below(source, ".nii", ".nii.gz"):
        if not (match := FILE.fullmatch(path.name)):
            others.append(path)
            continue
        name, kind = match[1], match[2].lower()
        files = scans.setdefault(name, {})
        if kind in files:
            raise UserError(f"{files[kind]} and {path} are the same image. Remove one copy.")
        files[kind] = path
        folders.setdefault(path.parent, set()).add(name)
    for path in others:  # masks with another name, alone in the folder of their scan
        names = folders.get(path.parent, set())
        if "seg" in path.name.lower() and len(names) == 1:
            name = next(iter(names))
            if "seg" not in scans[name]:
                scans[name]["seg"] = path
                notes.append(f"{path.name} is taken as the mask of {name}.")
    return scans, notes


def _cases(
    scans: dict[str, dict[str, Path]], kinds: list[str], needed: set[str], notes: list[str]
) -> list[Case]:
    """Make cases by hash of the name; those without masks are left out, unless `needed`."""
    wanted = [n for n, files in scans.items() if "seg" in files or n in needed]
    absent = [f"{n}_{k}" for n in wanted for k in [*kinds, "seg"] if k not in scans[n]]
    if absent:
        raise UserError(f"Files are missing: {listed(absent)}. Unpack the release again.")
    skipped = [n for n in scans if n not in set(wanted)]
    if skipped:
        notes.append(f"{len(skipped)} scans without masks are skipped: {listed(skipped)}.")
    cases = []
    for name in by_hash(wanted):
        files = scans[name]
        grades = {part.lower() for part in files["seg"].parts} & {"hgg", "lgg"}
        table = {"high_grade": float("hgg" in grades)} if len(grades) == 1 else {}
        cases.append(Case(name, tuple(files[k] for k in kinds), files["seg"], table=table))
    return cases


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one scan."""
    if case.images[0].suffix == ".h5":
        image, mask = read_h5(case.images[0], "zyx", [1, 1, 1])
        return Scan([image], mask)
    assert case.mask is not None
    return Scan([read_image(p) for p in case.images], read_image(case.mask))


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
