"""What a training step keeps for its backward pass, for each trainer, against the supervised twin.

One step with all terms of the method on, on synthetic volumes, with the network that nnU-Net plans:
32 features at full resolution, two convolutions a stage. Counted are the tensors that PyTorch keeps
for backward, at their peak, each storage once and without the weights, in fp32 on a CPU. What
kernels need on the way and what an allocator holds is not in it. Ratios hardly depend on the patch.

    python benchmarks/step_memory.py [TRAINER ...]

Results: benchmarks/results/step_memory.json. Without names all trainers are measured; with names
the numbers of the others stay. Data and settings are those of the tests of all trainers.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nnunet_ssl.estimate import KeptBytes
from nnunet_ssl.evaluation.tasks import PACKAGES, commit, hardware
from nnunet_ssl.io import silence, write_json
from nnunet_ssl.naming import discovery_folder, resolve, trainer_classes

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "step_memory.json"
sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "trainers")]

from conftest import FOLDERS, with_needed  # noqa: E402 - tests are no package
from make_data import make_raw_dataset, preprocess_toy  # noqa: E402
from test_family import FULL, TAUGHT, start, taught  # noqa: E402

TWIN, REFERENCE = "SSLTrainerSupervised", "SSLTrainerMeanTeacher"
DATASETS = {"3d_fullres": (901, (32, 48, 48), 2), "2d": (902, (4, 64, 64), 4)}  # shape, batch
SEED = 1


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(name for name, cls in trainer_classes().items() if cls.uses_unlabeled)
    parser.add_argument("trainers", nargs="*", help="default: all")
    names = parser.parse_args().trainers or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such trainer: {', '.join(unknown)}. Known: {', '.join(known)}")

    found = json.loads(RESULTS.read_text(encoding="utf-8"))["trainers"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        jobs = [(n, c) for n in (TWIN, REFERENCE) for c in DATASETS]
        jobs += [(name, configuration_of(name)) for name in names if name != REFERENCE]
        for name, configuration in tqdm(jobs, desc="Trainers"):
            entry = measure(name, configuration) | {"commit": commit()}
            found.setdefault(name, {})[configuration] = entry
            tqdm.write(f"{name} {configuration}: {entry['kept_mb']} MB")
            write(found)


def write(found: dict[str, dict[str, dict]]) -> None:
    """Write what was measured so far, by trainer and configuration."""
    for name in found:
        for configuration, entry in found[name].items():
            for key, other in (("times_twin", TWIN), ("times_mean_teacher", REFERENCE)):
                if configuration in found.get(other, {}):
                    base = found[other][configuration]["kept_mb"]
                    entry[key] = round(entry["kept_mb"] / base, 2)
    content = {
        "what": __doc__.splitlines()[0],
        "trainers": dict(sorted(found.items())),
        "seed": SEED,
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "hardware": hardware("cpu"),
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(content, RESULTS)


def configuration_of(name: str) -> str:
    """Return the configuration a trainer is measured with."""
    return "3d_fullres" if "3d" in trainer_classes()[name].dims else "2d"


def prepare(root: Path) -> None:
    """Make and preprocess a data set for each configuration, and set nnU-Net's variables."""
    for name in FOLDERS:
        (root / name).mkdir()
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_extTrainer": str(discovery_folder())}
    for configuration, (number, shape, _) in DATASETS.items():
        with silence():
            make_raw_dataset(root / FOLDERS[0], number, shape=shape)
            folders = root / FOLDERS[0], root / FOLDERS[1]
            preprocess_toy(*folders, number, (configuration,), small=False)


def measure(name: str, configuration: str) -> dict[str, Any]:
    """Return what one step of a trainer keeps, and on what."""
    number, _, batch_size = DATASETS[configuration]
    base = Path(os.environ["nnUNet_preprocessed"]) / f"Dataset{number}_Toy"
    plans, dataset_json = (
        json.loads((base / file).read_text(encoding="utf-8"))
        for file in ("nnUNetPlans.json", "dataset.json")
    )
    plans["continue_training"] = False
    plans["configurations"][configuration]["batch_size"] = batch_size
    settings = f"{FULL.get(name, '')}+seed={SEED}"
    with silence():
        trainer: Any = resolve(with_needed(name + settings))(
            plans, configuration, "all", dataset_json, torch.device("cpu")
        )
        taught(start(trainer), TAUGHT.get(name, 0))
        batch = next(trainer.dataloader_train)
        with KeptBytes(trainer.network, trainer.companions) as kept:
            trainer.train_step(batch)
    return {
        "settings": with_needed(name + settings).partition("+")[2],
        "patch": trainer.configuration_manager.patch_size,
        "batch": batch_size,
        "features": trainer.configuration_manager.network_arch_init_kwargs["features_per_stage"],
        "kept_mb": round(kept.peak / 2**20, 1),
    }


if __name__ == "__main__":
    main()
