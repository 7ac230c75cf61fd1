"""Processes: as many as this process may use CPUs, and what is told when one dies."""

import os

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.planning.workers import Workers, available_cpus, processes_for


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_cpus_of_the_job_count_not_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert available_cpus() == 2
    assert [processes_for(cases) for cases in (1, 25, 1000)] == [1, 2, 2]


def test_cpus_where_the_system_tells_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cpus() == 3 and processes_for(1000) == 3


def test_a_worker_that_dies_in_a_command_without_np():
    told = r"fewer processes than 2: -np N\. A command without -np takes .*: taskset -c 0 COMMAND"
    with pytest.raises(UserError, match=told), Workers(2) as workers:
        workers.map(os._exit, [(9,)], "work")
