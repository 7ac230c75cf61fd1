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
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gauges import MB, RESULTS, provenance
from tqdm import tqdm
from workbench import (
    FULL,
    TAUGHT,
    TWIN,
    build,
    kept_bytes,
    names_for,
    prepare,
    read_plans,
    resized,
    set_up,
    start,
    taught,
)

from nnunet_ssl.io import silence, write_json
from nnunet_ssl.naming import trainer_classes

OUTPUT = RESULTS / "step_memory.json"
REFERENCE = "SSLTrainerMeanTeacher"
DATASETS = {"3d_fullres": (901, (32, 48, 48), 2), "2d": (902, (4, 64, 64), 4)}  # shape, batch
SEED = 1


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = names_for(("2d", "3d"))
    parser.add_argument("trainers", nargs="*", help="default: all")
    names = parser.parse_args().trainers or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no such trainer: {', '.join(unknown)}. Known: {', '.join(known)}")

    found = json.loads(OUTPUT.read_text(encoding="utf-8"))["trainers"] if OUTPUT.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        set_up(Path(place))
        jobs = [(n, c) for n in (TWIN, REFERENCE) for c in DATASETS]
        jobs += [(name, configuration_of(name)) for name in names if name != REFERENCE]
        for name, configuration in tqdm(jobs, desc="Trainers"):
            entry = measure(name, configuration) | {"commit": provenance("cpu")["commit"]}
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
    kept = ("command", "hardware", "versions")  # the commit stands in each entry
    content = {
        "what": (__doc__ or "").splitlines()[0],
        "trainers": dict(sorted(found.items())),
        "seed": SEED,
        **{k: v for k, v in provenance("cpu").items() if k in kept},
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    write_json(content, OUTPUT)


def configuration_of(name: str) -> str:
    """Return the configuration a trainer is measured with."""
    return "3d_fullres" if "3d" in trainer_classes()[name].dims else "2d"  # type: ignore


@cache
def data_set(configuration: str) -> Path:
    """Return the preprocessed data set of a configuration."""
    number, shape, _ = DATASETS[configuration]
    return prepare(number, configuration, shape)


def measure(name: str, configuration: str) -> dict[str, Any]:
    """Return what one step of a trainer keeps, and on what."""
    base, batch_size = data_set(configuration), DATASETS[configuration][2]
    plans = resized(read_plans(base), configuration, batch=batch_size)
    with silence():
        trainer = build(
            f"{name}{FULL.get(name, '')}+seed={SEED}",
            base,
            plans,
            configuration,
            torch.device("cpu"),
        )
        taught(start(trainer), TAUGHT.get(name, 0))
        batch = next(trainer.dataloader_train)
        modules = trainer.network, trainer.companions
        kept = kept_bytes(modules, lambda: trainer.train_step(batch))
    return {
        "settings": type(trainer).__name__.partition("+")[2],
        "patch": trainer.configuration_manager.patch_size,
        "batch": batch_size,
        "features": trainer.configuration_manager.network_arch_init_kwargs["features_per_stage"],
        "kept_mb": round(kept / MB, 1),
    }


if __name__ == "__main__":
    main()
