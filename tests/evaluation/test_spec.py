"""Specs: errors name file, line and key; cells and twins; those of the repository are valid."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cells import Place, chosen, expand, twin_of, with_twins
from nnunet_ssl.evaluation.spec import read_spec
from nnunet_ssl.naming import resolve

SPECS = Path(__file__).parents[2] / "benchmarks" / "specs"
SPEC = """\
name: toy
about: A toy.
protocol: raw
dataset:
  source: Dataset901_Toy
test:
  last: 2
configuration: 2d
labeled: [2, 4]
draws: [0, 1]
seeds: [1]
trainers: [SSLTrainer, SSLTrainerBCP]
settings:
  num_epochs: 3
  initial_lr: 1e-3
"""


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the spec after replacing a line, or with a line more."""

    def read(old="", new="", more=""):
        assert old in SPEC
        path = tmp_path / "toy.yaml"
        path.write_text(SPEC.replace(old, new) + more)
        return read_spec(path)

    return read


def test_values_and_defaults(read):
    spec = read(more="predict: {mirroring: false}\nplans: {features: [4, 8, 8], patch: null}\n")
    assert (spec.labeled, spec.draws, spec.seeds) == ((2, 4), (0, 1), (1,))
    assert spec.settings == {"num_epochs": "3", "initial_lr": "1e-3"}  # as written
    assert (spec.mirroring, spec.step_size, spec.device) == (False, 0.5, "cuda")
    assert spec.plans.features == (4, 8, 8) and spec.plans.patch is None
    assert (spec.units, spec.tolerance, spec.pseudo_labels) == ("mm", 1.0, 0)
    assert spec.circumference == ()
    # YAML itself takes this for a text
    assert read(more="evaluate: {tolerance: 1e-1}\n").tolerance == 0.1


@pytest.mark.parametrize(
    "old, new, line, words",
    [
        ("protocol: raw", "protocol: cropped", 3, "protocol: 'cropped' does not fit.*raw or crop"),
        ("about: A toy.\n", "", 1, "about: is missing. Add it"),
        ("labeled: [2, 4]", "labeled: 4", 9, r"labeled: '4' does not fit. It takes a list"),
        ("labeled: [2, 4]", "labeled: [2, 0]", 9, "labeled: .* a whole number, 1 or more"),
        ("labeled: [2, 4]", "labeled: [100%]", 9, "labeled: .* a share such as 10%"),
        ("draws: [0, 1]", "draws: [1, 1]", 10, "draws: .*names nothing twice"),
        ("  last: 2", "  first: 2", 7, "test.first: is not known. Valid: images, labels, last"),
        ("  last: 2", "  last: 2\n  set: val", 7, "test: takes exactly one of: last, list, set"),
        ("  last: 2", "  set: train", 7, "test.set: 'train' does not fit. It takes val or test"),
        ("  last: 2", "  list: no.txt", 7, "test.list: .*there is no .*no.txt"),
        ("  last: 2", "  images: .", 7, "exactly one of"),
        ("configuration: 2d", "configuration: 4d", 8, "configuration: '4d' .* 2d or 3d_lowres"),
        ("seeds: [1]", "seeds: [1]\nfold: 0", 12, "fold: '0' does not fit. It takes all"),
        ("seeds: [1]", "seed: [1]", 1, "seeds: is missing"),
        ("seeds: [1]", "seeds: [1]\nseeds: [2]", 12, "seeds: is given twice"),
        ("seeds: [1]", "seeds: [1]\ncolour: red", 12, "colour: is not known. Valid: .*labeled"),
        ("seeds: [1]", "seeds: [1]\nplanner: Best", 12, "planner: .*Best: nnU-Net has no such"),
        ("seeds: [1]", "seeds: [1]\nplans: {features: [4, 8]}", 12, "features: .*at least three"),
        ("seeds: [1]", "seeds: [1]\npredict: {step_size: 2}", 12, "above 0, at most 1"),
        (
            "seeds: [1]",
            "seeds: [1]\nevaluate: {units: voxel, circumference: [head]}",
            12,
            "evaluate.circumference: is told in mm. Write units",
        ),
        (
            "configuration: 2d",
            "configuration: 3d_fullres\nevaluate: {circumference: [head]}",
            9,
            "evaluate.circumference: is for 2D images, not for 3d_fullres",
        ),
        ("seeds: [1]", "seeds: [1]\nalso: [gold]", 12, "also: .*stock or bound or equal_compute"),
        ("SSLTrainerBCP", "SSLTrainerBPC", 12, "trainers: No trainer 'SSLTrainerBPC'. There are"),
        ("SSLTrainerBCP", "SSLTrainerBCP+box=2", 12, "trainers: .*box=2.* between 0 and 1"),
        ("seeds: [1]", "seeds: [1]\ntwin: SSLTrainerBCP", 12, "twin: .*Name a supervised one"),
        ("seeds: [1]", "seeds: [1]\ntwin: Nobody", 12, "twin: No trainer 'Nobody'"),
        ("num_epochs: 3", "num_epoch: 3", 14, "settings.num_epoch: .*no setting 'num_epoch'"),
        ("num_epochs: 3", "num_epochs: many", 14, "settings.num_epochs: .*a whole number"),
        ("num_epochs: 3", "box: 0.5", 14, r"settings.box: SSLTrainer has no .*into its name"),
        ("num_epochs: 3", "seed: 3", 14, "settings.seed: belongs under seeds"),
        ("SSLTrainerBCP", "SSLTrainer+seed=2", 12, r"trainers: SSLTrainer\+seed=2: .*seeds: \[2\]"),
        (
            "seeds: [1]",
            "seeds: [1]\ntwin: SSLTrainerSupervised+seed=2",
            12,
            r"twin: SSLTrainerSupervised\+seed=2: the seed belongs under seeds",
        ),
        ("seeds: [1]", "seeds: [1]\nevaluate: {tolerance: wide}", 12, "tolerance: 'wide' does not"),
        ("  last: 2", "  last: [2", 8, "not valid YAML"),
        ("  last: 2", "  2", 7, "test: needs keys with values"),
    ],
)
def test_errors_name_file_line_and_key(read, old, new, line, words):
    with pytest.raises(UserError) as error:
        read(old, new)
    assert re.search(rf"toy\.yaml, line {line}[,:] ?.*{words}", str(error.value), re.S), error.value


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the spec .*none.yaml.*Check the path"):
        read_spec(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"empty.yaml is empty. docs/benchmark.md"):
        read_spec(tmp_path / "empty.yaml")


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda p: p.stem)
def test_specs_of_the_repository_are_valid(path):
    spec = read_spec(path)
    assert spec.name == path.stem
    # a spoilt pool is that of one draw
    assert spec.draws == ((0,) if "spoil_pool.py" in spec.text else (0, 1, 2))
    assert "nnunet_ssl convert" in spec.text
    cells = expand(spec, 1000)
    for cell in cells:
        if cell.role == "method":
            assert any(c.id == cell.twin and c.role == "twin" for c in cells)


# --- cells --------------------------------------------------------------------------------------


def test_a_cell_for_each_budget_draw_and_seed_with_twins(read):
    cells = {c.id: c for c in expand(read("seeds: [1]", "seeds: [1, 2]"), 10)}
    assert len(cells) == 2 * 2 * 2 * 4
    bcp = cells["4labeled_draw1_seed2_SSLTrainerBCP"]
    assert bcp.trainer == "SSLTrainerBCP+num_epochs=3+initial_lr=1e-3+seed=2"
    assert (bcp.role, bcp.budget, bcp.budget_name, bcp.draw, bcp.seed) == ("method", 4, "4", 1, 2)
    twin = cells[bcp.twin]
    assert twin.name == "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    assert twin.role == "twin" and twin.twin is None
    expected = "SSLTrainerSupervised+num_epochs=3+initial_lr=1e-3+ema_decay=0.99+deploy=student"
    assert twin.trainer == f"{expected}+seed=2"
    assert bcp.step_cost == pytest.approx(4 / 3) and bcp.epochs == 3


def test_trainers_of_one_twin_share_it_and_named_twins_are_not_doubled(read):
    new = "[SSLTrainerSupervised, SSLTrainerFixMatch, SSLTrainerFixMatch+threshold=0.9]"
    cells = expand(read("[SSLTrainer, SSLTrainerBCP]", new), 10)
    assert [c.name for c in cells[:3]] == new.strip("[]").split(", ")
    assert len(cells) == 4 * 3
    assert {c.twin for c in cells[1:3]} == {cells[0].id}


def test_one_twin_for_all(read):
    cells = expand(read(more="twin: SSLTrainerSupervised\n"), 10)
    assert len(cells) == 4 * 3 and {c.twin for c in cells[1:3]} == {cells[0].id}


def test_a_trainer_without_twin(read, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.trainers.SSLTrainerBCP.twin", "")
    with pytest.raises(UserError, match=r"line 12, trainers: SSLTrainerBCP has no supervised twin"):
        read()


def test_settings_in_a_name_win_and_reach_the_twin_that_knows_them(read):
    new = "SSLTrainerBCP+num_epochs=9+box=0.5+ema_decay=0.9"
    cells = expand(read("SSLTrainerBCP", new), 10)
    bcp = next(c for c in cells if "BCP" in c.id)
    assert bcp.name == new and bcp.epochs == 9
    assert bcp.trainer.startswith("SSLTrainerBCP+num_epochs=9+initial_lr=1e-3+box=0.5")
    twin = next(c for c in cells if c.id == bcp.twin)
    assert twin.name == "SSLTrainerSupervised+ema_decay=0.9+deploy=student+num_epochs=9"
    name, auto = "SSLTrainerSupervised", {"labeled_mix": "auto"}
    assert twin_of("SSLTrainer+unsup_weight=2") == (name, auto)
    assert twin_of("SSLTrainer+labeled_mix=0") == (name, {"labeled_mix": "0"})


@pytest.mark.parametrize(
    "key, value, made, others",
    [
        ("labeled_mix", "0", 0.0, "+labeled_mix=0.5"),
        ("ema_decay", "0.9", 0.9, "+ema_decay=0.8"),
        ("deploy", "teacher", "teacher", "+deploy=student"),
    ],
)
def test_common_settings_win_over_the_twins_own_name(read, key, value, made, others):
    text = f"{key}: {value}"
    for twin in ("", "twin: SSLTrainerSupervised+labeled_mix=auto+ema_decay=0.99\n"):
        cells = expand(read("initial_lr: 1e-3", text, f"also: [bound, equal_compute]\n{twin}"), 10)
        assert {getattr(resolve(c.trainer), key) for c in cells} == {made}
    [twins, methods] = with_twins(
        [f"SSLTrainer{others}", f"SSLTrainerBCP{others}"], {key: value}, Place("here", 2, "2")
    )
    own = resolve(f"SSLTrainer{others}")
    assert {getattr(resolve(c.trainer), key) for c in twins + methods} == {getattr(own, key)}


def test_values_that_do_not_fit_the_twin_stay_with_the_method(read):
    cells = expand(read("SSLTrainerBCP", "SSLTrainerCPS+deploy=mean"), 10)
    method = next(c for c in cells if "CPS" in c.id)
    twin = next(c for c in cells if c.id == method.twin)
    assert resolve(method.trainer).deploy == "mean"
    assert twin.name == "SSLTrainerSupervised+ema_decay=None+deploy=student"
    # as compare calls it, for which this is a common setting
    name = "SSLTrainerCPS+deploy=mean"
    [twin], [method] = with_twins([name], {"deploy": "mean"}, Place("fold0", 5, "5"))
    assert method.trainer == name
    assert twin.trainer == "SSLTrainerSupervised+ema_decay=None+deploy=student"


@pytest.mark.parametrize(
    "trainers, settings",
    [
        ("SSLTrainer, SSLTrainer+num_epochs=3", "num_epochs: 3"),
        ("SSLTrainerSupervised, SSLTrainerSupervised+num_epochs=3", "num_epochs: 3"),
        ("SSLTrainer+warmup=0.2+num_epochs=4, SSLTrainer+num_epochs=4+warmup=0.2", ""),
        ("SSLTrainer+initial_lr=1e-2, SSLTrainer+initial_lr=0.01", ""),
        ("SSLTrainer, SSLTrainer+initial_lr=0.01", "num_epochs: 3"),  # nnU-Net's own
    ],
)
def test_two_names_of_one_training_are_refused(read, trainers, settings):
    first, second = map(re.escape, trainers.split(", "))
    spec = read("[SSLTrainer, SSLTrainerBCP]", f"[{trainers}]")
    spec = replace(spec, settings=dict(filter(None, [settings and settings.split(": ")])))
    with pytest.raises(UserError, match=f"line 12, trainers: {first} and {second} are the same"):
        expand(spec, 10)


def test_twins_of_one_training_run_once(read):
    first = "SSLTrainerFixMatch+weight_decay=0+num_epochs=4"
    new = f"[{first}, SSLTrainerUAMT+num_epochs=4+weight_decay=0]"
    more = "twin: SSLTrainerSupervised\n"
    twins = [c for c in expand(read("[SSLTrainer, SSLTrainerBCP]", new, more), 10) if "Sup" in c.id]
    assert len(twins) == 4 and all(c.name.endswith("decay=0+num_epochs=4") for c in twins)


def test_extra_rows(read):
    cells = expand(read(more="also: [stock, bound, equal_compute]\npseudo_labels: 3\n"), 10)
    by_role = {role: [c for c in cells if c.role == role] for role in {c.role for c in cells}}
    assert [c.id for c in by_role["bound"]] == ["all_seed1_SSLTrainerSupervised+labeled_mix=auto"]
    assert by_role["bound"][0].budget == 10 and by_role["bound"][0].twin is None
    assert len(by_role["stock"]) == 4
    stock = by_role["stock"][0]
    assert (stock.trainer, stock.name, stock.epochs) == ("nnUNetTrainer", "nnUNetTrainer", 1000)
    first, second = by_role["equal_compute"][:2]
    assert (first.epochs, second.epochs) == (7, 4)  # 3 epochs x 7/3 and 4/3
    assert "keep_at=0.4,0.7" in first.trainer
    assert first.name == "SSLTrainerSupervised+labeled_mix=auto+num_epochs=7"
    twins = {c.id for c in by_role["twin"]}
    assert {first.twin, second.twin, stock.twin} <= twins
    assert len({c.id for c in cells}) == len(cells)


def test_shares_become_numbers(read):
    spec = read("[2, 4]", "[10%, 25%, 7]")
    assert spec.labeled == (0.1, 0.25, 7)
    assert [c.budget for c in expand(spec, 41)[::8]] == [4, 10, 7]
    assert read("last: 2", "last: 20%").test.last == 0.2


def test_only_some_cells(read):
    cells = expand(read(), 10)
    assert len(chosen(cells, ["BCP"])) == 4 and chosen(cells, None) == cells
    assert len(chosen(cells, ["4labeled_draw1", "2labeled_draw0"])) == 8
    with pytest.raises(UserError, match=r"--only UAMT: no cell.*2labeled_draw0_seed1"):
        chosen(cells, ["BCP", "UAMT"])


def test_a_whole_name_is_one_cell(read):
    cells = expand(read("[SSLTrainer,", "[SSLTrainer, SSLTrainer+warmup=0.2,"), 10)
    name = next(c.id for c in cells if c.id.endswith("_SSLTrainer"))
    assert [c.id for c in chosen(cells, [name])] == [name]
    assert len(chosen(cells, [name, f"{name}+"])) == 2


def test_a_name_too_long_for_a_folder(read):
    pairs = "".join(f"+{k}=0.{'5' * 60}" for k in ("warmup", "rampup_end", "box_low", "box_high"))
    with pytest.raises(UserError, match=r"line 13, settings: make a name too long"):
        expand(read("[SSLTrainer,", f"[SSLTrainer{pairs},"), 10)
