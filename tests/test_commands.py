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
