"""Atomic writes: a reader sees the old file or the whole new one, never a part."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
        with open(part, "rb") as f:
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
        part.write_text(text)


def write_json(obj: Any, path: str | os.PathLike) -> None:
    """Write `obj` as indented JSON to `path` atomically."""
    write_text(json.dumps(obj, indent=2) + "\n", path)
