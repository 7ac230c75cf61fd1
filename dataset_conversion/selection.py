"""Which cases train, validate and test, and which of them keep their masks."""

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ssl.dataset_conversion.reading import listed, read_list
from nnunet_ssl.errors import UserError

PARTS = ("train", "val", "test")


@dataclass
class Splits:
    """Case names, in published order.

    Attributes:
        train: the order of which `--labeled` takes the first groups.
        val: validation cases of the published splits, kept apart.
        test: test cases.
        missing: named by a list, absent from the source.
        list_name: which list this is.
    """

    train: list[str]
    val: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    list_name: str = ""

    def used(self) -> list[str]:
        """All cases of the three parts."""
        return [*self.train, *self.val, *self.test]


def choose_splits(
    groups: Mapping[str, str],
    masked: Collection[str],
    published: Mapping[str, Sequence[str]] | None,
    list_name: str,
    *,
    withdrawn: Collection[str] = (),
    inferred: bool = False,
    list_file: Path | None = None,
    test: str | None = None,
    allow_missing: bool = False,
) -> Splits:
    """Combine published lists with the user's.

    Args:
        groups: every case of the source -> its group, in the order of the release.
        masked: cases that have a mask.
        published: lists of `train`, `val`, `test`, which name cases or groups, as those of the
            user do; None: all cases train, in the given order.
        list_name: where `published` or the order comes from.
        withdrawn: cases that published lists name and current releases lack.
        inferred: groups only look alike; lists of the user may part them, see `groups_bind`.
        list_file: replaces the training list, or the order.
        test: number of groups at the end of the order, or a file naming the test cases.
        allow_missing: carry on without cases that a list names and the source lacks.

    Raises:
        UserError: no case, absent cases, a group on both sides, test cases without masks.
    """
    if not groups:
        raise UserError("The source holds no case. Check -i.")
    wanted = {k: name_cases((published or {}).get(k, []), groups) for k in PARTS}
    if published is None:
        wanted["train"] = list(groups)
    if list_file:
        wanted["train"] = name_cases(read_list(list_file), groups)
        others = wanted["val"] or wanted["test"]  # published, and still in use
        list_name = f"{list_file.name}, {list_name}" if others else list_file.name
    if test and test.isdigit():
        wanted["test"] = []
    elif test:
        wanted["test"] = name_cases(read_list(Path(test)), groups)
        list_name += f", test: {Path(test).name}"
        if not list_file:  # they leave the order
            wanted["train"] = [c for c in wanted["train"] if c not in set(wanted["test"])]

    missing = [c for k in PARTS for c in wanted[k] if c not in groups]
    absent = [c for c in missing if c not in withdrawn]
    there = [c for k in ("val", "test") for c in wanted[k] if c in groups]
    if there and wanted["train"] and not any(c in groups for c in wanted["train"]):
        more = " --allow-missing" if any(c not in groups for c in wanted["val"]) else ""
        raise UserError(
            f"None of the {len(wanted['train'])} training cases of the list ({list_name}) is in "
            f"the source, only cases for validation or test ({listed(there)}). Complete the "
            f"source; or convert these alone: name them in a file, and give --list FILE --test 0"
            f"{more}."
        )
    if absent and not allow_missing:
        raise UserError(
            f"{len(absent)} case(s) of the list ({list_name}) are not in the source: "
            f"{listed(absent)}. Complete the source, correct the list, or add --allow-missing to "
            f"convert the others."
        )
    parts = {k: [c for c in wanted[k] if c in groups] for k in PARTS}
    if test and test.isdigit():
        parts["train"], parts["test"] = _cut_last(parts["train"], groups, masked, int(test))
    hint = "" if test else " --test FILE replaces the published test set, --test 0 drops it."
    _check_apart(parts, groups if groups_bind(inferred, test) else {c: c for c in groups}, hint)
    if not parts["train"]:
        raise UserError(f"No case is left for training ({list_name}). Check -i and the lists.")
    blind = [c for k in ("val", "test") for c in parts[k] if c not in masked]
    if blind:
        raise UserError(
            f"{len(blind)} test or validation case(s) have no mask: {listed(blind)}. Choose others."
        )
    return Splits(**parts, missing=missing, list_name=list_name)


def _cut_last(
    order: Sequence[str], groups: Mapping[str, str], masked: Collection[str], number: int
) -> tuple[list[str], list[str]]:
    """Move the last groups that are annotated in full to the test set."""
    members = by_group(order, groups)
    full = [g for g, cases in members.items() if all(c in masked for c in cases)]
    if number >= len(full):
        raise UserError(
            f"--test {number} is not below {len(full)}, the number of annotated groups. Give a "
            f"smaller number."
        )
    chosen = set(full[len(full) - number :])
    test = [c for c in order if groups[c] in chosen]
    return [c for c in order if groups[c] not in chosen], test


def _check_apart(parts: Mapping[str, Sequence[str]], groups: Mapping[str, str], hint: str) -> None:
    """Raise UserError if a case or group is in two parts; `hint`: what else can be done."""
    home: dict[str, tuple[str, str]] = {}
    for part, cases in parts.items():
        for case in cases:
            other, before = home.setdefault(groups[case], (part, case))
            if other != part and case in parts[other]:
                raise UserError(
                    f"{case} is in both lists, {other} and {part}. Take it out of one.{hint}"
                )
            if other != part:
                raise UserError(
                    f"{case} ({part}) and {before} ({other}) belong together (group "
                    f"{groups[case]}). Put both into the same list."
                )


def groups_bind(inferred: bool, test: str | None) -> bool:
    """Tell whether groups stay on one side.

    Groups of patients always do. Groups of images that look alike (`inferred`) yield to a test set
    that the user names (`test` is a file): it was made by another measure of likeness, and must
    stay what it is.
    """
    return not inferred or not test or test.isdigit()


def find_parted(splits: Splits, groups: Mapping[str, str]) -> dict[str, list[str]]:
    """List, for each case for validation or test, the training cases of its group, if any."""
    members = by_group(splits.train, groups)
    held_out = [*splits.val, *splits.test]
    return {c: members[groups[c]] for c in held_out if groups[c] in members}


def by_group(order: Iterable[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Collect the cases of each group; groups in the order of their first case."""
    members: dict[str, list[str]] = {}
    for case in order:
        members.setdefault(groups[case], []).append(case)
    return members


def name_cases(names: Iterable[str], groups: Mapping[str, str]) -> list[str]:
    """Replace names of groups by their cases; names of cases, and unknown ones, stay."""
    members = by_group(groups, groups)
    found = [c for n in names for c in ([n] if n in groups else members.get(n, [n]))]
    return list(dict.fromkeys(found))


def by_hash(names: Iterable[str]) -> list[str]:
    """Order names by their hash: as if drawn at random, and alike in every part of a data set."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def choose_labeled(
    order: Sequence[str],
    groups: Mapping[str, str],
    masked: Collection[str],
    labeled: int | Sequence[str] | None,
    draw: int,
    counts: str = "groups",
) -> list[str]:
    """Choose the training cases that keep their masks.

    Args:
        order: training cases in published order.
        groups: case -> group; groups stay whole.
        masked: cases that have a mask; groups without any do not count.
        labeled: how many, or which cases or groups, also parts of groups; None: all.
        draw: 0 keeps the order, another number is the seed of a shuffle of the groups.
        counts: `groups`, or `images`: whole groups in their order, each that still fits into the
            number, which they may miss by a few.

    Raises:
        UserError: `labeled` is not between 1 and what there is, or names other cases.
    """
    members = by_group([c for c in order if c in masked], groups)
    names = list(members)
    if not names:
        raise UserError("No training case has a mask; at least one is needed. Check the masks.")
    if labeled is not None and not isinstance(labeled, int):
        chosen = name_cases(labeled, {c: groups[c] for cases in members.values() for c in cases})
        absent = [c for c in chosen if c not in order or c not in masked]
        if absent:
            raise UserError(
                f"--labeled names {len(absent)} case(s) that are no annotated training case: "
                f"{listed(absent)}. Correct the list."
            )
        return chosen
    if draw:
        random.Random(draw).shuffle(names)
    if labeled is None:
        labeled, counts = len(names), "groups"
    most = len(names) if counts == "groups" else sum(map(len, members.values()))
    if not 1 <= labeled <= most:
        raise UserError(
            f"--labeled {labeled} is not between 1 and {most}, the annotated {counts} of the "
            f"training set. Give another number."
        )
    if counts == "groups":
        return [c for name in names[:labeled] for c in members[name]]
    chosen = []
    for name in names:
        if len(chosen) + len(members[name]) <= labeled:
            chosen += members[name]
    if not chosen:
        least = min(map(len, members.values()))
        raise UserError(
            f"--labeled {labeled}: the smallest group has {least} images, and groups stay whole. "
            f"Give at least that number."
        )
    return chosen


def separate_duplicates(
    splits: Splits,
    groups: dict[str, str],
    masked: Collection[str],
    voxels: Mapping[str, str],
    bind: bool = True,
) -> tuple[list[list[str]], list[str]]:
    """Keep images with equal voxels on one side; changes `splits` and `groups`.

    Groups that share an image become one group, since a copy shows that they are one patient. Where
    such a group has test cases, its cases for training and validation are dropped; where it has
    validation cases, those for training. Of training copies of which one has a mask, those without
    are dropped.

    Args:
        splits: which cases go where.
        groups: of all cases.
        masked: cases that have a mask.
        voxels: case -> hash of its voxels.
        bind: False where groups need not stay on one side: the copies alone are dropped then.

    Returns:
        The copies, a list of names each; and the cases that were dropped.
    """
    part_of = {c: k for k in reversed(PARTS) for c in getattr(splits, k)}  # test, val, train
    same: dict[str, list[str]] = {}
    for case in part_of:
        same.setdefault(voxels[case], []).append(case)
    duplicates = [cases for cases in same.values() if len(cases) > 1]
    if not bind:
        groups = {c: c for c in groups}
    for cases in duplicates:
        joined = {groups[c] for c in cases}
        groups.update({c: groups[cases[0]] for c in groups if groups[c] in joined})
    home: dict[str, str] = {}
    for case, part in part_of.items():
        home.setdefault(groups[case], part)
    gone = {c for c, part in part_of.items() if part != home[groups[c]]}
    for cases in duplicates:
        if part_of[cases[0]] == "train" and any(c in masked for c in cases):
            gone |= {c for c in cases if c not in masked}
    for part in PARTS:
        setattr(splits, part, [c for c in getattr(splits, part) if c not in gone])
    return duplicates, [c for c in part_of if c in gone]


def count_groups(cases: Iterable[str], groups: Mapping[str, str]) -> int:
    """Return how many groups the cases come from."""
    return len(Counter(groups[c] for c in cases))
