"""The cells of a benchmark: which trainer runs with which budget, draw and seed."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.spec import PSEUDO_LABELS_AT, Spec, count, twin_name
from nnunet_ssl.naming import parse_setting, resolve
from nnunet_ssl.two_stages import pretraining_of

Role = Literal["method", "twin", "stock", "bound", "equal_compute"]
STOCK = "nnUNetTrainer"
STOCK_EPOCHS, STOCK_ITERATIONS = 1000, 250  # nnUNetTrainer's own schedule
LONGEST_NAME = 255  # bytes, of most file systems
NOT_TOLD = ("epochs", "pretraining")  # fields of a cell that runs.json does not hold


@dataclass(frozen=True)
class Cell:
    """One training with what follows it.

    Attributes:
        id: readable and unique; its folder.
        name: short name for tables: the trainer and the settings that the others do not have.
        role: method; its supervised twin; nnU-Net's own trainer, plans and schedule; the twin with
            all cases annotated; the twin with as much compute as the method.
        trainer: full name, for `-tr`.
        twin: id of the supervised cell to compare with, or None.
        budget: annotated cases (groups).
        budget_name: that number, or "all".
        draw: of the annotated cases.
        seed: of the training.
        fold: "all", or a number.
        step_cost: of the method, in steps of its twin, pre-training included.
        epochs: of the training.
        pretraining: full name of the trainer that it starts from, or None.
    """

    id: str
    name: str
    role: Role
    trainer: str
    twin: str | None
    budget: int
    budget_name: str
    draw: int
    seed: int
    fold: str
    step_cost: float
    epochs: int
    pretraining: str | None = None


def parts_of(trainer: str) -> tuple[str, dict[str, str]]:
    """Take `Name+key=value` apart."""
    name, *pairs = trainer.split("+")
    return name, dict(pair.split("=", 1) for pair in pairs)


def join(name: str, settings: Mapping[str, str]) -> str:
    """Put a trainer's name together."""
    return "+".join([name, *(f"{k}={v}" for k, v in settings.items())])


def fitting(trainer: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Return those of some settings that a trainer knows and whose values fit it."""
    cls: Any = resolve(trainer)
    known = {k: v for k, v in settings.items() if k in cls.settings()}
    return {k: v for k, v in known.items() if _fits(cls, k, v)}


def _fits(cls: type, key: str, value: str) -> bool:
    try:
        parse_setting(cls, key, value)
    except UserError:
        return False
    return True


def twin_of(
    trainer: str, shared: str | None = None, common: Mapping[str, str] | None = None
) -> tuple[str, dict[str, str]]:
    """Return the twin's name and its own settings; `shared` names one for all trainers.

    What the trainer's name sets and fits the twin, the twin gets as well: both then differ in the
    use of unlabelled scans alone. It wins over the `common` settings, which the caller adds; these
    win over what the twin's name sets.
    """
    name, settings = parts_of(twin_name(trainer, shared))
    given = fitting(name, common or {})
    _, own = parts_of(trainer)
    kept = {k: v for k, v in settings.items() if k not in given}
    return name, kept | fitting(name, own)


def training(trainer: str) -> Hashable:
    """Return what tells trainings apart: the trainer and the values of all its settings."""
    cls: Any = resolve(trainer)
    return parts_of(trainer)[0], frozenset(cls.settings().items())


@dataclass(frozen=True)
class Place:
    """What cells share that are to be compared; `label` starts their ids."""

    label: str
    budget: int
    budget_name: str
    draw: int = 0
    seed: int | None = None  # None leaves it to the trainers
    fold: str = "all"


def make_cell(
    role: Role,
    trainer: str,
    own: Mapping[str, str],
    common: Mapping[str, str],
    place: Place,
    twin: str | None = None,
) -> Cell:
    """Return the cell of a trainer with its own and the common settings; its own ones win."""
    settings = {**common, **own}
    if place.seed is not None:
        settings["seed"] = str(place.seed)
    full = join(trainer, settings)
    cls: Any = resolve(full)
    pretraining = pretraining_of(full)
    shown = join(trainer, {k: v for k, v in own.items() if common.get(k) != v})
    return Cell(
        id=f"{place.label}_{shown}",
        name=shown,
        role=role,
        trainer=full,
        twin=twin,
        budget=place.budget,
        budget_name=place.budget_name,
        draw=place.draw,
        seed=place.seed or 0,
        fold=place.fold,
        step_cost=cls.step_cost + (cost_beside(pretraining, cls) if pretraining else 0),
        epochs=cls.num_epochs,
        pretraining=pretraining,
    )


def make_twin(
    role: Role,
    trainer: str,
    common: Mapping[str, str],
    place: Place,
    shared: str | None = None,
) -> Cell:
    """Return the cell of a trainer's twin, with those common settings that fit it."""
    name, own = twin_of(trainer, shared, common)
    return make_cell(role, name, own, fitting(name, common), place)


def pretraining_task(cell: Cell, command: Sequence[str], model: Path) -> dict[str, Any] | None:
    """Return command and folder of the training that a cell starts from, if there is one.

    Args:
        cell: which trains.
        command: of its training.
        model: its folder of the fold.
    """
    if cell.pretraining is None:
        return None
    name = model.parent.name.replace(cell.trainer, cell.pretraining, 1)
    return {
        "command": [cell.pretraining if word == cell.trainer else word for word in command],
        "model": str(model.parent.with_name(name) / model.name),
    }


def cost_beside(pretraining: str, trainer: Any) -> float:
    """Return the cost of a pre-training, spread over the steps of a trainer."""
    first: Any = resolve(pretraining)
    steps = [c.num_epochs * c.num_iterations_per_epoch for c in (first, trainer)]
    return first.step_cost * steps[0] / steps[1]


def with_twins(
    trainers: Sequence[str],
    common: Mapping[str, str],
    place: Place,
    shared: str | None = None,
) -> tuple[list[Cell], list[Cell]]:
    """Return the twins of some trainers, each once, and the cells of the trainers themselves.

    A twin that is `shared` by all trainers saves runs; EMA and deployment may then differ too.

    Raises:
        UserError: two of the trainers are the same training.
    """
    named: dict[Hashable, str] = {}
    twins: dict[Hashable, Cell] = {}
    methods = []
    for trainer in trainers:
        name, own = parts_of(trainer)
        supervised = not resolve(trainer).uses_unlabeled  # type: ignore[attr-defined]
        if supervised:
            cell = make_cell("twin", name, own, common, place)
        else:
            twin = make_twin("twin", trainer, common, place, shared)
            twin = twins.setdefault(training(twin.trainer), twin)
            cell = make_cell("method", name, own, common, place, twin.id)
            methods.append(cell)
        key = training(cell.trainer)
        if key in named:
            raise UserError(
                f"{named[key]} and {trainer} are the same training, {cell.trainer}. Remove one."
            )
        named[key] = trainer
        if supervised:
            twins.setdefault(key, cell)
    return list(twins.values()), methods


def expand(spec: Spec, training_groups: int) -> list[Cell]:
    """Return all cells: for each budget, draw and seed the trainers, each beside its twin.

    Args:
        spec: checked.
        training_groups: cases (groups) that are not for testing: the budget of the bound.

    Raises:
        UserError: a full name longer than file systems take, or two names of one training.
    """
    common = dict(spec.settings)
    if spec.pseudo_labels:
        common["keep_at"] = ",".join(f"{f:g}" for f in PSEUDO_LABELS_AT)
    cells: list[Cell] = []
    for amount in spec.labeled:
        budget = count(amount, training_groups)
        for draw in spec.draws:
            for seed in spec.seeds:
                label = f"{budget}labeled_draw{draw}_seed{seed}"
                place = Place(label, budget, str(budget), draw, seed)
                try:
                    twins, methods = with_twins(spec.trainers, common, place, spec.twin)
                except UserError as error:
                    raise spec.error("trainers", str(error)) from error
                cells += twins + methods
                if "equal_compute" in spec.also:
                    cells += longer_twins(methods, twins, common, place)
                if "stock" in spec.also:
                    cells.append(stock_cell(place, twins[0].id))
    if "bound" in spec.also:
        for seed in spec.seeds:
            place = Place(f"all_seed{seed}", training_groups, "all", 0, seed)
            cells.append(make_twin("bound", spec.trainers[0], common, place, spec.twin))
    for cell in cells:
        folder = f"{cell.trainer}__{'x' * 20}__{spec.configuration}"
        if len(folder.encode()) > LONGEST_NAME:
            raise spec.error(
                "settings", f"make a name too long for a folder: {cell.trainer}. Set less."
            )
    return cells


def longer_twins(
    methods: Sequence[Cell], twins: Sequence[Cell], common: Mapping[str, str], place: Place
) -> list[Cell]:
    """Return the twins with as many epochs more as their methods' steps cost more."""
    by_id = {twin.id: twin for twin in twins}
    known = {training(twin.trainer) for twin in twins}
    longer: dict[Hashable, Cell] = {}
    for method in methods:
        twin = by_id[method.twin or ""]
        name, own = parts_of(twin.name)
        epochs = str(round(method.step_cost * twin.epochs))
        cell = make_cell(
            "equal_compute", name, {**own, "num_epochs": epochs}, common, place, twin.id
        )
        key = training(cell.trainer)
        if key not in known:
            longer.setdefault(key, cell)
    return list(longer.values())


def stock_cell(place: Place, twin: str) -> Cell:
    """Return the cell of nnU-Net's own trainer with its own plans and schedule."""
    return Cell(
        id=f"{place.label}_stock",
        name=STOCK,
        role="stock",
        trainer=STOCK,
        twin=twin,
        budget=place.budget,
        budget_name=place.budget_name,
        draw=place.draw,
        seed=place.seed or 0,
        fold=place.fold,
        step_cost=1.0,
        epochs=STOCK_EPOCHS,
    )


def chosen(cells: Sequence[Cell], only: Sequence[str] | None) -> list[Cell]:
    """Return the cells whose id contains one of some words; a whole id is that cell alone.

    Raises:
        UserError: a word that no id contains.
    """
    if not only:
        return list(cells)
    ids = {cell.id for cell in cells}
    wanted: set[str] = set()
    for word in only:
        found = {word} if word in ids else {i for i in ids if word in i}
        if not found:
            names = ", ".join(cell.id for cell in cells[:10])
            raise UserError(f"--only {word}: no cell is named like that. Some are: {names}.")
        wanted |= found
    return [cell for cell in cells if cell.id in wanted]
