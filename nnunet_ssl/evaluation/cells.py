"""The cells of a benchmark: which trainer runs with which budget, draw and seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.spec import PSEUDO_LABELS_AT, Spec
from nnunet_ssl.naming import resolve

Role = Literal["method", "twin", "stock", "bound", "equal_compute"]
STOCK = "nnUNetTrainer"
STOCK_EPOCHS, STOCK_ITERATIONS = 1000, 250  # nnUNetTrainer's own schedule
LONGEST_NAME = 255  # bytes, of most file systems


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
        step_cost: of the method, in steps of its twin.
        epochs: of the training.
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


def parts_of(trainer: str) -> tuple[str, dict[str, str]]:
    """Take `Name+key=value` apart."""
    name, *pairs = trainer.split("+")
    return name, dict(pair.split("=", 1) for pair in pairs)


def join(name: str, settings: Mapping[str, str]) -> str:
    """Put a trainer's name together."""
    return "+".join([name, *(f"{k}={v}" for k, v in settings.items())])


def twin_of(trainer: str) -> tuple[str, dict[str, str]]:
    """Return the twin's name and its own settings.

    What the trainer's name sets and the twin knows, the twin gets as well: both then differ in the
    use of unlabelled scans alone.
    """
    cls: Any = resolve(trainer)
    name, settings = parts_of(cls.twin)
    known = resolve(name).settings()  # type: ignore[attr-defined]
    _, own = parts_of(trainer)
    return name, settings | {k: v for k, v in own.items() if k in known}


def expand(spec: Spec, training_groups: int) -> list[Cell]:
    """Return all cells: for each budget, draw and seed the trainers, each beside its twin.

    Args:
        spec: checked.
        training_groups: cases (groups) that are not for testing: the budget of the bound.

    Raises:
        UserError: a full name longer than file systems take.
    """
    common = dict(spec.settings)
    if spec.pseudo_labels:
        common["keep_at"] = ",".join(f"{f:g}" for f in PSEUDO_LABELS_AT)
    cells: dict[str, Cell] = {}
    for budget in spec.labeled:
        for draw in spec.draws:
            for seed in spec.seeds:
                place = {"budget": budget, "draw": draw, "seed": seed}
                for cell in _block(spec, common, **place):
                    cells.setdefault(cell.id, cell)
    if "bound" in spec.also:
        name, own = twin_of(spec.trainers[0])
        for seed in spec.seeds:
            cell = make_cell(
                "bound",
                name,
                own,
                common,
                budget=training_groups,
                draw=0,
                seed=seed,
                budget_name="all",
            )
            cells[cell.id] = cell
    for cell in cells.values():
        folder = f"{cell.trainer}__{'x' * 20}__{spec.configuration}"
        if len(folder.encode()) > LONGEST_NAME:
            raise spec.error(
                "settings", f"make a name too long for a folder: {cell.trainer}. Set less."
            )
    return list(cells.values())


def _block(
    spec: Spec, common: Mapping[str, str], budget: int, draw: int, seed: int
) -> Iterator[Cell]:
    """Cells of one budget, draw and seed; twins first, so that differences come early."""
    place: dict[str, Any] = {"budget": budget, "draw": draw, "seed": seed}
    methods, longer = [], []
    twins: dict[str, Cell] = {}
    for trainer in spec.trainers:
        name, own = parts_of(trainer)
        twin = make_cell("twin", *twin_of(trainer), common, **place)
        twins.setdefault(twin.id, twin)
        if resolve(trainer).uses_unlabeled:  # type: ignore[attr-defined]
            cell = make_cell("method", name, own, common, **place, twin=twin.id)
            methods.append(cell)
            if "equal_compute" in spec.also:
                epochs = str(round(cell.step_cost * twin.epochs))
                twin_name, twin_own = twin_of(trainer)
                own = {**twin_own, "num_epochs": epochs}
                longer.append(
                    make_cell("equal_compute", twin_name, own, common, **place, twin=twin.id)
                )
        else:
            cell = make_cell("twin", name, own, common, **place)
            twins.setdefault(cell.id, cell)
    yield from twins.values()
    yield from methods
    yield from longer
    if "stock" in spec.also:
        yield Cell(
            id=f"{budget}labeled_draw{draw}_seed{seed}_stock",
            name="nnUNetTrainer",
            role="stock",
            trainer=STOCK,
            twin=next(iter(twins)),
            budget_name=str(budget),
            fold="all",
            step_cost=1.0,
            epochs=STOCK_EPOCHS,
            **place,
        )


def make_cell(
    role: Role,
    trainer: str,
    own: Mapping[str, str],
    common: Mapping[str, str],
    *,
    budget: int,
    draw: int,
    seed: int,
    twin: str | None = None,
    budget_name: str | None = None,
) -> Cell:
    """Return the cell of a trainer with its own and the common settings; its own ones win."""
    full = join(trainer, {**common, **own, "seed": str(seed)})
    cls: Any = resolve(full)
    shown = join(trainer, {k: v for k, v in own.items() if common.get(k) != v})
    where = f"{budget}labeled_draw{draw}" if budget_name is None else budget_name
    return Cell(
        id=f"{where}_seed{seed}_{shown}",
        name=shown,
        role=role,
        trainer=full,
        twin=twin,
        budget=budget,
        budget_name=budget_name or str(budget),
        draw=draw,
        seed=seed,
        fold="all",
        step_cost=cls.step_cost,
        epochs=cls.num_epochs,
    )


def chosen(cells: Sequence[Cell], only: Sequence[str] | None) -> list[Cell]:
    """Return the cells whose id contains one of some words.

    Raises:
        UserError: a word that no id contains.
    """
    for word in only or ():
        if not any(word in cell.id for cell in cells):
            names = ", ".join(cell.id for cell in cells[:10])
            raise UserError(f"--only {word}: no cell is named like that. Some are: {names}.")
    return [c for c in cells if not only or any(word in c.id for word in only)]
