"""Run a command, keep all it says, follow the epochs of a training."""

import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError

LAST_LINES = 15
LINGER = 10  # seconds to read on after the end
EPOCH_ENDS = "Epoch time: "  # in a line of nnU-Net's training


def find_program(name: str) -> str:
    """Return the file of a console command that was installed for this Python.

    Raises:
        UserError: it lies neither where this Python installs commands, for all users or for this
            one, nor beside the running program or Python, nor in PATH.
    """
    tried = []
    for folder in filter(None, _program_folders()):
        if found := shutil.which(name, path=folder):
            return found
        tried.append(folder)
    if found := shutil.which(name):
        return found
    raise UserError(
        f"The command {name} is not in {', '.join(dict.fromkeys(tried))}, nor in PATH. Add its "
        f"folder to PATH, or install nnunet_ssl and nnunetv2 again for {sys.executable}."
    )


def _program_folders() -> Iterator[str]:
    yield sysconfig.get_path("scripts")
    if site.ENABLE_USER_SITE:  # not in a virtual environment
        yield sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    yield os.path.dirname(sys.argv[0])  # empty where argv tells no folder: `-c`
    yield os.path.dirname(sys.executable)


def run_command(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_epoch: Callable[[], object] | None = None,
) -> None:
    """Run a command that is installed for this Python, see `find_program`.

    Args:
        command: name and arguments.
        log: the command and its output are added to this file.
        environment: of the command, whole.
        on_epoch: called at the end of each training epoch.

    Raises:
        UserError: it is not installed, or it failed; tells its last lines and its log.
    """
    program = find_program(command[0])
    last: deque[str] = deque(maxlen=LAST_LINES)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            [program, *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                last.append(line)
                if on_epoch is not None and EPOCH_ENDS in line:
                    on_epoch()

        # a thread: workers of a training that was killed would keep the pipe open for ever
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        reader.join(timeout=LINGER)
    if process.returncode != 0:
        raise UserError(
            f"The command {command[0]} failed with code {process.returncode} (below 0: ended by "
            f"that signal):\n{''.join(last)}Whole output: {log}"
        )
