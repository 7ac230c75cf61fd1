"""Folders of nnU-Net, and small images in original layouts."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def raw_root(tmp_path, monkeypatch) -> Path:
    """An empty nnUNet_raw; the other folders of nnU-Net lie beside it."""
    for name in FOLDERS:
        (tmp_path / "nn" / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / "nn" / name))
    return tmp_path / "nn" / "nnUNet_raw"


@pytest.fixture
def heldout(raw_root) -> Path:
    return raw_root.parent / "nnunet_ssl_heldout"


@pytest.fixture
def write():
    """Return a function that writes an array (z, y, x) with spacing (x, y, z) in mm."""

    def write_array(array, path, spacing=None, origin=None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.asarray(array)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing or [1.0] * array.ndim)
        if origin:
            image.SetOrigin(origin)
        sitk.WriteImage(image, str(path))
        return path

    return write_array


@pytest.fixture
def make_case():
    """Return a function that makes an image and mask with values 0, 1 and 2, told by a seed."""

    def make(seed, shape=(4, 8, 8)):
        rng = np.random.default_rng(seed)
        mask = np.zeros(shape, np.uint8)
        mask[..., 2:6, 1:4] = 1
        mask[..., 2:6, 4:7] = 2
        return (rng.normal(100, 10, shape) + 50 * mask).astype(np.float32), mask

    return make


def names(folder: Path) -> list[str]:
    """Names in a folder, sorted; empty where there is none."""
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
