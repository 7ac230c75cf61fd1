"""ACDC: heart in cine MRI, end-diastole and end-systole, challenge of 2017; 100 + 50 patients.

Reads one of two releases, told apart by the files:

  [database/]training/patient001/Info.cfg, patient001_frame01.nii.gz, ..._frame01_gt.nii.gz
      the challenge's. Of the two frames Info.cfg tells which is end-diastole (ED) and which is
      end-systole (ES); the 4D file is skipped. testing/ (patients 101-150) is in no published list.
  data/patient001_frame01.h5, patient001_frame02.h5
      SSL4MIS's, which most papers use; frame01 is ED, frame02 is ES; the files of single slices
      are skipped. Intensities are scaled to [0, 1] by volume, and the spacing is lost: 1 is
      written, and distances are in voxels as in many papers, unless --spacing is given. The true
      one differs between patients (about 1.4-1.7 mm in plane, 5-10 mm between slices), so that
      nnU-Net plans better with the challenge's release.

Splits: 70 training patients in the order of SSL4MIS (--labeled 3, 7 or 14 counts patients; the
others without masks), 10 validation and 20 test patients. Both frames of a patient stay together.
Lists (--list, --test, --labeled) name patients (patient001) or frames (patient001_frame01).
Patients 074 and 076 (both for training) are the same scans, annotated twice (Dice 0.95-0.99 between
the two): they count as one patient, so that 69 are left.

cases.csv, for training cases: patient (number), phase (ED 0, ES 1), frame (its number in the
cine), group (NOR 0, MINF 1, DCM 2, HCM 3, RV 4), height (cm), weight (kg); from h5 files only
patient and phase.

Examples:
  nnunet_ssl convert ACDC -i ACDC -d 27 --labeled 7
  nnunet_ssl convert ACDC -i SSL4MIS/data/ACDC -d 28 --labeled 7

Source: https://www.creatis.insa-lyon.fr/Challenge/acdc/ (CC BY-NC-SA 4.0 as copies state it);
Bernard et al. 2018, doi:10.1109/TMI.2018.2837502; splits: SSL4MIS, Luo et al.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from nnunet_ssl.dataset_conversion.core import (
    Case,
    Release,
    Scan,
    add_spacing_option,
    add_split_options,
    run_script,
)
from nnunet_ssl.dataset_conversion.literature import read_h5, read_spacing
from nnunet_ssl.dataset_conversion.reading import (
    describe_folder,
    files_below,
    listed,
    published_list,
    read_image,
)
from nnunet_ssl.errors import UserError

PHASES = {"ED": 0, "ES": 1}
GROUPS = {"NOR": 0, "MINF": 1, "DCM": 2, "HCM": 3, "RV": 4}
FRAME = re.compile(r"(patient\d{3})_frame(\d+)(_gt)?\.(nii|nii\.gz|h5)", re.IGNORECASE)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Splits and spacing."""
    add_split_options(parser)
    add_spacing_option(parser, "x y z in mm, for the h5 files; default: 1")


def find(source: Path, options: argparse.Namespace) -> Release:
    """List the annotated frames of either release, by patient."""
    spacing = read_spacing(options)
    scans, packed = (_frames(source, *e) for e in ((".nii", ".nii.gz"), (".h5",)))
    if not scans and not packed:
        raise UserError(
            f"{source} holds no patientXXX_frameXX.nii.gz and no patientXXX_frameXX.h5, but "
            f"{describe_folder(source)}. Give the folder with training/, or with the h5 files of "
            f"whole volumes."
        )
    if scans and packed:
        raise UserError(
            f"{source} holds two releases, {describe_folder(source)}. Give the folder of one."
        )
    if scans and spacing:
        raise UserError("--spacing: the NIfTI files have their own spacing. Drop --spacing.")
    notes: list[str] = []
    cases = _packed_cases(packed) if packed else _cine_cases(scans, notes)
    patients = {k: published_list(f"ACDC_{k}.txt") for k in ("train", "val", "test")}
    wanted = {p for names in patients.values() for p in names}
    blind = [c.name for c in cases if c.mask is None and c.group in wanted]
    if blind:
        raise UserError(f"_gt files are missing for {listed(blind)}. Unpack the release again.")
    return Release(
        name="ACDC",
        cases=cases,
        channels=["cine-MRI"],
        labels={
            "background": 0,
            "right ventricle": 1,
            "myocardium": 2,
            "left ventricle": 3,
        },
        splits=patients,
        list_name="SSL4MIS, 70/10/20 patients",
        spacing_known=not packed or spacing is not None,
        about={
            "reference": "Bernard et al. 2018, doi:10.1109/TMI.2018.2837502",
            "licence": "CC BY-NC-SA 4.0 as copies of the data state it; research use",
        },
        notes=notes,
    )


def _frames(source: Path, *endings: str) -> dict[str, dict[int, dict[bool, Path]]]:
    """Return patient -> frame number -> {False: image, True: mask}; 4D and slices don't match."""
    found: dict[str, dict[int, dict[bool, Path]]] = {}
    for path in files_below(source, *endings):
        if match := FRAME.fullmatch(path.name):
            pair = found.setdefault(match[1].lower(), {}).setdefault(int(match[2]), {})
            if bool(match[3]) in pair:
                raise UserError(
                    f"{pair[bool(match[3])]} and {path} are the same frame. Remove one copy."
                )
            pair[bool(match[3])] = path
    return found


def _packed_cases(packed: Mapping[str, dict[int, dict[bool, Path]]]) -> list[Case]:
    """Cases of SSL4MIS: frame 1 is ED, frame 2 is ES."""
    cases = []
    for patient, numbers in packed.items():
        odd = set(numbers) - {1, 2}
        if odd:
            raise UserError(
                f"{next(iter(numbers[min(odd)].values()))}: frame {min(odd)} in the h5 release, "
                f"which has frames 01 and 02 only. Take the release of SSL4MIS."
            )
        for number in sorted(numbers):
            path = numbers[number][False]
            table = {"patient": float(patient[-3:]), "phase": float(number - 1)}
            cases.append(Case(f"{patient}_frame{number:02d}", (path,), path, patient, table))
    return cases


def _cine_cases(scans: Mapping[str, dict[int, dict[bool, Path]]], notes: list[str]) -> list[Case]:
    """Cases of the challenge: the frames that Info.cfg names, ED first.

    Without Info.cfg: the annotated frames, phase unknown, which `notes` tells.
    """
    cases, unknown = [], []
    for patient, numbers in scans.items():
        folder = next(iter(numbers[min(numbers)].values())).parent
        info = _read_info(folder / "Info.cfg")
        table = {"patient": float(patient[-3:])} | {
            k: info[k] for k in ("group", "height", "weight") if k in info
        }
        phases = {int(info[p]): code for p, code in PHASES.items() if p in info}
        if len(phases) < len(PHASES):
            unknown.append(patient)
            phases = {n: None for n, pair in sorted(numbers.items()) if True in pair}
        for number, phase in phases.items():
            name = f"{patient}_frame{number:02d}"
            pair = numbers.get(number, {})
            if False not in pair:
                raise UserError(f"{folder / name}.nii.gz is missing. Unpack the release again.")
            row = {**table, "frame": float(number)}
            if phase is not None:
                row["phase"] = float(phase)
            cases.append(Case(name, (pair[False],), pair.get(True), patient, row))
    if unknown:
        notes.append(f"Info.cfg with ED and ES is missing for {listed(unknown)}: phase unknown.")
    return cases


def _read_info(path: Path) -> dict[str, float]:
    """Read the numbers of Info.cfg (lines `key: value`); an absent file gives none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    info: dict[str, float] = {}
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "Group" and value in GROUPS:
            info["group"] = float(GROUPS[value])
        elif key in PHASES or key in ("Height", "Weight"):
            try:
                info[key if key in PHASES else key.lower()] = float(value)
            except ValueError:
                raise UserError(f"{path}: {key} is {value!r}, not a number. Correct it.") from None
    return info


def read(case: Case, options: argparse.Namespace) -> Scan:
    """Read one frame."""
    if case.images[0].suffix == ".h5":
        image, mask = read_h5(case.images[0], "zyx", read_spacing(options))
        return Scan([image], mask)
    mask_image = None if case.mask is None else read_image(case.mask)
    return Scan([read_image(case.images[0])], mask_image)


if __name__ == "__main__":
    raise SystemExit(run_script(__file__))
