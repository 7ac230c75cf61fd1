"""What the documentation shows works."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.cells import twin_of
from nnunet_ssl.naming import discovery_folder, resolve

DOCS = Path(__file__).parent.parent / "docs"


def test_the_own_method_of_the_docs_trains_and_resumes(nnunet, no_plots, tmp_path, monkeypatch):
    code = re.search(
        r"```python\n(.*?)```", (DOCS / "own_method.md").read_text(encoding="utf-8"), re.S
    ).group(1)
    (tmp_path / "SSLTrainerEntropy.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", f"{discovery_folder()}{os.pathsep}{tmp_path}")
    short = "num_epochs=2+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1"
    found = recursive_find_trainer_class_by_name(f"SSLTrainerEntropy+{short}")
    base = nnunet / "nnUNet_preprocessed" / "Dataset901_Toy"

    def make():
        plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8")) | {
            "continue_training": False
        }
        dataset = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
        return found(plans, "3d_fullres", "all", dataset, torch.device("cpu"))

    trainer = make()
    trainer.run_training()
    terms = [r["terms"] for r in trainer._history.records]
    assert all(t["sup"] != 0 and t["unsup_entropy"] > 0 for t in terms)
    make().load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))


def test_own_methods_are_known_by_name(tmp_path, monkeypatch):
    """As in nnU-Net's finder, and to `list`, `compare`, `benchmark` and the time estimate."""
    for folder, weight in (("first", 0.2), ("second", 0.7)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            "from nnunet_ssl.base import SemiSupervisedTrainer\n"
            "Stock = object\n"
            f"class SSLTrainer{folder}(SemiSupervisedTrainer):\n    weight: float = {weight}\n"
            "    step_cost = 2.0\n"
        )
    paths = [discovery_folder(), tmp_path / "gone", tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(map(str, paths)))
    first, second = (resolve(f"SSLTrainer{n}+seed=3") for n in ("first", "second"))
    assert (first.weight, second.weight) == (0.2, 0.7) and first.seed == 3
    assert resolve("SSLTrainersecond+weight=1").weight == 1.0
    assert twin_of("SSLTrainerfirst+num_epochs=7") == ("SSLTrainerSupervised", {"num_epochs": "7"})
    for name in ("SSLTrainerthird", "Stock", "../mine"):
        with pytest.raises(UserError, match="belongs into a folder of nnUNet_extTrainer"):
            resolve(name)
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(UserError, match="No trainer 'SSLTrainerfirst'"):
        resolve("SSLTrainerfirst+seed=4")
