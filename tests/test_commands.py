"""Running a command: its log, its epochs, its end."""

import os
import signal
import sys
from pathlib import Path

import pytest

from nnunet_ssl import commands
from nnunet_ssl.errors import UserError


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that installs a program `tool` of some lines of Python."""
    monkeypatch.setattr(commands.sysconfig, "get_path", lambda name: str(tmp_path))

    def install(code):
        path = tmp_path / "tool"
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)

    return install


def test_everything_said_is_added_to_the_log_and_epochs_are_told(program, tmp_path):
    program("import sys\nprint('Epoch time: 3.1 s')\nprint(sys.argv[1:], file=sys.stderr)\n")
    log, epochs = tmp_path / "log", []
    for word in ("a b", "c"):
        commands.run_command(["tool", word], log, os.environ, lambda: epochs.append(1))
    text = log.read_text(encoding="utf-8")
    assert text.startswith("$ tool 'a b'\n") and text.count("Epoch time: 3.1 s\n") == 2
    assert "['a b']" in text and "['c']" in text and len(epochs) == 2


def test_a_killed_command_does_not_hang_on_what_it_left_running(program, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "LINGER", 0.1)
    left = tmp_path / "left"
    program(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "print('last words', flush=True)\nchild = os.fork()\n"
        f"if child:\n    Path({str(left)!r}).write_text(str(child))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(120)\n"  # as a loader's worker, which keeps the output open
    )
    try:
        with pytest.raises(UserError, match=r"(?s)tool failed with code -9.*last words.*log"):
            commands.run_command(["tool"], tmp_path / "log", os.environ)
    finally:
        os.kill(int(Path(left).read_text(encoding="utf-8")), signal.SIGKILL)


PLACES = ["scripts", "user", "argv", "python", "PATH"]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return the folders in which commands are looked for, by name in that order; all empty."""
    folders = {name: tmp_path / name for name in PLACES}
    for folder in folders.values():
        folder.mkdir()

    def get_path(name, scheme=None):
        return str(folders["user" if scheme else name])

    monkeypatch.setattr(commands.sysconfig, "get_path", get_path)
    monkeypatch.setattr(commands.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(commands.sys, "argv", [str(folders["argv"] / "nnunet_ssl")])
    monkeypatch.setattr(commands.sys, "executable", str(folders["python"] / "python"))
    monkeypatch.setenv("PATH", str(folders["PATH"]))
    return folders


def add_program(folder):
    path = folder / "tool"
    path.write_text("#!/bin/sh\necho found\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("place", PLACES)
def test_commands_are_found_wherever_they_were_installed(places, tmp_path, place):
    """After `pip install --user` they are not in the folder of this Python's own scripts."""
    for later in PLACES[PLACES.index(place) :]:
        add_program(places[later])
    assert commands.find_program("tool") == str(places[place] / "tool")
    commands.run_command(["tool"], tmp_path / "log", os.environ)
    assert "found" in (tmp_path / "log").read_text(encoding="utf-8")


def test_commands_of_the_user_do_not_count_in_a_virtual_environment(places, monkeypatch):
    add_program(places["user"])
    monkeypatch.setattr(commands.site, "ENABLE_USER_SITE", False)
    with pytest.raises(UserError, match="tool is not in"):
        commands.find_program("tool")


def test_a_command_that_is_nowhere(places, tmp_path, monkeypatch):
    monkeypatch.chdir(places["PATH"].parent)
    add_program(tmp_path)  # in the working folder, which does not count
    monkeypatch.setattr(commands.sys, "argv", ["-c"])
    with pytest.raises(UserError) as caught:
        commands.run_command(["tool"], tmp_path / "log", os.environ)
    expected = f"The command tool is not in {places['scripts']}, {places['user']}, "
    assert str(caught.value).startswith(expected + f"{places['python']}, nor in PATH.")
    assert "install nnunet_ssl and nnunetv2 again" in str(caught.value)
