"""What all measuring scripts share: clock, memory of the process, provenance of numbers."""

import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.evaluation.tasks import PACKAGES, commit, hardware

RESULTS = Path(__file__).parent / "results"
MB = 2**20
STATUS = Path("/proc/self/status")  # Linux


def now(device: torch.device) -> float:
    """Return the time once the device is done; on a CPU that of this process alone."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def status(key: str) -> int:
    """Return a size from the kernel's account of this process, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def provenance(device: str) -> dict[str, Any]:
    """Return by what command, code and machine numbers came about."""
    script = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware(device),
        "load_average": round(os.getloadavg()[0], 1),  # of the last minute, this script in it
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }
