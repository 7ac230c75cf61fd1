"""The demo: its data, its table, its picture; the whole of it is slow."""

import csv
import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl import commands, demo
from nnunet_ssl.errors import UserError
from nnunet_ssl.synthetic import ORGANS, make_case, write_dataset

SMALL = (16, 24, 24)


def test_every_case_shows_every_organ_and_they_differ():
    rng = np.random.default_rng(0)
    cases = [make_case(rng) for _ in range(12)]
    for image, labels in cases:
        assert image.dtype == np.float32 and np.isfinite(image).all()
        assert set(np.unique(labels)) == {0, *ORGANS.values()}
        assert min(np.bincount(labels.ravel())) > 50
    volumes = [np.bincount(labels.ravel())[1] for _, labels in cases]
    assert max(volumes) > 1.3 * min(volumes)


def test_intensities_of_organs_overlap():
    image, labels = make_case(np.random.default_rng(1))
    dark, rest, bright, brighter = (image[labels == k] for k in (3, 0, 1, 2))
    for lower, higher in ((dark, rest), (rest, bright), (bright, brighter)):
        assert lower.mean() < higher.mean()
        assert np.quantile(lower, 0.95) > np.quantile(higher, 0.05)


def test_data_set_follows_the_seed_and_holds_no_mask_of_unlabeled_cases(tmp_path):
    def write(name, seed):
        raw = tmp_path / name / "raw"
        write_dataset(raw, tmp_path / name / "test", seed, 2, 3, 2, SMALL)
        return raw

    a, b, c = write("a", 5), write("b", 5), write("c", 6)
    voxels = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(r / "imagesUn" / "unlabeled_002_0000.nii.gz")))
        for r in (a, b, c)
    ]
    assert (voxels[0] == voxels[1]).all() and (voxels[0] != voxels[2]).any()
    assert len(list((a / "labelsTr").iterdir())) == 2
    assert len(list((a / "imagesUn").iterdir())) == 3
    assert not list(a.rglob("labelsUn")) and not list(a.rglob("*test*"))
    assert json.loads((a / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 2


def test_refuses_a_folder_with_other_files_and_empties_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(UserError, match=r"holds other files.*-o"):
        demo.prepare_folder(tmp_path, 0)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "text"

    mine = demo.prepare_folder(tmp_path / "demo", 0)
    (mine / "logs" / "old.log").write_text("")
    assert not (demo.prepare_folder(mine, 1) / "logs" / "old.log").exists()


def test_failing_command_tells_its_last_lines_and_its_log(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    program = tmp_path / "broken"
    program.write_text(f"#!{sys.executable}\nprint('the reason')\nraise SystemExit(3)\n")
    program.chmod(0o755)
    monkeypatch.setattr(commands.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)broken failed with code 3.*the reason.*step\.log"):
        demo.Runner(tmp_path, {})("step", ["broken"])
    assert "the reason" in (tmp_path / "logs" / "step.log").read_text(encoding="utf-8")


@pytest.fixture
def scored(tmp_path):
    """Test set, predictions (twin: truth; SSLTrainer: nothing found) and their summaries."""
    test = tmp_path / "test"
    write_dataset(tmp_path / "raw", test, 0, 1, 1, 4, SMALL)
    scores = {}
    for trainer, value in zip(demo.TRAINERS, (1.0, 0.0), strict=True):
        folder = tmp_path / "predictions" / trainer
        folder.mkdir(parents=True)
        cases = []
        for file in sorted((test / "labels").iterdir()):
            sitk.WriteImage(sitk.ReadImage(str(file)) * int(value), str(folder / file.name))
            metrics = {str(label): {"Dice": value} for label in ORGANS.values()}
            cases.append({"reference_file": str(file), "metrics": metrics})
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
        scores[trainer] = demo.read_dice(folder / "summary.json")
    return tmp_path, scores


def test_table_and_files_tell_what_came_out(scored):
    folder, scores = scored
    table = demo.dice_table(scores)
    assert "4 test cases" in table
    assert table.splitlines()[-1].split() == ["mean", "1.000", "0.000", "-1.000"]

    demo.write_results(folder, scores, {"seed": 3}, 60.0)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["mean_dice"]["SSLTrainer"]["mean"] == 0.0
    assert results["settings"]["seed"] == 3 and "smoke test" in results["remark"]
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 8 and rows[0]["organ_1"] == "1.0000"


def test_picture_shows_three_cases(scored):
    folder, scores = scored
    demo.draw_picture(folder / "demo.png", folder / "test", folder / "predictions", scores)
    picture = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "demo.png")))
    assert picture.shape[0] > 800 and picture.shape[1] > 1000
    assert picture[..., :3].std() > 10
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_whole_demo_within_ten_minutes(tmp_path, capsys):
    demo.run_demo(tmp_path / "demo")
    results = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    assert results["seconds"] < 600
    assert results["mean_dice"]["SSLTrainerSupervised"]["mean"] > 0.3
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    assert "mean" in capsys.readouterr().out
