import pytest
from make_data import make_raw_dataset


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty; returns their parent."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path


@pytest.fixture
def toy(roots):
    """Raw folder of a 3D data set: 3 annotated scans, 5 without masks."""
    return make_raw_dataset(roots / "raw")


@pytest.fixture
def base(roots):
    """Preprocessed folder of that data set."""
    return roots / "preprocessed" / "Dataset901_Toy"
