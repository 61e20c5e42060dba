"""The checks that `bench kernels` makes before it times anything, with kernels interpreted; each must notice a planted fault.

Run as a program it makes every check and prints ``{check: "" or its fault}``.
"""

import sys
from functools import partial
from unittest import mock

import torch

from sglang_dsv4.bench import flush, index, step_plan
from sglang_dsv4.bench.cases import Case
from tests.kernels.interpreting import make_checks

CPU = torch.device("cpu")
MIXED = Case("mixed", (250, 3, 0), (9, 1, 4))  # across a page boundary; blocks that close, and one that stays open
CLOSED = Case("closed", (120, 5), (9, 1))  # of an HCA layer


def noticed(make, module, name, change):
    """Check the first job, then once more where ``change`` follows what a kernel of ``module`` writes."""
    next(make()).check()
    kernel = getattr(module, name)

    def wrong(*args, **kwargs):
        kernel(*args, **kwargs)
        change(*args)

    with mock.patch.object(module, name, wrong):
        job = next(make())
        try:
            job.check()
        except AssertionError:
            return
    raise AssertionError(f"{name}: a planted fault went unnoticed")


def some_bytes(pool):
    """Change 1 % of a pool."""
    pool.view(torch.uint8).flatten()[::100].add_(1)


@mock.patch.object(flush, "count_launches", lambda _: 1)
def check_flush():
    """Changed entries, and one changed number of the streams."""
    csa = partial(flush.flush, "csa-main", MIXED, "bf16", torch.float32, CPU)
    noticed(csa, flush, "flush_csa", lambda *args: args[2][0, 0, 0].add_(1))
    noticed(csa, flush, "flush_csa", lambda *args: some_bytes(args[4]))
    hca = partial(flush.flush, "hca", CLOSED, "fp8_584", torch.bfloat16, CPU)
    noticed(hca, flush, "flush_hca", lambda *args: some_bytes(args[3]))


def check_window():
    """Changed rows."""
    noticed(partial(flush.window, MIXED, "fp8_584", CPU), flush, "window_store", lambda *args: some_bytes(args[5]))


def check_step_plan():
    """One position changed."""
    make = partial(step_plan.step_plans, MIXED, CPU)
    noticed(make, step_plan, "step_plan", lambda *args: args[0].positions[2].add_(1))


@mock.patch.object(index.peer_index, "load", lambda _: (None, ""))
@mock.patch.object(index, "HEADS", 16)
@mock.patch.dict(index.TOPK, flash=16)
def check_index():
    """One choice changed; and wrong scores, for which the choice is right."""
    make = partial(index.select, Case("selected", (300,), (2,)), "flash", "bf16", CPU)
    noticed(make, index, "select_entries", lambda *args: args[7][0, 0].add_(1))
    assert [job.op for job in make()] == ["index select", "index scores", "index topk"]
    (short,) = index.select(Case("short", (30,), (2,)), "flash", "bf16", CPU)
    short.check()


CHECKS = {"flush": check_flush, "window": check_window, "step plan": check_step_plan, "index": check_index}

if __name__ == "__main__":
    sys.exit(make_checks(CHECKS))
