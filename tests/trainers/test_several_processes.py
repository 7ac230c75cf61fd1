"""Training by two processes: the same as one process with the joint batch. Gloo, on the CPU."""

import os
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from make_trainers import FOLDERS, new_trainer
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunet_ssl import base
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import gather, joint_roll, joint_sum, shared_count
from nnunet_ssl.history import LOG_NAME, History, read_log

PROCESSES = 2
# halves of a batch of 4: what is mixed in each half is what is mixed in the whole
HALVES = [0, 3], [1, 2]
IN_ORDER = [0, 1], [2, 3]
DEFAULT = "SSLTrainer+labeled_mix=0+threshold_low=0"
CASES = {
    "default": (f"{DEFAULT}+exchange_probability=0.5", "Toy", "2d"),
    "mixed": ("SSLTrainer+labeled_mix=0.5+threshold_low=0", "Toy", "2d"),
    "mixed3d": ("SSLTrainerSupervised+labeled_mix=1", "Toy", "3d_fullres"),
    "default3d": (f"{DEFAULT}+exchange_probability=0.5", "Toy", "3d_fullres"),
    "regions": (f"{DEFAULT}+exchange_probability=1", "RegionsIgnore", "2d"),
    "mean_teacher": ("SSLTrainerMeanTeacher", "Toy", "2d"),
    "fixmatch": ("SSLTrainerFixMatch+threshold=0.4", "Toy", "2d"),
    "bcp": ("SSLTrainerBCP", "Toy", "2d"),
    "m3hl": ("SSLTrainerM3HL+masked_features=true", "Toy", "2d"),
    "cps": ("SSLTrainerCPS+unsup_loss=ce_dice", "Toy", "2d"),
    "medl": ("SSLTrainerMEDL", "Toy", "2d"),
}
WHOLE = "SSLTrainer+save_every=1+warmup=0.5+rampup_end=0.5+unlabeled_foreground=0.5"


def part_of(batch, samples: list[int]):
    """Some samples of a loader's batch."""
    if isinstance(batch, dict):
        return {key: part_of(value, samples) for key, value in batch.items()}
    if isinstance(batch, list) and isinstance(batch[0], torch.Tensor):
        return [part_of(value, samples) for value in batch]
    if isinstance(batch, list):
        return [batch[i] for i in samples]
    return batch[samples]


def without_chance(trainer, patch: pytest.MonkeyPatch) -> None:
    """Replace what is drawn by what is the same for a batch and its halves."""

    def boxes(batch, spatial, *args, **kwargs):
        inside = torch.zeros(batch, 1, *spatial, dtype=torch.bool)
        inside[(..., *(slice(n // 4, 3 * n // 4) for n in spatial))] = True
        return inside

    def first_half(inside):
        first = torch.arange(len(inside)) < len(inside) // 2
        return inside == first.view(-1, *[1] * (inside.ndim - 1))

    module = sys.modules[type(trainer).__mro__[1].__module__]
    patch.setattr(module, "random_boxes", boxes, raising=False)
    patch.setattr(base, "random_boxes", boxes)
    patch.setattr(module, "add_noise", lambda x, *args: x, raising=False)
    trainer.strong_intensity = lambda x, valid: x
    trainer.strong_view = lambda *tensors: tensors
    trainer.draw = lambda: float(trainer.step % 2)  # both branches
    trainer.random_directions = first_half
    trainer.draw_true_voxels = lambda x: first_half(boxes(len(x), x.shape[2:]))
    # with several processes nnU-Net gives the lowest resolution a tiny weight instead of none
    if trainer.enable_deep_supervision:
        factors = list(trainer.loss.weight_factors)
        factors[-1] = 0
        trainer.loss.weight_factors = [f / sum(factors) for f in factors]


def train_on(batches: list[dict], key: str) -> dict:
    """Run some steps in the last part of a training; return what all processes must share."""
    name, dataset, configuration = CASES[key]
    trainer = new_trainer(name, dataset, configuration, batch=4)
    trainer.initialize()
    trainer.start_companions()
    trainer.step = 6  # of 8
    start = deepcopy(trainer.network.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        without_chance(trainer, patch)
        for batch in batches:
            trainer.train_step(batch)
            trainer.step = 7
    return {
        "start": start,
        "student": trainer.network.state_dict(),
        "companions": trainer.companions.state_dict(),
        "means": trainer._meter.means(),
    }


def work(rank: int, folder: Path) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    History.plot = LocalLogger.plot_progress_png = lambda *args: None  # slower than the toys
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    results: dict = {}
    for key in CASES:
        batches = torch.load(folder / f"{key}.pt", weights_only=False)
        # a box comes from the patch before, across processes
        halves = IN_ORDER if key.startswith("mixed") else HALVES
        results[key] = train_on([part_of(b, halves[rank]) for b in batches], key)
    results["refused"] = refusals()
    results["whole"] = whole_training(folder)
    logit = torch.tensor(float(rank), requires_grad=True)
    total = joint_sum(logit) ** 2
    total.backward()
    counts = [shared_count(torch.tensor(n)) for n in (rank, 0)]
    results["sum"] = [total.item(), logit.grad.item(), *(c.item() for c in counts)]
    results["rolled"] = joint_roll(torch.tensor([[7, rank]], dtype=torch.int16))
    torch.save(results, folder / f"result_{rank}.pt")
    dist.destroy_process_group()


def refusals() -> dict[str, str]:
    """What trainers say that cannot train so."""
    said = {}
    for key, name, batch in (
        ("method", "SSLTrainerUniMatch", 4),
        ("uneven", "SSLTrainer", 3),
        ("few", "SSLTrainerBCP", 2),
    ):
        before = set(Path(os.environ["nnUNet_results"]).rglob("*"))
        with pytest.raises((NotImplementedError, UserError)) as caught:
            new_trainer(name, configuration="2d", short=False, batch=batch)
        said[key] = str(caught.value)
        assert set(Path(os.environ["nnUNet_results"]).rglob("*")) == before
    return said


def whole_training(folder: Path) -> dict:
    """Train four epochs without a break, and with a kill after two."""
    finals = []
    for kill in (False, True):
        os.environ["nnUNet_results"] = str(folder / f"results_{kill}")
        trainer = new_trainer(WHOLE, configuration="2d", batch=4)
        if kill:
            start_epoch = trainer.on_epoch_start

            def die(start_epoch=start_epoch, trainer=trainer):
                if trainer.current_epoch == 2:
                    raise KeyboardInterrupt
                start_epoch()

            trainer.on_epoch_start = die
            with pytest.raises(KeyboardInterrupt):
                trainer.run_training()
            gather(None)  # the first process has written its checkpoint
            trainer = new_trainer(WHOLE, configuration="2d", batch=4)
            trainer.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
        trainer.run_training()
        finals.append(
            {"student": trainer.network.state_dict(), "others": trainer.companions.state_dict()}
        )
    log = read_log(Path(trainer.output_folder) / LOG_NAME)
    return {
        "finals": finals,
        "log": log,
        "patches": trainer.batch_size,
        "drawn": torch.rand(3),
        "foreground": sorted(trainer._places.now()),
    }


@pytest.fixture(scope="module")
def results(toy_root, tmp_path_factory) -> tuple[dict, list[dict]]:
    """Of the whole batch in this process, and of its halves in two others."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            patch.setenv(name, str(toy_root / name))
        patch.setenv("nnUNet_results", str(folder / "results"))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        alone = {}
        for key, (name, dataset, configuration) in CASES.items():
            trainer = new_trainer(name, dataset, configuration, batch=4)
            trainer.initialize()
            trainer.current_epoch = 3  # unlabelled patches are loaded by then
            loader, _ = trainer.get_dataloaders()
            batches = [next(loader) for _ in range(2)]
            torch.save(batches, folder / f"{key}.pt")
            alone[key] = train_on(batches, key)
        torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    together = [
        torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(PROCESSES)
    ]
    return alone, together


@pytest.mark.parametrize("key", CASES)
def test_two_processes_make_the_step_of_one_with_the_joint_batch(key, results):
    alone, (first, second) = results
    for part in ("student", "companions"):
        expected, a, b = (r[key][part] for r in (alone, first, second))
        assert expected.keys() == a.keys() == b.keys()
        for name, value in expected.items():
            assert torch.equal(a[name], b[name]), name
            assert torch.allclose(a[name].float(), value.float(), rtol=1e-4, atol=2e-6), name
    start = alone[key]["start"]
    moved = max((start[n] - v).abs().max().item() for n, v in alone[key]["student"].items())
    assert moved > 1e-4  # far more than the tolerance


@pytest.mark.parametrize("key", CASES)
def test_two_processes_log_what_one_with_the_joint_batch_logs(key, results):
    alone, (first, second) = results
    assert first[key]["means"] == second[key]["means"]
    assert alone[key]["means"].keys() == first[key]["means"].keys()
    for name, value in alone[key]["means"].items():
        assert first[key]["means"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_joint_sum_gives_each_process_the_gradient_of_all(results):
    _, together = results
    for rank, result in enumerate(together):
        # (0 + 1)^2 in each; its derivative 2 from each of the two
        assert result["sum"] == [1.0, 4.0, 0.5, 0.5], rank


def test_a_process_with_one_sample_gets_that_of_the_process_before(results):
    _, together = results
    for rank, result in enumerate(together):
        assert torch.equal(result["rolled"], torch.tensor([[7, 1 - rank]], dtype=torch.int16))


def test_a_killed_training_of_two_processes_goes_on_bit_exactly(results):
    _, together = results
    for part in ("student", "others"):
        states = [final[part] for result in together for final in result["whole"]["finals"]]
        for state in states[1:]:
            assert all(torch.equal(value, state[name]) for name, value in states[0].items())


def test_two_processes_draw_their_own_patches_and_write_one_log(results):
    _, (first, second) = results
    assert not torch.equal(first["whole"]["drawn"], second["whole"]["drawn"])
    assert first["whole"]["log"] == second["whole"]["log"]
    assert [record["epoch"] for record in first["whole"]["log"]] == [0, 1, 2, 3]
    # two steps an epoch, of half of the batch in each process
    assert first["whole"]["patches"] == 2
    patches = [record["patches"] for record in first["whole"]["log"]]
    assert patches[0] == {"labeled": 8, "unlabeled": 0}  # warm-up
    assert patches[-1] == {"labeled": 8, "unlabeled": 8}
    # each looked for foreground in another case, both know of it
    assert first["whole"]["foreground"] == second["whole"]["foreground"]
    assert len(first["whole"]["foreground"]) == PROCESSES


def test_what_cannot_be_shared_is_refused_before_any_work(results):
    _, together = results
    for result in together:
        said = result["refused"]
        assert "SSLTrainerUniMatch does not support training on several GPUs" in said["method"]
        assert "batch of 3 patches" in said["uneven"] and "-num_gpus" in said["uneven"]
        assert "at least 2" in said["few"]
