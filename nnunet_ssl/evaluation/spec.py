"""The spec of a benchmark: a YAML file, checked before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import parse_setting, resolve

PROTOCOLS = ("raw", "cropped-literature")
CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres")
ALSO = ("stock", "bound", "equal_compute")
PSEUDO_LABELS_AT = (0.4, 0.7)  # of training, beside its end


@dataclass(frozen=True)
class HeldOut:
    """Where the test cases come from; exactly one is given.

    Attributes:
        last: groups at the end of the order, a number or a share below 1.
        names: file with case names.
        part: "val" or "test" of the converted data set.
        folders: images and labels.
    """

    last: int | float | None = None
    names: Path | None = None
    part: Literal["val", "test"] | None = None
    folders: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class SmallPlans:
    """A small network in place of the planned one, see `planning.small.shrink_plans`."""

    features: tuple[int, ...]
    batch: int | None
    convs_per_stage: int
    patch: tuple[int, ...] | None


@dataclass(frozen=True)
class Spec:
    """A checked spec.

    `lines` holds the line of each key, `settings` the values as written; budgets are numbers, or
    shares below 1.
    """

    file: Path
    text: str
    lines: dict[str, int]
    name: str
    about: str
    protocol: str
    source: str
    order: Path | None
    groups: Path | None
    test: HeldOut
    configuration: str
    planner: str
    plans: SmallPlans | None
    labeled: tuple[int | float, ...]
    draws: tuple[int, ...]
    seeds: tuple[int, ...]
    trainers: tuple[str, ...]
    twin: str | None  # one for all trainers in place of each one's own
    settings: dict[str, str]
    also: tuple[str, ...]
    mirroring: bool
    step_size: float
    device: str
    units: Literal["mm", "voxel", "both"]
    tolerance: float
    circumference: tuple[str, ...]  # classes
    pseudo_labels: int

    def error(self, key: str, message: str) -> UserError:
        """Return the error about a key, with its line."""
        return UserError(f"{self.file}, line {self.lines.get(key, 1)}, {key}: {message}")


class Misfit(Exception):
    """A value that does not fit; says what does."""


Read = Callable[[yaml.Node], Any]
REQUIRED = object()


class Section:
    """A mapping of the spec, taken key by key.

    Args:
        file: the spec.
        node: the mapping.
        lines: gets the line of each key, by its full name.
        prefix: of the full names, such as `dataset.`.
    """

    def __init__(self, file: Path, node: yaml.Node, lines: dict[str, int], prefix: str = ""):
        self.file, self.lines, self.prefix = file, lines, prefix
        self.line = node.start_mark.line + 1
        self.known: list[str] = []
        self.nodes: dict[str, yaml.Node] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self.error(prefix.rstrip("."), self.line, "needs keys with values: key: value.")
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in self.nodes:
                raise self.error(prefix + key.value, line, "is given twice. Remove one line.")
            self.nodes[key.value] = value
            lines[prefix + key.value] = line

    def error(self, key: str, line: int, message: str) -> UserError:
        """Return the error with file, line and key."""
        place = f"{self.file}, line {line}" + (f", {key}" if key else "")
        return UserError(f"{place}: {message}")

    def take(self, key: str, read: Read, default: Any = REQUIRED) -> Any:
        """Return the value of a key as `read` makes it, or the default.

        Raises:
            UserError: missing, or a value that does not fit.
        """
        self.known.append(key)
        full = self.prefix + key
        if key not in self.nodes:
            if default is REQUIRED:
                raise self.error(full, self.line, "is missing. Add it; docs/benchmark.md shows it.")
            return default
        node = self.nodes[key]
        try:
            return read(node)
        except Misfit as misfit:
            shown = node.value if isinstance(node, yaml.ScalarNode) else _plain(node)
            line = self.lines[full]
            raise self.error(full, line, f"{shown!r} does not fit. It takes {misfit}.") from None

    def section(self, key: str) -> "Section":
        """Return the mapping below a key."""
        return Section(self.file, self.take(key, lambda n: n), self.lines, f"{self.prefix}{key}.")

    def optional_section(self, key: str) -> "Section":
        """Return the mapping below a key, empty if it is missing."""
        if key in self.nodes:
            return self.section(key)
        self.known.append(key)
        empty = yaml.MappingNode("", [], yaml.Mark("", 0, self.line - 1, 0, None, None))
        return Section(self.file, empty, self.lines, f"{self.prefix}{key}.")

    def finish(self) -> None:
        """Raise UserError for keys that nobody took."""
        for key in self.nodes:
            if key not in self.known:
                line = self.lines[self.prefix + key]
                raise self.error(
                    self.prefix + key, line, f"is not known. Valid: {', '.join(self.known)}."
                )


def _plain(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)  # type: ignore[arg-type]


def text(node: yaml.Node) -> str:
    """A text that is not empty; as written, so `1e-3` stays `1e-3`."""
    if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
        raise Misfit("a text")
    return node.value.strip()


def flag(node: yaml.Node) -> bool:
    """True or false."""
    value = _plain(node)
    if not isinstance(value, bool):
        raise Misfit("true or false")
    return value


def whole(low: int) -> Read:
    """A whole number, `low` or more."""

    def read(node: yaml.Node) -> int:
        value = _plain(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise Misfit(f"a whole number, {low} or more")
        return value

    return read


def amount(node: yaml.Node) -> int | float:
    """A whole number above 0, or a share such as 10%, which becomes a fraction below 1."""
    try:
        written = text(node)
        if written.endswith("%"):
            share = float(written[:-1]) / 100
            if 0 < share < 1:
                return share
        return whole(1)(node)
    except (ValueError, Misfit):
        raise Misfit("a whole number, 1 or more, or a share such as 10%") from None


def count(amount: int | float, total: int) -> int:
    """How many an amount is."""
    return amount if isinstance(amount, int) else max(1, round(amount * total))


def number(low: float, high: float = float("inf")) -> Read:
    """A number above `low`, at most `high`."""

    def read(node: yaml.Node) -> float:
        try:
            value = float(text(node))
        except (ValueError, Misfit):
            value = float("nan")
        if not low < value <= high:
            raise Misfit(f"a number above {low:g}" + (f", at most {high:g}" if high < 9e9 else ""))
        return value

    return read


def choice(*options: str) -> Read:
    """One of some words."""

    def read(node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.value not in options:
            raise Misfit(" or ".join(options))
        return node.value

    return read


def several(read_one: Read, least: int = 1) -> Read:
    """A list without repetition."""

    def read(node: yaml.Node) -> tuple:
        if not isinstance(node, yaml.SequenceNode) or len(node.value) < least:
            raise Misfit("a list, such as [1, 2]")
        values = tuple(read_one(item) for item in node.value)
        if len(set(values)) < len(values):
            raise Misfit("a list that names nothing twice")
        return values

    return read


def sizes(node: yaml.Node) -> tuple[int, ...]:
    """A list of whole numbers above 0, which may repeat."""
    if not isinstance(node, yaml.SequenceNode) or len(node.value) < 2:
        raise Misfit("a list of at least two whole numbers")
    return tuple(whole(1)(item) for item in node.value)


def stages(node: yaml.Node) -> tuple[int, ...]:
    """Channels of at least three stages; with two, deep supervision has no scale that counts."""
    if not isinstance(node, yaml.SequenceNode) or len(node.value) < 3:
        raise Misfit("a list of at least three whole numbers")
    return sizes(node)


def or_none(read: Read) -> Read:
    """What `read` takes, or null."""
    return lambda node: None if _plain(node) is None else read(node)


def setting(node: yaml.Node) -> str:
    """The value of a trainer's setting as it is written in a trainer's name."""
    if isinstance(node, yaml.SequenceNode):
        return ",".join(text(item) for item in node.value)
    return text(node)


def read_spec(file: Path) -> Spec:
    """Read and check a spec; no data are looked at.

    Raises:
        UserError: names file, line and key, and what fits.
    """
    file = Path(file)
    try:
        content = file.read_text(encoding="utf-8")
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the spec {file}: {error}. Check the path.") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}, line {line}: not valid YAML, {error.problem}.") from error
    if root is None:
        raise UserError(f"{file} is empty. docs/benchmark.md shows a spec.")

    def path(node: yaml.Node) -> Path:
        found = file.parent / text(node)
        if not found.exists():
            raise Misfit(f"an existing file or folder; there is no {found}")
        return found

    lines: dict[str, int] = {}
    top = Section(file, root, lines)
    dataset = top.section("dataset")
    predict = top.optional_section("predict")
    evaluate = top.optional_section("evaluate")
    top.take("fold", choice("all"), "all")
    spec = Spec(
        file=file,
        text=content,
        lines=lines,
        name=top.take("name", text),
        about=top.take("about", text),
        protocol=top.take("protocol", choice(*PROTOCOLS)),
        source=dataset.take("source", text),
        order=dataset.take("order", path, None),
        groups=dataset.take("groups", path, None),
        test=read_test(top.section("test"), path),
        configuration=top.take("configuration", choice(*CONFIGURATIONS)),
        planner=top.take("planner", text, "ExperimentPlanner"),
        plans=read_plans(top.section("plans")) if "plans" in top.nodes else None,
        labeled=top.take("labeled", several(amount)),
        draws=top.take("draws", several(whole(0)), (0,)),
        seeds=top.take("seeds", several(whole(0))),
        trainers=top.take("trainers", several(text)),
        twin=top.take("twin", text, None),
        settings=read_settings(top),
        also=top.take("also", several(choice(*ALSO), least=0), ()),
        mirroring=predict.take("mirroring", flag, True),
        step_size=predict.take("step_size", number(0, 1), 0.5),
        device=top.take("device", choice("cuda", "cpu", "mps"), "cuda"),
        units=evaluate.take("units", choice("mm", "voxel", "both"), "mm"),
        tolerance=evaluate.take("tolerance", number(0), 1.0),
        circumference=evaluate.take("circumference", several(text), ()),
        pseudo_labels=top.take("pseudo_labels", whole(0), 0),
    )
    top.known.append("plans")
    for section in (dataset, predict, evaluate, top):
        section.finish()
    check_circumference(spec)
    check_planner(spec)
    check_trainers(spec)
    return spec


def read_test(section: Section, path: Read) -> HeldOut:
    """Read the section `test`.

    Raises:
        UserError: not exactly one way of naming test cases.
    """
    images, labels = section.take("images", path, None), section.take("labels", path, None)
    test = HeldOut(
        last=section.take("last", amount, None),
        names=section.take("list", path, None),
        part=section.take("set", choice("val", "test"), None),
        folders=(images, labels) if images and labels else None,
    )
    section.finish()
    ways = [test.last, test.names, test.part, images or labels]
    if sum(way is not None for way in ways) != 1 or (images is None) != (labels is None):
        raise section.error(
            "test", section.line, "takes exactly one of: last, list, set, images with labels."
        )
    return test


def read_plans(section: Section) -> SmallPlans:
    """Read the section `plans`."""
    plans = SmallPlans(
        features=section.take("features", stages),
        batch=section.take("batch", or_none(whole(2)), None),
        convs_per_stage=section.take("convs_per_stage", whole(1), 2),
        patch=section.take("patch", or_none(sizes), None),
    )
    section.finish()
    return plans


def read_settings(top: Section) -> dict[str, str]:
    """Read the section `settings`, whose keys the trainers know."""
    section = top.optional_section("settings")
    return {key: section.take(key, setting) for key in section.nodes}


def check_circumference(spec: Spec) -> None:
    """Raise UserError if circumferences are wanted in 3D, or without mm."""
    key = "evaluate.circumference"
    if spec.circumference and spec.configuration != "2d":
        raise spec.error(key, f"is for 2D images, not for {spec.configuration}. Leave it out.")
    if spec.circumference and spec.units == "voxel":
        raise spec.error(key, "is told in mm. Write units: mm or both, or leave it out.")


def check_planner(spec: Spec) -> None:
    """Raise UserError if nnU-Net has no such planner."""
    from nnunet_ssl.planning.api import plans_name_of

    try:
        plans_name_of(spec.planner)
    except UserError as error:
        raise spec.error("planner", str(error)) from error


def check_trainers(spec: Spec) -> None:
    """Check that each trainer and its twin exist and take the settings.

    Raises:
        UserError: with the line of the trainer or of the setting.
    """
    if spec.twin is not None:
        try:
            shared: Any = resolve(spec.twin)
        except UserError as error:
            raise spec.error("twin", str(error)) from error
        if shared.uses_unlabeled:
            raise spec.error("twin", f"{spec.twin} uses unlabelled scans. Name a supervised one.")
        refuse_seed(spec, "twin", spec.twin)
    for trainer in spec.trainers:
        try:
            cls: Any = resolve(trainer)
            twin: Any = resolve(twin_name(trainer, spec.twin))
        except UserError as error:
            raise spec.error("trainers", str(error)) from error
        refuse_seed(spec, "trainers", trainer)
        for key, value in spec.settings.items():
            full = f"settings.{key}"
            if key == "seed":
                raise spec.error(full, "belongs under seeds: [1, 2].")
            for part in (cls, twin):
                try:
                    parse_setting(part, key, value)
                except UserError as error:
                    fix = f"Settings of one trainer go into its name: {trainer}+{key}={value}."
                    raise spec.error(full, f"{error} {fix}") from error


def refuse_seed(spec: Spec, key: str, trainer: str) -> None:
    """Raise UserError if a trainer's name sets the seed, which all cells get from `seeds`."""
    for pair in trainer.split("+")[1:]:
        if pair.startswith("seed="):
            seed = pair.removeprefix("seed=")
            raise spec.error(key, f"{trainer}: the seed belongs under seeds: [{seed}].")


def twin_name(trainer: str, shared: str | None = None) -> str:
    """Return the name of a trainer's supervised twin, with its settings; `shared` replaces it.

    Raises:
        UserError: unknown trainer, or one without twin.
    """
    cls: Any = resolve(trainer)
    twin = shared or cls.twin
    if not twin:
        raise UserError(f"{trainer} has no supervised twin to stand beside. Name another trainer.")
    return twin
