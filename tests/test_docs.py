"""What the documentation shows works."""

import json
import os
import re
from pathlib import Path

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ssl.naming import discovery_folder

DOCS = Path(__file__).parent.parent / "docs"


def test_the_own_method_of_the_docs_trains_and_resumes(nnunet, no_plots, tmp_path, monkeypatch):
    code = re.search(
        r"```python\n(.*?)```", (DOCS / "own_method.md").read_text(encoding="utf-8"), re.S
    ).group(1)
    (tmp_path / "SSLTrainerEntropy.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", f"{discovery_folder()}{os.pathsep}{tmp_path}")
    found = recursive_find_trainer_class_by_name("SSLTrainerEntropy")
    for name, value in {"num_epochs": 2, "num_iterations_per_epoch": 2}.items():
        monkeypatch.setattr(found, name, value)
    monkeypatch.setattr(found, "num_val_iterations_per_epoch", 1)
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
