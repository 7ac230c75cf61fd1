"""Atomic writes."""

import errno
import json
import locale
import os

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import atomic_path, explain_os_error, write_json, write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.json"
    write_json({"a": [1, 2]}, path)
    write_json({"b": None}, str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": None}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path)
    with atomic_path(path) as part:
        part.write_text("half of the n")
        assert path.read_text(encoding="utf-8") == "old"
        part.write_text("new")
    assert path.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["disk is full", "Free some space"]),
        (errno.EDQUOT, ["quota", "Free some space"]),
        (errno.EACCES, ["not writable", "permissions"]),
        (errno.EPERM, ["not writable", "permissions"]),
        (errno.EROFS, ["read-only", "another folder"]),
        (errno.ENOENT, ["does not exist", "Create it"]),
        (errno.EIO, [os.strerror(errno.EIO)]),
    ],
)
def test_errors_leave_the_old_file_and_name_file_and_fix(number, words, tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path)
    with pytest.raises(UserError) as error, atomic_path(path) as part:
        part.write_text("half of the n")
        raise OSError(number, os.strerror(number))
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), TypeError("no JSON")])
def test_other_errors_pass_as_they_are_and_leave_the_old_file(error, tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path)
    with pytest.raises(type(error)), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    write_json({}, tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json({"a": {1, 2}}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {}
    assert os.listdir(tmp_path) == ["a.json"]


def test_really_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone/a\.txt: its folder does not exist"):
        write_text("x", tmp_path / "gone" / "a.txt")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_really_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="not writable"):
            write_text("x", tmp_path / "a.txt")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_really_full_disk(tmp_path):
    path = tmp_path / "a.txt"
    write_text("old", path)
    with (
        pytest.raises(UserError, match="disk is full"),
        atomic_path(path),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert path.read_text(encoding="utf-8") == "old"
    assert "disk is full" in explain_os_error(OSError(errno.ENOSPC, ""), path)


def test_text_is_utf8_whatever_the_locale(tmp_path):
    """Libraries that read images change the process's locale."""
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")
    try:
        write_text("Größe · 3 mm", tmp_path / "a.txt")
    finally:
        locale.setlocale(locale.LC_ALL, before)
    assert (tmp_path / "a.txt").read_bytes() == "Größe · 3 mm".encode()
