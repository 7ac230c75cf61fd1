"""The stock commands in fresh processes: train, SIGKILL, continue, predict, export."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_ssl.history import read_log

SETTINGS = "+num_epochs=4+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1+save_every=1"
# nnU-Net's command in a Python that cannot import our package
WITHOUT_US = (
    "import sys; sys.modules['nnunet_ssl'] = None\n"
    "from nnunetv2.inference.predict_from_raw_data import {entry}\n"
    "if __name__ == '__main__': {entry}()"
)


def command(name: str, *arguments: str) -> list[str]:
    return [str(Path(sysconfig.get_path("scripts")) / name), *arguments]


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {
        p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p)))
        for p in sorted(folder.glob("*.nii.gz"))
    }


@pytest.mark.parametrize(
    "trainer",
    [
        "SSLTrainer",
        pytest.param("SSLTrainerBCP", marks=pytest.mark.slow),
        pytest.param("SSLTrainerSupervised", marks=pytest.mark.slow),
    ],
)
def test_train_kill_continue_predict_and_share(trainer, nnunet, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    name = trainer + SETTINGS
    train = command("nnUNetv2_train", "901", "3d_fullres", "all", "-tr", name, "-device", "cpu")
    with subprocess.Popen(train, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "Epoch 2" in line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    model = tmp_path / "results" / "Dataset901_Toy" / f"{name}__nnUNetPlans__3d_fullres"
    fold = model / "fold_all"
    assert torch.load(fold / "checkpoint_latest.pth", weights_only=False)["current_epoch"] == 2
    subprocess.run([*train, "--c"], check=True, stdout=subprocess.DEVNULL)
    assert [r["epoch"] for r in read_log(fold / "ssl_log.jsonl")] == [0, 1, 2, 3]
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()

    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((nnunet / "nnUNet_raw/Dataset901_Toy/imagesUn").iterdir())[:2]:
        (images / path.name).symlink_to(path)
    monkeypatch.delenv("nnUNet_extTrainer")  # prediction needs neither variable nor package
    shared = ["-i", str(images), "-npp", "1", "-nps", "1", "-device", "cpu", "-f", "all"]
    stock = [sys.executable, "-c", WITHOUT_US.format(entry="predict_entry_point"), *shared]
    out = tmp_path / "stock"
    subprocess.run(
        [*stock, "-o", str(out), "-d", "901", "-c", "3d_fullres", "-tr", name],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    predicted = labels(out)
    assert len(predicted) == 2

    slim = tmp_path / "to_share"
    subprocess.run(
        command("nnunet_ssl", "export", "-i", str(model), "-o", str(slim)),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    full_size = os.path.getsize(fold / "checkpoint_final.pth")
    assert os.path.getsize(slim / "fold_all" / "checkpoint_final.pth") < full_size / 2
    by_folder = WITHOUT_US.format(entry="predict_entry_point_modelfolder")
    out = tmp_path / "shared"
    subprocess.run(
        [sys.executable, "-c", by_folder, *shared, "-o", str(out), "-m", str(slim)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for case, array in labels(out).items():
        assert np.array_equal(array, predicted[case])
