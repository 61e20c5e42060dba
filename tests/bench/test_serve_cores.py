"""Which cores `bench serve` gives to whom."""

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from sglang_dsv4.bench.serve_cores import pin, share_out, siblings


def neighbours(cpu):
    return {cpu - cpu % 2, cpu - cpu % 2 + 1}


def halves(cpu):
    return {cpu % 8, cpu % 8 + 8}


@pytest.mark.parametrize("siblings_of", [lambda cpu: {cpu}, neighbours, halves])
def test_no_busy_thread_shares_a_core_with_another(siblings_of):
    cores = share_out(range(16), siblings_of)
    busy = cores[:4]
    assert len(set().union(*map(siblings_of, busy))) == 4 * len(siblings_of(0))
    assert not siblings_of(cores.scheduler) & set(cores.others)
    assert not set(busy) & set(cores.others) and len(cores.others) >= 4
    assert {*busy, *cores.others, *siblings_of(cores.scheduler)} == set(range(16))
    assert min(share_out(range(40, 56), siblings_of)[:4]) == 40, "only what this process may use"


@pytest.mark.parametrize(
    ("available", "siblings_of"), [(range(2), neighbours), (range(7), lambda cpu: {cpu}), (range(8), neighbours)]
)
def test_too_few_are_not_shared_out(available, siblings_of):
    assert share_out(available, siblings_of) is None


def test_the_system_says_which_cpus_are_one_core():
    for cpu in os.sched_getaffinity(0):
        found = siblings(cpu)
        assert cpu in found and all(siblings(other) == found for other in found)
    assert siblings(1 << 20) == {1 << 20}


PROGRAM = """
import subprocess, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
program, *names = sys.argv[1:]
for name in names:
    child = subprocess.Popen([name, '-c', program, program], executable=sys.executable, stdout=subprocess.PIPE)
    child.stdout.readline()
print('up', flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def running(*names):
    """A process with children of these names, a thread beside the main one in each."""
    command = [sys.executable, "-c", PROGRAM, PROGRAM, *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"up\n"
            yield SimpleNamespace(group=process.pid, side=SimpleNamespace(name="ours"))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def bound(monkeypatch):
    """What was asked of the system: CPUs by thread."""
    found = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda tid, cpus: found.update({tid: set(cpus)}))
    return found


def test_every_thread_of_a_server_is_bound(bound):
    cores = share_out(range(16), neighbours)
    names = {"sglang::scheduler": cores.scheduler, "sglang::detokenizer": cores.detokenizer, "other": None}
    with running(*names) as server:
        pin(server, cores)
        mains = {server.group: cores.server}
        for child in psutil.Process(server.group).children():
            mains[child.pid] = names[child.cmdline()[0]]
        threads = [(pid, thread.id) for pid in mains for thread in psutil.Process(pid).threads()]
    assert len(mains) == 4 and len(threads) == 8 and set(bound) == {thread for _, thread in threads}
    for pid, thread in threads:
        main = mains[pid] if thread == pid else None
        assert bound[thread] == (set(cores.others) if main is None else {main})


@pytest.mark.parametrize("names", [("sglang::scheduler",), ("sglang::scheduler",) * 2 + ("sglang::detokenizer",)])
def test_a_server_of_other_processes_is_refused_before_anything_is_bound(bound, names):
    with running(*names) as server, pytest.raises(ValueError, match="expected one process sglang::.*got [02]; --any-core"):
        pin(server, share_out(range(16), neighbours))
    assert not bound
