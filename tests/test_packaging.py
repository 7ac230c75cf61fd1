"""What is installed: trainers, converters, discovery file, command."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_subpackages_import_from_any_folder(tmp_path):
    code = (
        "import nnunet_ssl.trainers, nnunet_ssl.dataset_conversion;"
        "from nnunet_ssl.naming import discovery_folder as f;"
        "assert list(f().glob('*.py')), f()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_command_is_installed():
    [command] = [
        p
        for name in ("nnunet_ssl", "nnunet_ssl.exe")
        if (p := Path(sys.executable).parent / name).exists()
    ]
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nnunet_ssl ")


@pytest.mark.slow
def test_wheel_holds_all_of_the_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True
    )
    [wheel] = tmp_path.glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    folders = {"trainers": "trainers", "dataset_conversion": "dataset_conversion"}
    for source, target in folders.items():
        for file in (ROOT / source).glob("*.py"):
            assert f"nnunet_ssl/{target}/{file.name}" in files
    for file in (ROOT / "nnunet_ssl").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in files
    assert not {f for f in files if f.startswith(("tests/", "trainers/"))}
