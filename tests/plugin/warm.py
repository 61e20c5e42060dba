"""A process that has imported SGLang, and runs programs in copies of itself.

SGLang's imports take seven seconds of a core, and most programs of these tests end a second later. A forked copy is what
the program's own process would be after its imports: nothing of ours is loaded, no plug-in, no argument read.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sglang_dsv4 import env

LIMIT_S = 240
PROCESS = Path(__file__).with_name("warm_process.py")


@dataclass(frozen=True)
class Program:
    """What one copy runs.

    Attributes:
        argv (list[str]): ``-m MODULE ...`` or ``-c CODE ...``, as after ``python``.
        variables (dict[str, str]): further environment variables.
        path (list[str]): folders before all others of `sys.path`, as PYTHONPATH puts them.
        before (str): code that runs first, to plant a fault.
    """

    argv: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    before: str = ""


class Warm:
    """The process; it ends with the ``with`` block.

    Args:
        folder (Path): for what the programs print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_programs = 0

    def __enter__(self) -> "Warm":
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROCESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**env.snapshot(), "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, programs: dict[str, Program]) -> dict[str, tuple[int, str]]:
        """Run programs at the same time.

        Returns:
            dict[str, tuple[int, str]]: exit status, and all that was printed.
        """
        jobs = []
        for program in programs.values():
            self._num_programs += 1
            output = str(self._folder / f"{self._num_programs}.txt")
            jobs.append({**asdict(program), "output": output})
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        statuses = json.loads(self._process.stdout.readline())
        return {
            name: (status, Path(job["output"]).read_text(encoding="utf-8", errors="replace"))
            for name, job, status in zip(programs, jobs, statuses, strict=True)
        }

    def run_one(self, program: Program) -> tuple[int, str]:
        """Run one program; its exit status, and all that it printed."""
        return self.run({"": program})[""]
