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

# SGLang starts its processes afresh, and each imports everything again; after this it copies them, too. Two modules read
# variables while they are imported, which a copy has behind it when our plug-in sets them.
COPIES = """
import multiprocessing
multiprocessing.set_start_method = lambda *_, **__: None
from sglang.srt.models import deepseek_v4
deepseek_v4._FP8_WO_A_GEMM = False
import importlib.util
if importlib.util.find_spec("sglang.kernels.ops.attention.dsv4.gemm"):  # in 0.5.23 this is the default
    from sglang.kernels.ops.attention.dsv4 import gemm
    gemm._linear_bf16_fp32_algo = "cublas"
"""


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
        outputs = [self._new_output() for _ in programs]
        statuses = self._ask(list(programs.values()), outputs, is_awaited=True)
        return {
            name: (status, output.read_text(encoding="utf-8", errors="replace"))
            for name, output, status in zip(programs, outputs, statuses, strict=True)
        }

    def run_one(self, program: Program) -> tuple[int, str]:
        """Run one program; its exit status, and all that it printed."""
        return self.run({"": program})[""]

    def start(self, program: Program) -> tuple[int, Path]:
        """Start a program; its process id, which is that of its group too, and where it prints."""
        output = self._new_output()
        (process,) = self._ask([program], [output], is_awaited=False)
        return process, output

    def _new_output(self) -> Path:
        self._num_programs += 1
        return self._folder / f"{self._num_programs}.txt"

    def _ask(self, programs: list[Program], outputs: list[Path], *, is_awaited: bool) -> list[int]:
        jobs = [
            {**asdict(program), "output": str(output), "is_awaited": is_awaited}
            for program, output in zip(programs, outputs, strict=True)
        ]
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
