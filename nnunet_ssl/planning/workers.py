"""One function over many cases, in this process or in a pool."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from nnunet_ssl.errors import UserError


class Workers:
    """Context manager around a lazily started pool; 1 process means this process.

    A worker that dies (out of memory) ends the work with an error; a `multiprocessing.Pool` would
    wait for its result for ever.

    Args:
        num_processes: cases worked on at the same time, >= 1.
    """

    def __init__(self, num_processes: int):
        if num_processes < 1:
            raise UserError(f"Number of processes is {num_processes}; give -np 1 or more.")
        self.num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, jobs: Sequence[tuple], description: str) -> list[Any]:
        """Return `[function(*job) for job in jobs]`, in that order, behind a progress bar.

        Raises:
            UserError: a worker process died.
            Exception: the first error of a job; jobs not yet started are dropped.
        """
        if self.num_processes == 1:
            return [function(*job) for job in tqdm(jobs, desc=description)]
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.num_processes, mp_context=spawn, initializer=_end_with_parent
            )
        try:
            futures = [self._pool.submit(function, *job) for job in jobs]
            for future in tqdm(as_completed(futures), desc=description, total=len(futures)):
                future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"A worker process died ({description}), most likely for lack of memory. Run the "
                f"same command again with fewer processes than {self.num_processes}: -np N. A "
                f"command without -np takes fewer if it may use fewer CPUs: taskset -c 0 COMMAND"
            ) from error
        return [future.result() for future in futures]


def available_cpus() -> int:
    """Return how many CPUs this process may use: those of its job, not all of the machine."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cpus = min(cpus, len(os.sched_getaffinity(0)))
    return cpus


def processes_for(cases: int) -> int:
    """Return processes for some cases: starting one takes as long as reading ten small ones."""
    return max(1, min(4, available_cpus(), cases // 10))


def _end_with_parent() -> None:
    """End this worker when its parent is killed; else it waits for jobs for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
