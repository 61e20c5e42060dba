"""Cores for `bench serve`: the busy threads of both sides run on the same ones.

The cores on which a server's scheduler runs influence the result more than anything else that is measured: one may share its
core with another busy thread, or with another machine's. The sides take turns, so they can have the same.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from sglang_dsv4.check.server import Server, processes

_SCHEDULER, _DETOKENIZER = "sglang::scheduler", "sglang::detokenizer"


class Cores(NamedTuple):
    """CPUs by their numbers: one for each thread that is busy, and the rest for all others.

    No busy thread shares its core with another, and nothing shares the scheduler's.
    """

    scheduler: int
    detokenizer: int
    server: int
    client: int
    others: tuple[int, ...]


def siblings(cpu: int) -> set[int]:
    """CPUs of the same core, this one too; where the system does not say, this one alone."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    found = {cpu}
    for part in path.read_text().strip().split(",") if path.is_file() else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def share_out(available: Iterable[int], siblings_of: Callable[[int], set[int]] = siblings) -> Cores | None:
    """Cores for a server and its client, or None where there are too few to keep any for one thread."""
    left, chosen = sorted(available), []
    taken: set[int] = set()
    for cpu in left:
        if cpu not in taken and len(chosen) < 4:
            chosen.append(cpu)
            taken |= siblings_of(cpu)
    if len(chosen) < 4:
        return None
    busy = {*chosen, *siblings_of(chosen[0])}
    others = tuple(cpu for cpu in left if cpu not in busy)
    return Cores(*chosen, others) if len(others) >= 4 else None


def pin(server: Server, cores: Cores) -> None:
    """Bind every thread of a server; threads that it starts later inherit their parent's cores.

    Raises:
        ValueError: it has not one scheduler and one detokenizer, by the names of its processes.
    """
    found: dict[int, str] = {}
    for process in processes(server.group):
        with suppress(psutil.NoSuchProcess):  # it may have ended
            found[process.pid] = " ".join(process.cmdline()[:1])
    mains = {server.group: cores.server}
    for title, core in ((_SCHEDULER, cores.scheduler), (_DETOKENIZER, cores.detokenizer)):
        titled = [pid for pid, name in found.items() if name.startswith(title)]
        if len(titled) != 1:
            raise ValueError(
                f"server {server.side.name}: expected one process {title} to bind to a core, got {len(titled)}; --any-core leaves "
                "that to the system"
            )
        mains[titled[0]] = core
    for pid in found:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            for thread in psutil.Process(pid).threads():
                core = mains.get(pid) if thread.id == pid else None
                os.sched_setaffinity(thread.id, cores.others if core is None else {core})


def pin_client(cores: Cores) -> None:
    """Bind this thread, which sends requests and reads answers."""
    os.sched_setaffinity(0, {cores.client})
