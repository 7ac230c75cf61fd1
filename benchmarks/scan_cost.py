"""Memory and time of the selective scan against the plain loop over the tokens.

One sample of 15 000 tokens (a stage of 62 x 62 x 31 voxels at half resolution) with 128 channels
and 16 states, in fp32. "loop" is the recurrence as written, differentiated by autograd; "scan" is
`nnunet_ssl.functional.selective_scan`; on a GPU "kernel" is that of mamba-ssm, where its extension
is installed. Kept is what autograd holds between the passes, each piece of memory once; the peak is
what the process (on a GPU: PyTorch) takes more than before, at most, in a forward and backward
pass. Times are the shortest of a few runs: CPU time of one thread, or on a GPU until it is done.

    python benchmarks/scan_cost.py --device cpu

Results: benchmarks/results/scan_cost.json, one entry per device; others stay as they are.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from gauges import MB, now, status
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from nnunet_ssl.functional import scan
from nnunet_ssl.io import write_json

TOKENS, CHANNELS, STATES = 15_000, 128, 16
REPEATS = {"loop": 2, "scan": 7, "kernel": 7}
RESULTS = Path(__file__).parent / "results" / "scan_cost.json"

Inputs = tuple[Tensor, ...]
Run = Callable[..., Tensor]


def main() -> None:
    """Measure all ways on one device and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    ways: dict[str, Run] = {"scan": scan.blockwise_scan}
    if device.type == "cuda" and scan.cuda_kernel() is not None:
        ways["kernel"] = scan._run_kernel
    ways["loop"] = loop  # last: the many small tensors stay with the process

    inputs = draw(device)
    load = os.getloadavg()[0]
    measured = {name: measure(run, inputs, REPEATS[name]) for name, run in tqdm(ways.items())}
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    content["what"] = __doc__.splitlines()[0]
    content["sizes"] = {"batch": 1, "tokens": TOKENS, "channels": CHANNELS, "states": STATES}
    content[device.type] = {
        "ways": measured,
        "largest_difference_to_loop": differences(ways, inputs),
        "other_work": f"load average of {load:.1f} at the start, on {os.cpu_count()} cores"
        + ("; other work ran beside it" if load > 1 else ""),
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "commit": subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True
        ).strip(),
        "hardware": hardware(device),
        "versions": {name: version(name) for name in ("nnunet_ssl", "torch")}
        | {"python": platform.python_version()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(content, RESULTS)
    for name, values in measured.items():
        print(name, values)


def draw(device: torch.device) -> Inputs:
    """Return inputs as a fresh module gives them."""
    torch.manual_seed(0)
    u = torch.randn(1, TOKENS, CHANNELS)
    dt = torch.empty_like(u).uniform_(0.001, 0.1)
    a = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    b, c = torch.randn(1, TOKENS, STATES), torch.randn(1, TOKENS, STATES)
    tensors = u, dt, a, b, c, torch.ones(CHANNELS)
    return tuple(x.to(device).requires_grad_() for x in tensors)


def loop(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """Run the recurrence token by token."""
    state, rows = u.new_zeros(len(u), *a.shape), []
    for x, step, into, out in zip(u.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1), strict=True):
        state = torch.exp(step[..., None] * a) * state + (step * x)[..., None] * into[:, None]
        rows.append((state * out[:, None]).sum(-1) + skip * x)
    return torch.stack(rows, 1)


def measure(run: Run, inputs: Inputs, repeats: int) -> dict[str, float]:
    """Return memory in MB and times in seconds of one way."""
    device = inputs[0].device
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    before = reset_peak(device)
    y = run(*inputs)
    torch.autograd.grad(y.sum(), inputs)
    peak = read_peak(device) - before
    del y
    with saved_tensors_hooks(keep, lambda x: x):
        y = run(*inputs)
    del y
    times: dict[str, list[float]] = {"forward": [], "forward_backward": [], "no_grad": []}
    for _ in range(repeats):
        for name, context in (("no_grad", torch.no_grad()), ("forward", nullcontext())):
            with context:
                start = now(device)
                y = run(*inputs)
                times[name].append(now(device) - start)
        torch.autograd.grad(y.sum(), inputs)
        times["forward_backward"].append(now(device) - start)
    return {
        "kept_mb": round(sum(kept.values()) / MB, 1),
        "peak_mb": round(peak / MB, 1),
        **{f"{name}_s": round(min(values), 4) for name, values in times.items()},
    }


def differences(ways: dict[str, Run], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Return the largest differences to the loop, of values and, as a share, of gradients."""
    expected = loop(*inputs)
    grads = torch.autograd.grad(expected.sum(), inputs)
    found = {}
    for name, run in ways.items():
        if run is loop:
            continue
        y = run(*inputs)
        pairs = zip(torch.autograd.grad(y.sum(), inputs), grads, strict=True)
        found[name] = {
            "values": float((y - expected).detach().abs().max()),
            "gradients": max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs),
        }
    return found


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux
    return status("VmRSS")


def read_peak(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def hardware(device: torch.device) -> str:
    """Name the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, one used"


if __name__ == "__main__":
    main()
