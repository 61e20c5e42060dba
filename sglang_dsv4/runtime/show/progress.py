"""A progress bar: in a terminal, in a notebook, or nowhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[int, str], None]
_SECONDS_BETWEEN_UPDATES = 0.2


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"


@contextmanager
def token_progress(total: int, *, enabled: bool) -> Iterator[Report]:
    """Show how many of ``total`` tokens are done.

    Yields:
        Report: call it with the number done and a short text.
    """
    if enabled and in_notebook():
        yield from _in_notebook(total)
    elif enabled and sys.stderr.isatty():
        yield from _in_terminal(total)
    else:
        yield lambda done, what: None


def _in_terminal(total: int) -> Iterator[Report]:
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, what: progress.update(task, completed=done, description=what)


def _in_notebook(total: int) -> Iterator[Report]:
    from IPython.display import DisplayHandle

    handle, started = DisplayHandle(), time.monotonic()
    shown_at = [0.0]

    def show(done: int, what: str) -> None:
        now = time.monotonic()
        if now - shown_at[0] >= _SECONDS_BETWEEN_UPDATES or done >= total:
            shown_at[0] = now
            handle.update(_Bar(done, total, f"{what}, {now - started:.1f} s"))

    handle.display(_Bar(0, total, ""))
    yield show


class _Bar:
    def __init__(self, done: int, total: int, what: str) -> None:
        self._done, self._total, self._what = done, total, what

    def __repr__(self) -> str:
        return f"{self._done}/{self._total} tokens, {self._what}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        share = f'<progress value="{self._done}" max="{max(1, self._total)}"></progress>'
        return {"text/plain": repr(self), "text/html": f"{share} {self!r}"}
