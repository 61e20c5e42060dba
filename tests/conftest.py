"""What every test gets: its own seed, one thread, poisoned allocations, and no way to be skipped except for a missing GPU."""

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import settings

from dsv4_kernels import memory

torch.set_num_threads(1)

# The same examples on every run and machine: a failure is never a matter of luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
# `make stress-cache`: new examples on every run.
settings.register_profile("long", deadline=None, print_blob=True)
settings.load_profile("repeatable")


# What runs in copies of one process (`tests.plugin.warm`) stays together and comes first: it takes longest.
LONGEST = (
    (
        "tests/plugin/test_server.py",
        "tests/plugin/test_commands.py",
        "tests/plugin/test_activation.py",
        "tests/plugin/test_restart.py",
        "tests/plugin/test_faults.py",
        "tests/plugin/test_loads_in_sglang.py",
    ),
)
TOGETHER = {file: number for number, files in enumerate(LONGEST) for file in files}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """With ``--dist loadfile``: hand out whole files to the processes, and some files together."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return str(TOGETHER.get(file, file))

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, then those with slow tests; skip `gpu` tests without a GPU."""
    slow = {item.module for item in items if "slow" in item.keywords}

    def place(item: pytest.Item) -> int:
        others = len(LONGEST) + (item.module not in slow)
        return TOGETHER.get(item.nodeid.partition("::")[0], others)

    items.sort(key=place)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Fail a test that skips itself: what is not run is not known to work."""
    report = yield
    if report.skipped and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped or xfailed; only tests marked gpu may be ({report.longrepr})"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Fail a module that skips itself, as `pytest.importorskip` would."""
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: a module may not be skipped ({report.longrepr})"
    return report


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's name, so that order and selection do not change its numbers."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what the cache and the kernels allocate with NaN: a test that passes has read nothing unwritten."""
    memory.set_poison(True)
    yield
    memory.set_poison(False)
