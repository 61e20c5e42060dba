"""What the stress test prints and draws."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sglang_dsv4.check.stress.summary import Run

_MIB = 1 << 20
_WHEN = ("used at start", "kept at start", "used at end", "kept at end")
FAULTS_SHOWN = 20
MEMORY = {
    "resident_bytes": "memory of the scheduler",
    "device_bytes": "device memory of the scheduler",
    "all_processes_bytes": "memory of all processes",
}


def print_run(console: Console, run: Run) -> None:
    """Figures, pools, and everything wrong."""
    facts = run.to_dict()
    table = Table("", "", title="Stress test", title_justify="left", show_header=False)
    rows = {
        "requests": f"{facts['requests']} in {run.load_s:.0f} s, {run.load.concurrency} at a time, seed {run.load.seed}",
        "workloads": _counts(facts["requests_by_workload"]),
        "compared": f"{facts['answers_compared']} answers, {facts['tokens_compared']} tokens, with {facts['references']} "
        "requests alone on a cold cache",
        "near-ties": f"{facts['doubts']} answers diverged at one and were compared anew from there; "
        f"{facts['uncompared_tails']} texts were not compared after one",
        "log-probabilities": f"largest difference {facts['largest_difference']:.2e}, allowed {run.judge.bound:.2e} "
        f"({run.bound_origin})",
        "control": run.control[0] if run.control else "noticed nothing",
        "ends": _counts(facts["finish"]),
        "seconds": _percentiles(facts["seconds"]),
        "first token, streams": _percentiles(facts["first_token_s"]),
        "cached prompt tokens": f"{facts['cached_share']:.1%}",
        "retractions": f"{facts['retractions']}, for which SGLang lost {facts['lost_logprobs']} log-probabilities",
        "cache": f"{facts['cache_bytes'] / _MIB:.1f} MiB",
    }
    for kind, title in MEMORY.items():
        if facts["memory_end"].get(kind):
            rows[title] = _memory(facts, kind)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    console.print(_usage(facts))
    _print_verdict(console, run)


def draw_run(run: Run, path: Path) -> None:
    """Requests per second, the use of the pools and memory over time, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom, memory = figure.subplots(3, 1, sharex=True)
    times = [sample.at_s for sample in run.samples]
    pairs = list(zip(run.samples, run.samples[1:], strict=False))
    rates = [(b.done - a.done) / (b.at_s - a.at_s) for a, b in pairs]
    top.plot(times[1:], rates, color="black")
    title = f"{len(run.outcomes)} requests, {run.load.concurrency} at a time: {len(run.faults)} faults"
    top.set(ylim=(0, None), ylabel="requests per second", title=title)
    for pool, use in run.start["usage"].items():
        live, kept = ([sample.usage[pool][kind] / use["total"] for sample in run.samples] for kind in ("used", "cached"))
        (line,) = bottom.plot(times, live, label=f"{pool.replace('_', ' ')} in use")
        if any(kept):
            both = [a + b for a, b in zip(live, kept, strict=True)]
            bottom.plot(times, both, color=line.get_color(), linestyle=":", label="and kept prefixes")
    bottom.set(ylim=(0, 1.05), ylabel="share of the pool")
    bottom.legend(fontsize="small", ncols=3)
    for kind, title in MEMORY.items():
        held = [sample.memory.get(kind, 0) / _MIB for sample in run.samples]
        if any(held):
            memory.plot(times, held, label=title)
    memory.set(ylim=(0, None), ylabel="MiB", xlabel="seconds")
    if memory.lines:
        memory.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(values.items()))


def _percentiles(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items()) or "none"


def _memory(facts: dict[str, Any], kind: str) -> str:
    """What grows until half way and not after that was warming up."""
    half = facts["memory_half"].get(kind, facts["memory_start"][kind])
    start, end = facts["memory_start"][kind], facts["memory_end"][kind]
    return f"{start / _MIB:.1f} MiB at the start, {half / _MIB:.1f} half way, {end / _MIB:.1f} at the end"


def _usage(facts: dict[str, Any]) -> Table:
    counted = [Column(name, justify="right") for name in ("total", *_WHEN)]
    table = Table("pool", *counted, title="Pools without a request", title_justify="left")
    for pool, before in facts["usage_start"].items():
        after = facts["usage_end"][pool]
        counts = (before["total"], before["used"], before["cached"], after["used"], after["cached"])
        table.add_row(pool.replace("_", " "), *map(str, counts))
    return table


def _print_verdict(console: Console, run: Run) -> None:
    faults = run.faults
    for fault in faults[:FAULTS_SHOWN]:
        console.print(Text(f"WRONG  {fault}", style="bold red"), soft_wrap=True)
    if len(faults) > FAULTS_SHOWN:
        console.print(f"... and {len(faults) - FAULTS_SHOWN} more")
    if faults:
        console.print(Text(f"FAILED  {len(faults)} faults", style="bold red"))
        return
    console.print(Text(f"RIGHT  {len(run.outcomes)} requests, 0 mismatches, 0 leaks", style="bold green"))
