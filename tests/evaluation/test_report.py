"""The page, from small folders of runs whose numbers are known."""

import math
import re
import statistics as naive
from html.parser import HTMLParser

import numpy as np
import pytest
from make_runs import add_images, add_logs, make_cell, make_folder

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import figures
from nnunet_ssl.evaluation.folder import DICE, Runs
from nnunet_ssl.evaluation.report import on_grid, page_of, rows_of, write_report

METHOD, TWIN = "SSLTrainerBCP", "SSLTrainerSupervised"
GAINS = {0: 0.03, 1: 0.05, 2: 0.04}  # of the draws


def block(draws=(0, 1, 2), seeds=(1,), budget=4, name=METHOD):
    return [
        cell
        for draw in draws
        for seed in seeds
        for cell in (
            make_cell(TWIN, "twin", budget, draw, seed),
            make_cell(name, "method", budget, draw, seed),
        )
    ]


def scores(cell, case, name):
    value = 0.6 + 0.02 * case + (0.1 if name == "anterior" else 0)
    return value + (GAINS[cell["draw"]] if cell["role"] == "method" else 0)


class Text(HTMLParser):
    """All text of a page that is shown."""

    def __init__(self):
        super().__init__()
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("style", "title")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "title")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def page(folder, tmp_path):
    path = tmp_path / "report.html"
    write_report(folder, path)
    html = path.read_text(encoding="utf-8")
    parser = Text()
    parser.feed(html)
    return html, " ".join(" ".join(parser.parts).split())


def cells_of(runs, role):
    return [c for c in runs.done if c["role"] == role]


def test_sentence_table_and_interval_hold_the_numbers(tmp_path):
    folder = make_folder(tmp_path / "runs", block(), scores, distances=True)
    html, text = page(folder, tmp_path)
    # twin: mean of 0.6 + 0.02 * (0..4) and 0.1 more for one of two classes = 69 %
    # gains 3, 5, 4: mean 4, half 4.303 * 1 / sqrt(3) = 2.484
    assert "Mean Dice 73.0 % against 69.0 % of the twin: +4.0 points over 3 draws" in text
    assert "95 % interval +1.5 to +6.5" in text
    assert "▲ helped" in text
    assert "73.0 ± 1.0" in text and "69.0 ± 0.0" in text
    assert "+4.0 (+1.5 to +6.5)" in text
    assert "5 of 5 cases better" in text
    assert "hurt" not in re.sub(r"<style.*?</style>", "", html, flags=re.S).split("Wholly")[0]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({0: -0.03, 1: -0.05, 2: -0.04}, "▼ hurt"),
        ({0: 0.001, 1: -0.001, 2: 0.0}, "= no difference"),
        ({0: 0.02, 1: -0.03, 2: 0.04}, "? too few runs to say"),
        ({0: 0.0049, 1: 0.005, 2: 0.0051}, "▲ helped, by less than a point"),
    ],
)
def test_each_outcome_is_said(tmp_path, monkeypatch, gains, said):
    monkeypatch.setitem(globals(), "GAINS", gains)
    assert said in page(make_folder(tmp_path / "runs", block(), scores), tmp_path)[1]


def test_seeds_are_averaged_in_draws_and_sd_runs_over_all(tmp_path):
    def dice(cell, case, name):
        return scores(cell, case, name) + (0.02 * cell["seed"] if cell["role"] == "method" else 0)

    folder = make_folder(tmp_path / "runs", block(seeds=(1, 2)), dice)
    runs = Runs(folder)
    units, kind = runs.unit_differences(cells_of(runs, "method"), DICE)
    assert kind == "draws" and units.tolist() == pytest.approx([0.06, 0.08, 0.07])
    values = [100 * (0.69 + g + s) for g in GAINS.values() for s in (0.02, 0.04)]
    told = f"{naive.mean(values):.1f} ± {naive.stdev(values):.1f}"
    assert told in page(folder, tmp_path)[1]


def test_missing_values_are_counted_and_never_0(tmp_path):
    def dice(cell, case, name):
        if case == 0 and name == "posterior":
            return math.nan if cell["role"] == "twin" else 0.0
        return 0.8

    folder = make_folder(tmp_path / "runs", block(draws=(0,)), dice, distances=True)
    runs = Runs(folder)
    [twin], [method] = cells_of(runs, "twin"), cells_of(runs, "method")
    assert runs.score(twin, DICE) == pytest.approx(0.8)
    assert runs.score(method, DICE) == pytest.approx((0.8 + 0.64) / 2)
    assert runs.score(method, ("hd95", "mm")) == pytest.approx(2)
    # in the case without a value of the twin, the other class alone tells the gain
    assert runs.case_gains([method])["case_00"] == pytest.approx(0)
    text = page(folder, tmp_path)[1]
    # all four measures of the twin, the distances of the method: in the table and per class
    assert text.count("1 of 10 missing") == 2 * (4 + 2)
    assert text.count("1 of 5 missing") == 4 + 2


def invented(cell, case, name):
    """The twin finds the class `posterior`, which no case has, in one case."""
    if name == "anterior":
        return scores(cell, case, name)
    return 0.0 if cell["role"] == "twin" and case == 0 else math.nan


def test_a_class_that_one_run_alone_has_is_in_no_difference(tmp_path):
    bound = make_cell(TWIN, "bound", budget=60)

    def dice(cell, case, name):
        if cell["role"] == "bound":
            return math.nan if name == "posterior" else 0.94
        return invented(cell, case, name)

    folder = make_folder(tmp_path / "runs", [*block(), bound], dice, distances=True)
    runs = Runs(folder)
    methods = cells_of(runs, "method")
    units, _ = runs.unit_differences(methods, DICE)
    assert units.tolist() == pytest.approx([0.03, 0.05, 0.04])
    assert not len(runs.unit_differences(methods, DICE, "posterior")[0])
    text = page(folder, tmp_path)[1]
    assert "Mean Dice 78.0 % against 37.0 % of the twin: +4.0 points over 3 draws" in text
    assert "The difference is over the 15 of 18 scores (cases × classes × runs) that both" in text
    assert "+4.0 (+1.5 to +6.5) over 15 of 18 in both" in text
    assert "+20 %" in text  # 4 of the 20 points from 74, not of those from 37
    # distances: the twin's are missing in that class, too
    hd95 = ("hd95", "mm")
    assert runs.paired(methods, hd95) == (15, 15)


def test_a_case_that_one_run_alone_has_is_in_no_difference(tmp_path):
    def dice(cell, case, name):
        missing = case == 4 and name == "anterior" and cell["role"] == "method"
        return math.nan if missing else scores(cell, case, name)

    runs = Runs(make_folder(tmp_path / "runs", block(), dice))
    methods = cells_of(runs, "method")
    for name in (None, "anterior"):
        units, _ = runs.unit_differences(methods, DICE, name)
        assert units.tolist() == pytest.approx([0.03, 0.05, 0.04])
    assert runs.paired(methods, DICE) == (27, 30)
    # the mean that is shown is over what is there
    assert runs.score(methods[0], DICE) == pytest.approx((0.73 + 0.64) / 2 + 0.03)


def test_share_of_the_gap_to_the_bound(tmp_path):
    bound = make_cell(TWIN, "bound", budget=60)

    def dice(cell, case, name):
        return 0.89 if cell["role"] == "bound" else scores(cell, case, name)

    folder = make_folder(tmp_path / "runs", [*block(), bound], dice)
    text = page(folder, tmp_path)[1]
    assert "Gap closed" in text and "+20 %" in text  # 4 of 20 points
    assert "With 4 annotated cases" in text and "With all 60" not in text
    below = make_folder(tmp_path / "below", [*block(), bound], scores_with_low_bound)
    assert "+20 %" not in page(below, tmp_path)[1]


def scores_with_low_bound(cell, case, name):
    return 0.5 if cell["role"] == "bound" else scores(cell, case, name)


def test_names_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    cells = block(name=f"A$b_c$+key={evil}")
    cells.append(make_cell(evil, "method", state="failed") | {"error": evil, "log": evil})
    folder = make_folder(
        tmp_path / "runs",
        cells,
        scores,
        classes={evil: 1, "a&b": 2},
        name=evil,
        about=evil,
        command=evil,
    )
    add_images(folder)
    add_logs(folder)
    html, text = page(folder, tmp_path)
    assert "<script" not in html
    assert evil in text
    assert "A$b_c$" in text  # no mathematics


def test_the_page_loads_nothing_and_repeats_itself(tmp_path):
    folder = make_folder(tmp_path / "runs", [*block(), *block(budget=8)], scores, distances=True)
    add_images(folder)
    add_logs(folder)
    html, _ = page(folder, tmp_path)
    assert "http" not in html and "@import" not in html and "url(" in html
    assert set(re.findall(r"url\(([^)]*?)[\w-]*\)", html)) == {"#"}
    sources = re.findall(r'(?:src|href)="([^"]{1,30})', html)
    assert sources and all(s.startswith(("#", "data:image/jpeg")) for s in sources)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert {a or b for a, b in references} <= set(ids)
    assert page(folder, tmp_path)[0] == html
    assert len(html) < 400_000


def test_partial_folders_name_what_failed_and_what_waits(tmp_path):
    cells = block()
    cells[1] |= {"state": "failed", "error": "CUDA out of memory", "patches": None}
    cells[4] |= {"state": "waiting", "patches": None, "hardware": None, "peak_memory_mb": None}
    folder = make_folder(tmp_path / "runs", cells, scores)
    text = page(folder, tmp_path)[1]
    assert "4 finished, 1 failed, 1 waiting" in text
    assert "failed: draw 0, seed 1" in text and "CUDA out of memory" in text
    assert "+5.0 points over 1 run." in text and "at least 2 runs more" in text


def test_one_cell_alone(tmp_path):
    cell = make_cell(METHOD, "method")
    text = page(make_folder(tmp_path / "runs", [cell], scores), tmp_path)[1]
    assert "No run has finished together with its twin" in text and "72.0" in text


def test_only_a_bound_has_finished(tmp_path):
    cells = [c | {"state": "waiting"} for c in block()] + [make_cell(TWIN, "bound", budget=60)]
    folder = make_folder(tmp_path / "runs", cells, lambda *_: 0.9)
    assert "all annotated" in page(folder, tmp_path)[1]


def test_folds_of_compare_are_units(tmp_path):
    cells = [
        make_cell(name, role, 20, fold=str(fold))
        for fold in range(5)
        for name, role in ((TWIN, "twin"), (METHOD, "method"))
    ]
    folder = make_folder(tmp_path / "runs", cells, lambda *_: 0.0, units="folds")
    rows = ["cell,name,role,budget,draw,seed,fold,case,class,metric,unit,value"]
    for cell in cells:
        fold = int(cell["fold"])
        value = 0.7 + (0.01 * (fold + 1) if cell["role"] == "method" else 0)
        place = f"{cell['id']},{cell['name']},{cell['role']},20,0,1,{fold}"
        rows += [f"{place},case_{fold}_{k},anterior,dice,,{value}" for k in range(4)]
    (folder / "results.csv").write_text("\n".join(rows))
    text = page(folder, tmp_path)[1]
    assert "+3.0 points over 5 folds" in text and "▲ helped" in text
    assert "20 annotated cases, each left out of training once" in text
    assert "share training cases" in text


def test_stock_and_equal_compute_rows_stand_in_the_table_without_a_verdict(tmp_path):
    cells = block()
    for draw in GAINS:
        cells.append(make_cell("nnUNetTrainer", "stock", draw=draw))
        cells.append(make_cell(f"{TWIN}+num_epochs=93", "equal_compute", draw=draw))
    folder = make_folder(tmp_path / "runs", cells, scores)
    content = page_of(Runs(folder))
    [budget] = content["budgets"]
    assert [row.name for row, _, _ in budget["verdicts"]] == [METHOD]
    names = [row.name for row, _, _ in budget["table"]]
    assert names == [TWIN, METHOD, f"{TWIN}+num_epochs=93", "nnUNetTrainer"]


def test_different_commits_and_hardware_are_told(tmp_path):
    cells = block()
    cells[0] |= {"commit": "fffffff-dirty"}
    cells[1] |= {"hardware": {"cpu": "another"}}
    text = page(make_folder(tmp_path / "runs", cells, scores), tmp_path)[1]
    assert "come from different commits (2; see Runs below)" in text
    assert "come from different hardware (2; see Runs below). Times are not comparable" in text
    assert "different versions" not in text
    assert "changes of the code that no commit holds" in text


def test_different_number_formats_are_told_and_unknown_ones_are_none(tmp_path):
    cells = block()
    cells[0] |= {"precision": "bfloat16"}
    cells[1] |= {"precision": None}
    one = page(make_folder(tmp_path / "one", cells, scores), tmp_path)[1]
    assert "number formats" not in one and "trained in bfloat16" in one
    cells[1] |= {"precision": "float32"}
    two = page(make_folder(tmp_path / "two", cells, scores), tmp_path)[1]
    assert "come from different number formats (2; see Runs below)" in two


def test_one_draw_is_told(tmp_path):
    text = page(make_folder(tmp_path / "runs", block(draws=(0,)), scores), tmp_path)[1]
    assert "One draw of annotated cases only" in text


def test_a_verdict_of_fewer_than_three_draws_says_so(tmp_path):
    bound = make_cell(TWIN, "bound", budget=60)  # of draw 0, which is no draw
    cells = [*block(draws=(1, 2), seeds=(1, 2)), bound]
    text = page(make_folder(tmp_path / "two", cells, scores), tmp_path)[1]
    assert "▲ helped" in text and "+4.5 points over 4 runs of 2 draws, 95 %" in text
    assert "It holds for these 2 draws alone." in text
    assert "2 draws of annotated cases only" in text and "holds for these draws alone." in text
    cells = block(draws=(1,), seeds=(1, 2, 3))
    text = page(make_folder(tmp_path / "one", cells, scores), tmp_path)[1]
    assert "over 3 runs of 1 draw" in text and "It holds for this draw alone." in text
    # of three draws two have come to their end
    cells = block(seeds=(1, 2))
    cells[-1]["state"] = cells[-3]["state"] = "waiting"
    text = page(make_folder(tmp_path / "three", cells, scores), tmp_path)[1]
    assert "Fewer than 3 draws of annotated cases have finished of SSLTrainerBCP with 4" in text
    text = page(make_folder(tmp_path / "all", block(), scores), tmp_path)[1]
    assert "draws alone." not in text.replace("verdict holds for these draws alone. Cases", "")


OWN = f"{TWIN}+ema_decay=0.99+deploy=student"  # the twin that the method declares


def trained(bound_settings="", **twins):
    """Three draws of methods beside twins, and a bound; epochs and seeds as a spec sets them."""
    more = "+num_epochs=7+seed=1"
    cells = [make_cell(TWIN, "bound", budget=60, trainer=f"{TWIN}{bound_settings}{more}")]
    for draw in GAINS:
        for name in dict.fromkeys(twins.values()):
            cells.append(make_cell(name, "twin", draw=draw, trainer=f"{name}{more}"))
        for name, twin in twins.items():
            trainer = f"{name}{more}"
            cells.append(make_cell(name, "method", draw=draw, trainer=trainer, twin=twin))
    return cells


def test_a_twin_that_is_not_the_methods_own_is_told(tmp_path):
    own = trained("+ema_decay=0.99+deploy=student", SSLTrainerBCP=OWN, SSLTrainerUAMT=OWN)
    text = page(make_folder(tmp_path / "own", own, scores), tmp_path)[1]
    assert "the same network, trained in the same way on the annotated scans alone." in text
    assert "the twin to the same network trained with all annotations" in text
    assert "that as well" not in text

    shared = trained(SSLTrainerBCP=TWIN, SSLTrainerUAMT=TWIN, SSLTrainer=TWIN)
    text = page(make_folder(tmp_path / "shared", shared, scores), tmp_path)[1]
    told = (
        "The twin of SSLTrainerBCP, SSLTrainerUAMT has deploy=teacher, ema_decay=auto, where the "
        "method's own twin has deploy=student, ema_decay=0.99: the difference may come from that"
    )
    assert told in text
    assert "The twin of SSLTrainer has labeled_mix=0.0, where the method's own twin has" in text
    assert "in the same way" not in text and "not every method stands beside its own twin" in text
    assert "The bound has" not in text

    bound = trained("+labeled_mix=auto", SSLTrainerBCP=OWN)
    text = page(make_folder(tmp_path / "bound", bound, scores), tmp_path)[1]
    assert (
        f"The bound has deploy=teacher, ema_decay=auto, labeled_mix=auto, where the twin {OWN} has "
        "deploy=student, ema_decay=0.99, labeled_mix=0.0: the gap between them comes from that"
    ) in text
    assert "to the bound, a network trained with all annotations" in text
    assert "in the same way" in text


def test_trainers_that_are_not_known_are_told(tmp_path):
    text = page(make_folder(tmp_path / "runs", block(name="SSLTrainerMine"), scores), tmp_path)[1]
    assert "Trainers or settings that are not known here: SSLTrainerMine. Whether" in text
    assert "in the same way" not in text


def test_a_tolerance_that_yaml_takes_for_a_text(tmp_path):
    folder = make_folder(tmp_path / "runs", block(), scores, distances=True)
    (folder / "spec.yaml").write_text("protocol: raw\nevaluate: {tolerance: 1e-1}\n")
    assert "within 0.1 mm" in page(folder, tmp_path)[1]


# --- errors -------------------------------------------------------------------------------------


def test_errors_name_the_folder_and_the_fix(tmp_path):
    def refused(words, folder):
        with pytest.raises(UserError, match=words):
            write_report(folder, tmp_path / "report.html")
        assert not (tmp_path / "report.html").exists()

    refused(
        r"holds no runs.json. Give the folder that was the -o of nnunet_ssl benchmark", tmp_path
    )
    waiting = [c | {"state": "waiting"} for c in block()]
    waiting[0] |= {"state": "failed", "error": "no memory"}
    refused(
        r"No cell of .* has finished \(1 failed, 5 waiting\).*again.*no memory",
        make_folder(tmp_path / "waiting", waiting, scores),
    )
    other = make_folder(tmp_path / "other", block(), scores, format=7)
    refused("is not of format 1. Run the benchmark again", other)
    (other / "runs.json").write_text("{")
    refused("runs.json cannot be read", other)
    with pytest.raises(UserError, match="folder does not exist"):
        good = make_folder(tmp_path / "good", block(), scores)
        write_report(good, tmp_path / "nowhere" / "report.html")


def test_mixed_protocols_data_sets_and_test_cases_are_refused(tmp_path):
    cells = block()
    cells[0]["protocol"] = "cropped-literature"
    with pytest.raises(UserError, match="several values of protocol: cropped-literature, raw"):
        Runs(make_folder(tmp_path / "protocol", cells, scores))
    cells = block()
    cells[0]["dataset"] = "Dataset007_Pancreas"
    with pytest.raises(UserError, match=r"several values of dataset.*a folder of its own"):
        Runs(make_folder(tmp_path / "dataset", cells, scores))
    spec = make_folder(tmp_path / "spec", block(), scores)
    (spec / "spec.yaml").write_text("protocol: cropped-literature\n")
    with pytest.raises(UserError, match=r"spec.yaml says protocol cropped-literature, but"):
        Runs(spec)
    folder = make_folder(tmp_path / "cases", block(), scores)
    lines = (folder / "results.csv").read_text(encoding="utf-8").splitlines()
    (folder / "results.csv").write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=r"were tested on different cases \(case_04\)"):
        Runs(folder)
    (folder / "results.csv").write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(UserError, match=r"rows of cell .* twice"):
        Runs(folder)
    (folder / "results.csv").write_text("\n".join([*lines, "stranger" + lines[-1]]))
    with pytest.raises(UserError, match="does not know: stranger"):
        Runs(folder)


# --- images and curves --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_images_show_best_median_and_worst_case(tmp_path, dim):
    def dice(cell, case, name):
        gain = [0.01, 0.05, 0.03, 0.02, -0.01][case]
        return 0.5 + (gain if cell["role"] == "method" else 0)

    folder = make_folder(tmp_path / "runs", block(draws=(0,), seeds=(1, 2)), dice)
    add_images(folder, dim=dim)
    shown = page_of(Runs(folder))["examples"]
    [(budget, row, cases)] = shown["shown"]
    assert not shown["told"] and (budget, row.name) == ("4 annotated cases", METHOD)
    told = [(c["title"], c["case"], round(c["gain"], 6)) for c in cases]
    assert told == [("Best", "case_01", 5), ("Median", "case_03", 2), ("Worst", "case_04", -1)]
    assert cases[0]["dice"] == ["50.0\u00a0%", "55.0\u00a0%"]
    made = cases[0]["slice"]
    assert made.image.startswith("data:image/jpeg;base64,") and len(made.outlines) == 3
    assert all(len(paths) == 2 and all(paths) for paths in made.outlines)
    assert made.outlines[0] != made.outlines[1]


def test_missing_images_are_told_and_stop_nothing(tmp_path):
    folder = make_folder(tmp_path / "runs", block(draws=(0,)), scores)
    assert "No images: the annotations are not there" in page(folder, tmp_path)[1]
    add_images(folder)
    for path in (folder / "test_images").iterdir():
        path.unlink()
    html, text = page(folder, tmp_path)
    assert "Image (not there)" in text and "data:image" not in html
    (folder / "test_labels" / "case_00.nii.gz").write_bytes(b"")
    assert (
        "No images of SSLTrainerBCP, 4 annotated cases: case_00 cannot be read"
        in page(folder, tmp_path)[1]
    )
    for path in folder.glob("predictions/*/case_00.nii.gz"):
        path.unlink()
    assert re.search(r"No images of SSLTrainerBCP.* holds no case_00", page(folder, tmp_path)[1])


def test_the_slice_with_most_annotation_is_cut_with_the_aspect_of_the_spacing():
    annotation = np.zeros((6, 40, 40), np.uint8)
    annotation[4, 10:20, 10:20] = 1
    annotation[2, 10:12, 10:12] = 1
    segmentation = np.zeros_like(annotation)
    segmentation[4, 10:20, 10:15] = 1
    image = np.zeros(annotation.shape)
    made = figures.cut(image, [annotation, segmentation], [1, 2], spacing=(3, 1, 2))
    # 20 mm along x, 33.3 mm shown: 33 rows of 1 mm, of which 32 are inside, and 16 columns of 2 mm
    assert made.width == 200 * 32 / 32 and made.height == 200
    points = [list(map(float, re.findall(r"[\d.]+", p))) for p, empty in made.outlines]
    assert [empty for _, empty in made.outlines] == ["", ""]
    widths = [max(p[::2]) - min(p[::2]) for p in points]
    heights = [max(p[1::2]) - min(p[1::2]) for p in points]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)
    assert widths[0] == pytest.approx(2 * heights[0], rel=0.02)  # pixels are twice as wide as high


def test_slices_stand_along_a_much_coarser_axis():
    annotation = np.zeros((30, 30, 4), np.uint8)
    annotation[5:25, 5:25, 2] = 1
    made = figures.cut(None, [annotation], [1], spacing=(1, 1, 5))
    assert made.image == "" and made.width == made.height


def test_curves_are_means_over_parts_of_the_training():
    log = [
        {
            "progress": (k + 1) / 200,
            "terms": {"sup": float(k)},
            "pseudo_dice": {"student": [k, None]},
        }
        for k in range(200)
    ]
    grid = on_grid([log, log[:100]], "terms", "sup")
    assert grid.shape == (2, 100)
    assert grid[0].tolist() == [2 * k + 0.5 for k in range(100)]
    assert grid[1, :50].tolist() == grid[0, :50].tolist() and np.isnan(grid[1, 50:]).all()
    assert on_grid([log[:3]], "pseudo_dice", None)[0, 0] == 0.5
    assert np.isnan(on_grid([log], "terms", "unsup")).all()


def test_curves_and_pseudo_label_quality_are_drawn(tmp_path):
    folder = make_folder(tmp_path / "runs", block(), scores)
    add_logs(folder)
    html, text = page(folder, tmp_path)
    for title in ("Loss terms (weighted)", "Pseudo-labels", "Pseudo-Dice in training"):
        assert f'aria-label="{METHOD}, 4 annotated cases: {title}"' in html
    assert 'aria-label="Pseudo-labels, 4 annotated cases"' in html
    assert "unsup_ce" in text and "coverage" in text


def test_cost_is_measured_against_the_twin(tmp_path):
    folder = make_folder(tmp_path / "runs", block(), scores)
    text = page(folder, tmp_path)[1]
    assert "2.50 ×" in text and "32 000" in text and "1.5 GB" in text and "2.33 ×" in text
    runs = Runs(folder)
    assert [row.role for row in rows_of(runs, runs.budgets[0])] == ["twin", "method"]


def test_budgets_may_count_something_else_than_cases(tmp_path):
    folder = make_folder(tmp_path / "runs", block(), scores, budget_unit="patient")
    assert "With 4 annotated patients" in page(folder, tmp_path)[1]


def test_differences_are_means_over_cases_then_over_classes(tmp_path):
    """One class gains 10 points in each of five cases, the other loses 2 in its only one."""

    def dice(cell, case, name):
        if name == "posterior":
            return math.nan if case else 0.6 - 0.02 * (cell["role"] == "method")
        return 0.6 + 0.1 * (cell["role"] == "method")

    runs = Runs(make_folder(tmp_path / "runs", block(draws=(0,)), dice))
    units, _ = runs.unit_differences(cells_of(runs, "method"), DICE)
    assert units.tolist() == pytest.approx([(0.1 - 0.02) / 2])


def test_a_case_without_a_gain_in_one_run_is_judged_by_the_others(tmp_path):
    def dice(cell, case, name):
        if case == 0 and cell["draw"] == 0:
            return math.nan
        return 0.6 + 0.1 * (cell["role"] == "method")

    runs = Runs(make_folder(tmp_path / "runs", block(), dice))
    assert runs.case_gains(cells_of(runs, "method")).tolist() == pytest.approx([10] * 5)
