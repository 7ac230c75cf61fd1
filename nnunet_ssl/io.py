"""Files: complete when read, atomic when written (old or whole new, never a part)."""

import errno
import gzip
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield `<path>.part`; it takes the place of `path` when the block ends without error.

    Args:
        path: final file; its folder must exist.

    Raises:
        UserError: the disk is full or the folder is not writable; `path` is unchanged.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(explain_os_error(error, path)) from error
        raise


def explain_os_error(error: OSError, path: str | os.PathLike) -> str:
    """Return one line that names the file and what to do about the error."""
    fixes = {
        errno.ENOSPC: "the disk is full. Free some space and run the same command again",
        errno.EDQUOT: "your disk quota is used up. Free some space and run the same command again",
        errno.EACCES: "the folder is not writable. Change its permissions or use another folder",
        errno.EPERM: "the folder is not writable. Change its permissions or use another folder",
        errno.EROFS: "the file system is read-only. Use another folder",
        errno.ENOENT: "its folder does not exist. Create it first",
    }
    return f"Cannot write {path}: {fixes.get(error.errno or 0, str(error))}."


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(obj: Any, path: str | os.PathLike) -> None:
    """Write `obj` as indented JSON to `path` atomically."""
    write_text(json.dumps(obj, indent=2) + "\n", path)


@contextmanager
def silence() -> Iterator[None]:
    """Drop what nnU-Net prints; errors still come out as exceptions."""
    sink = StringIO()
    with redirect_stdout(sink), redirect_stderr(sink):
        yield


def environment_folder(variable: str) -> Path:
    """Return the folder that nnU-Net's environment variable names.

    Raises:
        UserError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"The environment variable {variable} is not set. Set it to a folder: "
            f"export {variable}=/path/to/{variable}"
        )
    return Path(value)


def check_complete(path: str | os.PathLike) -> None:
    """Read compressed files and NIfTI to the end: SimpleITK silently fills up what is cut off.

    Raises:
        OSError: the file is cut short or cannot be read (EOFError for cut gzip data).
    """
    path = Path(path)
    with open(path, "rb") as f:
        compressed = f.read(2) == b"\x1f\x8b"
    size = 0 if compressed else path.stat().st_size
    if compressed:
        with gzip.open(path) as g:
            while block := g.read(1 << 22):
                size += len(block)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        import nibabel

        image: Any = nibabel.load(path)
        needed = image.dataobj.offset + image.get_data_dtype().itemsize * math.prod(image.shape)
        if size < needed:
            raise OSError(f"{size} bytes of {needed} are there")


def has_nonfinite_nifti(path: str | os.PathLike) -> bool:
    """Tell whether a NIfTI file holds NaN or infinity, which ITK silently reads as 0."""
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return False
    import nibabel
    import numpy as np

    try:
        image: Any = nibabel.load(path)
        values = image.dataobj.get_unscaled() if image.get_data_dtype().kind == "f" else 0
    except Exception:  # odd headers, which nnU-Net's own reader accepted
        return False
    return not bool(np.isfinite(values).all())
