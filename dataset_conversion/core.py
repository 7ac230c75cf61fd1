"""The shared part of all conversions: options, splits, writing, provenance. No torch.

A data-set script is one module of this package, named like the data set (MSD.py is the example):

    the docstring     first line: what `nnunet_ssl convert` lists; the whole is the script's help
    find(source, options) -> Release   which cases, groups, splits and labels; opens no image
    read(case, options) -> Scan        voxels of one case; runs in worker processes
    add_options(parser)                optional: own options, and of the shared ones
                                       `add_split_options`, `add_spacing_option`,
                                       `add_protocol_option`, `add_test_images_option`,
                                       `resizing.add_resize_option`
    HINTS = {"labels": "...", "geometry": "..."}   optional: what to do about an unexpected
                                       label, or about a mask on another grid

and ends with

    if __name__ == "__main__":
        raise SystemExit(run_script(__file__))

`find` raises UserError where the folder is another release than expected, and says which one it
looks like (`reading.describe_folder` helps). `read` keeps the number type and the geometry of the
file (`reading.read_image`, `split_channels`, `image_from_array`), fixes what is known to be wrong,
and leaves to the core: comparing geometry, checking and mapping labels, writing, hashing,
splitting, duplicates. What it found out about a case goes into `Scan.notes`. 2D images stay 2D:
nnU-Net's reader gives them the axis it needs, and their spacing survives.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion.reading import files_below, hash_source, listed, read_list
from nnunet_ssl.dataset_conversion.resizing import reduce_image, reduce_mask
from nnunet_ssl.dataset_conversion.selection import (
    PARTS,
    Splits,
    choose_labeled,
    choose_splits,
    count_groups,
    find_parted,
    groups_bind,
    separate_duplicates,
)
from nnunet_ssl.dataset_conversion.target import Target
from nnunet_ssl.dataset_conversion.writing import (
    ENDING,
    check_geometry,
    hash_voxels,
    map_labels,
    write_image,
)
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import environment_folder, explain_os_error, write_json
from nnunet_ssl.planning.workers import Workers, available_cpus
from nnunet_ssl.version import __version__

FORMAT = 1
CROPPED = "cropped-literature"
# options that say which cases go where; finished cases stay valid when they change
PLACING = {"labeled", "draw", "list", "test", "allow_missing"}
TABLES = (".csv", ".tsv", ".txt")  # the only files that -i may name
LISTS = {"labeled", "list", "test"}  # a number or a file
RUNNING = {"i", "d", "np", "overwrite"}


@dataclass(frozen=True)
class Case:
    """One image of the source, all its channels.

    Attributes:
        name: name of the case in the data set; letters, digits and `_ - .`
        images: source files, which are hashed; a DICOM series is a folder.
        mask: source of the mask; None if there is none.
        group: images of one patient share it, and stay together; default: the name.
        table: numbers for cases.csv (patient, phase, ...).
        extra: whatever else `read` needs; must pickle and have a stable repr.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None = None
    group: str = ""
    table: Mapping[str, float] = field(default_factory=dict)
    extra: Any = None


@dataclass
class Scan:
    """What `read` makes of a case.

    Attributes:
        images: one per channel, 2D or 3D, on one grid.
        mask: on the same grid, original values; None if the case has none.
        notes: what was found out about the case, for conversion.json.
    """

    images: list[sitk.Image]
    mask: sitk.Image | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Release:
    """What `find` made of the source folder.

    Attributes:
        name: NAME part of the data set.
        cases: in the order of the release; those that no list names are not converted.
        channels: channel names as nnU-Net knows them (`CT` gets its CT normalisation).
        labels: class name -> value, or values of a region; `background` is 0.
        label_map: value in the source's masks -> value here; None: those of `labels` as they are.
        splits: published `train`, `val`, `test` lists in their order; None: all cases train, in
            the order of `cases`.
        list_name: where that order comes from.
        withdrawn: cases that lists name and current releases lack; reported and skipped.
        counts: what `--labeled` counts, `groups` or `images`.
        inferred: True where groups are images that look alike, False where they are known.
        protocol: `raw` or `cropped-literature`.
        spacing_known: False where the source has none and none was given.
        about: further entries of dataset.json: licence, reference, regions_class_order, ...
        notes: remarks for the user, printed.
    """

    name: str
    cases: Sequence[Case]
    channels: Sequence[str]
    labels: Mapping[str, int | list[int]]
    label_map: Mapping[int, int] | None = None
    splits: Mapping[str, Sequence[str]] | None = None
    list_name: str = "by name"
    withdrawn: Collection[str] = ()
    counts: str = "groups"
    inferred: bool = False
    protocol: str = "raw"
    spacing_known: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def stem(self) -> str:
        """NAME, marked where the protocol is not `raw`, so that the two can't be mixed up."""
        return self.name if self.protocol == "raw" else f"{self.name}_cropped"


# ------------------------------------------------------------------------------------ options


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """Add --list and --test."""
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="training cases (or groups of them, as patients) in their order, one a line",
    )
    parser.add_argument(
        "--test",
        metavar="N|FILE",
        help="test set: the last N groups of the order, or the cases or groups named in FILE",
    )


def add_spacing_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --spacing (mm, in the order x y z); `text` is its help."""
    parser.add_argument("--spacing", nargs="+", type=_positive, metavar="MM", help=text)


def add_test_images_option(parser: argparse.ArgumentParser, which: str) -> None:
    """Add --use-test-images; `which` names the challenge's test images."""
    parser.add_argument(
        "--use-test-images",
        action="store_true",
        help=f"train on {which}, too, without masks. Results on the challenge's own test set are "
        f"transductive then: say so",
    )


def add_protocol_option(parser: argparse.ArgumentParser) -> None:
    """Add --protocol; None means that the user leaves it to the script."""
    parser.add_argument(
        "--protocol",
        choices=["raw", CROPPED],
        help="whole scans (raw), or cut around the mask as most papers do, test scans too",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"{text} is no spacing in mm")
    return value


def build_parser(script: Any) -> argparse.ArgumentParser:
    """The parser of one script: shared options and its own."""
    name = script.__name__.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=f"nnunet_ssl convert {name}",
        description=inspect.cleandoc(script.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-i", required=True, type=Path, metavar="SRC", help="what to convert")
    parser.add_argument("-d", required=True, type=int, metavar="ID", help="free id, 1-999")
    parser.add_argument(
        "--labeled",
        metavar="N|FILE",
        help="how many patients (or images) keep their masks, or a file naming cases or groups; "
        "the others go to imagesUn, their masks to the held-out folder; default: all keep them",
    )
    parser.add_argument(
        "--draw",
        type=int,
        default=0,
        metavar="K",
        help="with --labeled: 0 takes the first N of the published order, K > 0 is the seed of a "
        "random choice (%(default)s)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="carry on without cases that a list names and the source lacks",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data set that was converted before"
    )
    parser.add_argument(
        "-np", type=int, default=available_cpus(), metavar="N", help="processes (%(default)s)"
    )
    if hasattr(script, "add_options"):
        script.add_options(parser)
    return parser


def run_script(file: str) -> int:
    """Run a script as `python dataset_conversion/NAME.py ...`; return the exit code."""
    from nnunet_ssl.dataset_conversion import main

    try:
        return main([Path(file).stem, *sys.argv[1:]])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------- the run


@dataclass
class Plan:
    """Which cases go where; duplicates are settled once the voxels are known.

    Attributes:
        cases: all of the release, by name.
        groups: of all cases.
        masked: cases that have a mask.
        splits: training, validation and test cases.
        wanted: how many groups (or images) keep their masks, or which cases; None: all.
        draw: seed of a random choice, 0: none.
        counts: what a number in `wanted` counts.
        bind: groups stay on one side, see `selection.groups_bind`.
    """

    cases: dict[str, Case]
    groups: dict[str, str]
    masked: set[str]
    splits: Splits
    wanted: int | list[str] | None
    draw: int
    counts: str
    bind: bool

    def choose_labeled(self) -> list[str]:
        """Choose the cases that keep their masks, see there."""
        return choose_labeled(
            self.splits.train, self.groups, self.masked, self.wanted, self.draw, self.counts
        )

    def used(self) -> list[Case]:
        """The cases of the three parts."""
        return [self.cases[name] for name in self.splits.used()]

    def digest(self) -> str:
        """Hash of who goes where, with what group and numbers: two runs of one plan agree."""
        cases = [(c.name, self.groups[c.name], dict(c.table)) for c in self.used()]
        parts = [getattr(self.splits, part) for part in PARTS]
        return hashlib.sha256(json.dumps([cases, parts], sort_keys=True).encode()).hexdigest()


def convert(script: Any, argv: Sequence[str]) -> int:
    """Convert one data set.

    Args:
        script: module with `find` and `read`, see above.
        argv: options after the name of the data set.

    Returns:
        0; also if the data set was complete already.

    Raises:
        UserError: bad option or source. Finished cases are kept in a hidden folder beside the
            target, and the same command goes on from there.
    """
    options = build_parser(script).parse_args(argv)
    _check_options(options)
    target_root = environment_folder("nnUNet_raw").resolve()
    release = script.find(options.i, options)
    for note in release.notes:
        print(f"NOTE: {note}")
    plan = _make_plan(release, options)
    plan.choose_labeled()  # a number that is too large is told at once
    number = len(plan.wanted) if isinstance(plan.wanted, list) else plan.wanted
    size = getattr(options, "resize", None)
    stem = f"{release.stem}_{size[0]}x{size[1]}" if size else release.stem
    target = Target(target_root, options.d, stem, number, options.draw)
    with target.locked():
        target.finish_pending()
        _convert_into(target, script, release, options, plan)
    return 0


def _convert_into(
    target: Target, script: Any, release: Release, options: argparse.Namespace, plan: Plan
) -> None:
    """Convert all cases and put them in their places, unless this was done before."""
    identity = _identity(script, release, options, plan)
    previous = target.check_free(identity, options.overwrite)
    with Workers(options.np) as workers:
        if previous and _unchanged(previous, plan.used(), options.i, target, workers):
            target.remove_parts()
            print(f"{target.folder} is complete already; nothing to do.")
            return
        if previous:
            raise UserError(
                f"{target.folder} was made from other files than those in {options.i} now, or is "
                f"incomplete. Add --overwrite to replace it, or give another id."
            )
        stamps = _convert_cases(script, release, options, plan.used(), target, workers)

    flat = [c for c, stamp in stamps.items() if stamp["dimension"] == 2]
    if 0 < len(flat) < len(stamps):
        raise UserError(f"2D images among volumes: {listed(flat)}. Convert them separately.")
    record = identity | _settle(plan, stamps) | _provenance(release, options, plan, stamps)
    record |= {"format": FORMAT, "name": target.name, "heldout": str(target.heldout)}
    dataset_json = {
        "name": target.name,
        **release.about,
        "channel_names": {str(i): name for i, name in enumerate(release.channels)},
        "labels": dict(release.labels),
        "numTraining": len(record["labeled"]),
        "file_ending": ENDING,
    }
    tables = {c: plan.cases[c].table for c in plan.splits.train}
    target.place(record, dataset_json, tables, len(release.channels), plan.masked)
    target.publish()
    print(_summary(target, record, release, stamps))


def _make_plan(release: Release, options: argparse.Namespace) -> Plan:
    """Which cases train, validate and test, by what is known without opening an image."""
    cases = _index(release.cases)
    groups = {name: case.group or name for name, case in cases.items()}
    masked = {name for name, case in cases.items() if case.mask is not None}
    splits = choose_splits(
        groups,
        masked,
        release.splits,
        release.list_name,
        withdrawn=release.withdrawn,
        inferred=release.inferred,
        list_file=getattr(options, "list", None),
        test=getattr(options, "test", None),
        allow_missing=options.allow_missing,
    )
    bind = groups_bind(release.inferred, getattr(options, "test", None))
    wanted = _labeled(options)
    return Plan(cases, groups, masked, splits, wanted, options.draw, release.counts, bind)


def _settle(plan: Plan, stamps: Mapping[str, dict]) -> dict[str, Any]:
    """Settle duplicates and the annotated cases; changes `plan`.

    Returns:
        Entries of the record.
    """
    voxels = {c: stamp["voxels"] for c, stamp in stamps.items()}
    splits = plan.splits
    duplicates, dropped = separate_duplicates(splits, plan.groups, plan.masked, voxels, plan.bind)
    labeled = plan.choose_labeled()
    kept = set(labeled)
    annotated = {voxels[c] for c in labeled}
    # only a list of the user can part copies here
    copies = [c for c in splits.train if c not in kept and voxels[c] in annotated]
    splits.train = [c for c in splits.train if c not in set(copies)]
    return {
        "order": splits.train,
        "groups": {c: plan.groups[c] for c in splits.used()},
        "splits": {part: getattr(splits, part) for part in PARTS},
        "labeled": labeled,
        "unlabeled": [c for c in splits.train if c not in kept],
        "duplicates": duplicates,
        "dropped": dropped + copies,
    }


def _provenance(
    release: Release, options: argparse.Namespace, plan: Plan, stamps: Mapping[str, dict]
) -> dict[str, Any]:
    """Entries of the record: where everything comes from; `plan` is settled."""
    notes = {c: dict(s["notes"]) for c, s in stamps.items()}
    for case, alike in find_parted(plan.splits, plan.groups).items():
        notes[case]["training_cases_of_its_group"] = alike
    return {
        "protocol": release.protocol,
        "spacing_known": release.spacing_known,
        "counts": release.counts,
        "list": plan.splits.list_name,
        "draw": options.draw,
        "missing": plan.splits.missing,
        "unused": [c for c in plan.cases if c not in stamps],
        "sources": {c: _source(plan.cases[c], s["hashes"], options.i) for c, s in stamps.items()},
        "notes": {c: told for c, told in notes.items() if told},
        "source_folder": str(options.i.resolve()),
        "versions": {
            "nnunet_ssl": __version__,
            "SimpleITK": version("SimpleITK"),
            "python": platform.python_version(),
        },
    }


def _check_options(options: argparse.Namespace) -> None:
    if not 1 <= options.d <= 999:
        raise UserError(f"-d {options.d} is not between 1 and 999. Give another id.")
    if options.draw < 0:
        raise UserError(f"--draw {options.draw} is negative. Give 0 or more.")
    if options.draw and not (options.labeled or "").isdigit():
        raise UserError(f"--draw {options.draw} has no effect without --labeled N. Add it.")
    if not options.i.exists():
        raise UserError(f"{options.i} does not exist. Give the original download with -i.")
    if options.i.is_file() and options.i.suffix.lower() not in TABLES:
        raise UserError(f"{options.i} is no folder. Unpack it, and give the folder with -i.")
    if options.i.is_dir() and not files_below(options.i):
        raise UserError(f"{options.i} is empty. Give the unpacked original download with -i.")


def _labeled(options: argparse.Namespace) -> int | list[str] | None:
    """A number of groups, or the names of the cases that keep their masks."""
    if options.labeled is None:
        return None
    return int(options.labeled) if options.labeled.isdigit() else read_list(Path(options.labeled))


def _index(cases: Iterable[Case]) -> dict[str, Case]:
    index: dict[str, Case] = {}
    for case in cases:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", case.name, re.ASCII):
            raise UserError(
                f"{case.images[0]}: {case.name!r} can't name a case; letters, digits, _ - . can. "
                f"Rename the file."
            )
        if case.name in index:
            raise UserError(
                f"{case.images[0]} and {index[case.name].images[0]} are both case {case.name}. "
                f"Rename or remove one."
            )
        index[case.name] = case
    return index


def _identity(
    script: Any, release: Release, options: argparse.Namespace, plan: Plan
) -> dict[str, Any]:
    """What the result depends on, besides the source files; lists count by content."""
    settings: dict[str, Any] = {}
    for key, value in sorted(vars(options).items()):
        if key in RUNNING:
            continue
        if key in LISTS and value is not None:
            number = str(value).isdigit()
            path = Path(value)
            value = int(value) if number else {"file": path.name, "sha256": hash_source(path)}
        settings[key] = value
    return {
        "data_set": script.__name__.rpartition(".")[2],
        "options": settings,
        "labels": dict(release.labels),
        "channels": list(release.channels),
        "plan": plan.digest(),
    }


def _hash_case(case: Case) -> list[str]:
    return [hash_source(p) for p in (*case.images, *([case.mask] if case.mask else []))]


def _source(case: Case, hashes: Sequence[str], source: Path) -> dict[str, Any]:
    root = source if source.is_dir() else source.parent
    images = [os.path.relpath(p, root) for p in case.images]
    entry = {
        "image": images[0] if len(images) == 1 else images,
        "image_sha256": hashes[0] if len(images) == 1 else hashes[: len(images)],
    }
    if case.mask is not None:
        entry |= {"label": os.path.relpath(case.mask, root), "label_sha256": hashes[-1]}
    return entry


def _unchanged(
    record: Mapping[str, Any],
    cases: Sequence[Case],
    source: Path,
    target: Target,
    workers: Workers,
) -> bool:
    """Tell whether an earlier run had the same source files, and all its results are there."""
    if set(record["sources"]) != {c.name for c in cases} or not target.is_complete(record):
        return False
    hashes = workers.map(_hash_case, [(c,) for c in cases], "Comparing with the source")
    return all(
        record["sources"][c.name] == _source(c, h, source)
        for c, h in zip(cases, hashes, strict=True)
    )


def _summary(
    target: Target, record: Mapping[str, Any], release: Release, stamps: Mapping[str, dict]
) -> str:
    """What was made, what is odd, and the next command."""
    groups, splits = record["groups"], record["splits"]

    def count(cases: Sequence[str]) -> str:
        number = count_groups(cases, groups)
        return str(len(cases)) if number == len(cases) else f"{len(cases)} (of {number} groups)"

    lines = [
        f"{target.folder}",
        f"  order: {record['list']}; training {count(splits['train'])}, validation "
        f"{count(splits['val'])}, test {count(splits['test'])}",
        f"  with masks {count(record['labeled'])}, without {count(record['unlabeled'])}",
    ]
    if splits["val"] or splits["test"] or record["unlabeled"]:
        lines.append(f"  held out (validation, test, hidden masks): {target.heldout}")
    kept, wanted = len(record["labeled"]), record["options"]["labeled"]
    if release.counts == "images" and isinstance(wanted, int) and kept != wanted:
        lines.append(
            f"  NOTE: {kept} images keep their masks, not {wanted}: groups stay whole, and no "
            f"other one fits."
        )
    parted = find_parted(Splits(**splits), groups)
    if parted:
        case, alike = next(iter(parted.items()))
        training = {c for cases in parted.values() for c in cases}
        lines.append(
            f"  NOTE: {count_groups(parted, groups)} groups of near-identical images stand on both "
            f"sides, as the lists want it ({len(training)} for training, {len(parted)} held out; "
            f"for example {alike[0]} and {case}): scores on these say less about other patients. "
            f"conversion.json names them (notes)."
        )
    annotated = {c: s["label_voxels"] for c, s in stamps.items() if s["label_voxels"]}
    empty = [c for c, voxels in annotated.items() if not sum(voxels.values()) - voxels.get("0", 0)]
    absent = [
        name
        for name, v in release.labels.items()
        if not any(voxels.get(str(k)) for k in np.atleast_1d(v) for voxels in annotated.values())
    ]
    remarks = {
        "named by the list but not in the source": record["missing"],
        "in the source but in no list, not converted": record["unused"],
        "images with equal voxels": [" = ".join(cases) for cases in record["duplicates"]],
        "left out, so that copies and what belongs to them stay on one side": record["dropped"],
        "masks without foreground": empty,
        "labels that no mask holds": absent,
    }
    lines += [f"  NOTE: {len(v)} {text}: {listed(v)}" for text, v in remarks.items() if v]
    if not release.spacing_known:
        lines.append("  NOTE: the source has no spacing; distances will be in voxels.")
    stale = os.environ.get("nnUNet_preprocessed", "")
    if stale and (Path(stale) / target.name).exists():
        lines.append(f"  NOTE: {Path(stale) / target.name} is older; preprocess again.")
    flat = all(stamp["dimension"] == 2 for stamp in stamps.values())
    if record["unlabeled"]:
        plan = f"plan_and_preprocess -d {target.id} -c 2d{'' if flat else ' 3d_fullres'}"
        lines.append(f"Next: nnunet_ssl {plan}")
    else:
        lines.append(
            "All training cases keep their masks: a source for nnunet_ssl benchmark, which hides "
            "them itself. To hide them here, give --labeled N and another id."
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------- case by case


def _convert_cases(
    script: Any,
    release: Release,
    options: argparse.Namespace,
    cases: Sequence[Case],
    target: Target,
    workers: Workers,
) -> dict[str, dict]:
    """Convert all cases into the hidden folders; return their stamps.

    Raises:
        UserError: one message for all bad cases. The first case is tried alone, so that what is
            wrong in every case is told at once.
    """
    label_map = release.label_map
    if label_map is None:
        values = [v if isinstance(v, list) else [v] for v in release.labels.values()]
        label_map = {v: v for vs in values for v in vs}
    job = (script.__name__, options, tuple(release.channels), dict(label_map), target)
    try:
        results = [convert_case(cases[0], *job)]
        if isinstance(results[0], dict):
            results = workers.map(convert_case, [(c, *job) for c in cases], "Converting")
    except OSError as error:
        raise UserError(explain_os_error(error, error.filename or target.part)) from error
    problems = [r for r in results if isinstance(r, str)]
    if problems:
        more = len(problems) - 10
        shown = [*problems[:10], *([f"and {more} more."] if more > 0 else [])]
        done = sum(isinstance(r, dict) for r in results)
        kept = f" {done} finished case(s) are kept: run the same command again." if done else ""
        raise UserError("\n".join(shown) + kept)
    return {c.name: r for c, r in zip(cases, results, strict=True) if isinstance(r, dict)}


def convert_case(
    case: Case,
    script_name: str,
    options: argparse.Namespace,
    channels: Sequence[str],
    label_map: Mapping[int, int],
    target: Target,
) -> dict[str, Any] | str:
    """Convert one case, unless a stamp tells that it is done.

    Returns:
        The stamp (hashes of the sources and of the voxels, voxels of each label, notes), or what
        is wrong with the case.
    """
    stamp_path = target.stamp(case.name)
    images = [target.staged_image(case.name, i) for i in range(len(channels))]
    mask_path = target.staged_mask(case.name)
    try:
        hashes = _hash_case(case)
        settings = {k: str(v) for k, v in vars(options).items() if k not in PLACING | RUNNING}
        basis = [FORMAT, __version__, script_name, hashes, settings, repr(case.extra)]
        basis += [list(channels), sorted(label_map.items())]
        key = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
        outputs = [*images, *([mask_path] if case.mask else [])]
        if stamp_path.is_file() and all(p.is_file() for p in outputs):
            stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
            if stamp["key"] == key:
                return stamp
        script = importlib.import_module(script_name)
        scan = script.read(case, options)
        hints = getattr(script, "HINTS", {})
        _check_scan(scan, case, channels, hints.get("geometry", ""))
        voxels: dict[str, int] = {}
        size = getattr(options, "resize", None)
        if size:
            scan.images = [reduce_image(image, size) for image in scan.images]
        if scan.mask is not None:
            mask, counts = map_labels(scan.mask, label_map, case.name, hints.get("labels", ""))
            if size:
                mask = reduce_mask(mask, size)
                array = sitk.GetArrayViewFromImage(mask)
                counts = {value: int((array == value).sum()) for value in counts}
            voxels = {str(k): v for k, v in sorted(counts.items())}
            write_image(mask, mask_path)
        for image, path in zip(scan.images, images, strict=True):
            write_image(image, path)
        stamp = {
            "key": key,
            "hashes": hashes,
            "voxels": hash_voxels(scan.images),
            "dimension": scan.images[0].GetDimension(),
            "label_voxels": voxels,
            "notes": scan.notes,
        }
        stamp_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(stamp, stamp_path)
        return stamp
    except UserError as error:
        return str(error) if case.name in str(error) else f"{case.name}: {error}"
    except RuntimeError as error:  # of SimpleITK; the other cases are still to be told
        reason = (str(error).strip().splitlines() or [repr(error)])[-1].strip(" .!")
        files = listed([*case.images, *([case.mask] if case.mask else [])])
        return f"{case.name}: {reason}. Look at {files}; export the case again, or leave it out."


def _check_scan(scan: Scan, case: Case, channels: Sequence[str], hint: str) -> None:
    if len(scan.images) != len(channels):
        raise UserError(
            f"{case.name} has {len(scan.images)} channel(s), expected are {len(channels)}: "
            f"{', '.join(channels)}. Check {case.images[0]}."
        )
    first = scan.images[0]
    for number, image in enumerate(scan.images[1:], start=1):
        check_geometry(first, image, case.name, f"channel {number} ({channels[number]})")
    if (scan.mask is None) != (case.mask is None):
        raise AssertionError(f"read() and find() differ in the mask of {case.name}")
    if scan.mask is not None:
        check_geometry(first, scan.mask, case.name, f"mask {case.mask}", hint)
