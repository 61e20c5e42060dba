"""Make the CPU environment `.venv` of this checkout, or do nothing where it is already the one that is asked for.

Run by `make env`. A version of SGLang as argument makes `.venv-<version>` as well: a layer over `.venv` that holds what differs.
Needs nothing but Python's standard library. Where packages come from is pip's own configuration
(`PIP_INDEX_URL`, `PIP_EXTRA_INDEX_URL`, pip.conf); the versions are in `constraints/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "stamp.json"
LOG = VENV / "install.log"
CONSTRAINTS = ROOT / "constraints"
SHIMS = ROOT / "cpu-shims"

# The SGLang of `.venv`; a file of `constraints/` has what goes with each version.
DEFAULT = "0.5.17"

PYTHONS = ((3, 11), (3, 12))
# The finished environment takes 2.3 GB; pip unpacks and caches beside it.
NEEDED_BYTES = 4 * 10**9

NEVER_IMPORTED = r"/site-packages/(.*/)?(tests?|testing|multimodal_gen|transformers/models)/"

UNREACHABLE = re.compile(
    r"NewConnectionError|name resolution|ConnectTimeout|ProxyError|Connection refused|Network is unreachable"
)
PIP_STEP = re.compile(r"\s*(?:Collecting|Downloading|Using cached|Processing|Obtaining|Building wheel for) (\S+)")
NO_VERSION = re.compile(r"No matching distribution found for (\S+)")


class EnvError(Exception):
    """What stands in the way, as one sentence for the user."""


class Progress:
    """One line that is redrawn on a terminal, or a line now and then in a log."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.printed_at = total, time.monotonic(), 0.0
        self.tty = sys.stdout.isatty()

    def show(self, done: int, what: str) -> None:
        """Draw ``done`` of ``total`` and what is being done; a log gets a line every ten seconds."""
        seconds = time.monotonic() - self.start
        done = min(done, self.total)
        filled = 30 * done // self.total
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {100 * done // self.total:3d} %  {seconds:3.0f} s  {what}"
        if self.tty:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif seconds - self.printed_at >= 10:
            self.printed_at = seconds
            print(line, flush=True)

    def close(self) -> None:
        """Leave the line behind."""
        if self.tty:
            print("\r\033[K", end="", flush=True)


def wanted() -> dict[str, str]:
    """What an up-to-date environment was made from; equal to its stamp where nothing has to be done."""
    digest = hashlib.sha256()
    sources = [ROOT / "pyproject.toml", Path(__file__).resolve(), *CONSTRAINTS.glob("*.txt")]
    sources += [p for p in SHIMS.rglob("*") if p.suffix in (".py", ".pth", ".toml") and "build" not in p.parts]
    for path in sorted(sources):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    python = "{}.{}".format(*sys.version_info)
    return {"python": python, "root": str(ROOT), "inputs": digest.hexdigest()}


def found() -> dict[str, str]:
    """The stamp of the environment that is there: empty where there is none, or where its making was cut short."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8")) if PYTHON.exists() else {}
    except (FileNotFoundError, ValueError):
        return {}


def check_machine() -> None:
    """Raise EnvError where an environment cannot be made here."""
    if sys.version_info[:2] not in PYTHONS:
        names = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        raise EnvError(
            f"the environment needs Python {names}, and {sys.executable} is {sys.version.split()[0]}; "
            "name another one, as in `make env PYTHON=python3.11`"
        )
    if VENV.exists() and not STAMP.exists():
        raise EnvError(f"{VENV} is not an environment that `make env` made; move it away or remove it")
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES and not found():
        raise EnvError(f"the environment needs {NEEDED_BYTES / 1e9:.0f} GB of free disk, and {ROOT} has {free / 1e9:.1f} GB")


def make_venv() -> None:
    """Make an empty environment in place of what is there."""
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STAMP.write_text("{}", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvError(
            f"`{sys.executable} -m venv` failed; Debian and Ubuntu have it in the package python3-venv: "
            f"{(done.stdout + done.stderr).strip()}"
        )


def installed() -> int:
    """How many distributions the environment has."""
    return sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))


def pins_of(version: str) -> Path:
    """The file of what goes with one version of SGLang."""
    return CONSTRAINTS / f"sglang-{version}.txt"


def steps() -> list[list[str]]:
    """The arguments of each `pip install`, in order."""
    return [
        ["-c", f"{CONSTRAINTS}/cpu.txt", "-c", str(pins_of(DEFAULT)), "-r", f"{CONSTRAINTS}/requirements-cpu.txt"],
        ["--no-deps", "-r", str(pins_of(DEFAULT))],
        ["--no-deps", "--no-build-isolation", "--force-reinstall", str(SHIMS)],
        ["--no-deps", "--no-build-isolation", "-e", str(ROOT)],
    ]


def pip_install(arguments: list[str], progress: Progress, collected: int) -> int:
    """Run one `pip install` under the progress display.

    Returns:
        int: ``collected`` plus the packages that pip found in this step.
    """
    command = [str(PYTHON), "-I", "-m", "pip", "install", "--no-input", "--no-user", "--progress-bar=off", "--no-compile"]
    command += ["--disable-pip-version-check", *arguments]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in pip.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    output, what, line = [], "", ""
    with LOG.open("a", encoding="utf-8") as log:
        while line is not None:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                line = ""
            if line:
                log.write(line)
                output.append(line)
                step = PIP_STEP.match(line)
                collected += bool(step) and not line.startswith("  ")
                if step or line.startswith("Installing"):
                    what = f"fetching {step[1].rpartition('/')[2]}" if step else "installing"
            progress.show(collected + installed(), what)
    if pip.wait():
        raise EnvError(f"{explain(''.join(output))}\nThe whole output of pip: {LOG}")
    return collected


def compile_bytecode(progress: Progress) -> None:
    """Compile on all cores what a server imports; pip would do it on one, and Python at each start where it may not write.

    Files that this Python cannot compile are left: some packages ship code for newer ones.
    """
    (site,) = VENV.glob("lib/python*/site-packages")
    command = [str(PYTHON), "-I", "-m", "compileall", "-qq", "-j", "0", "-x", NEVER_IMPORTED, str(site)]
    compiling = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while compiling.poll() is None:
        progress.show(progress.total, "compiling")
        time.sleep(0.2)


def explain(output: str) -> str:
    """One sentence for why pip failed."""
    if "No space left on device" in output:
        return "the disk is full; the environment, pip's cache and its temporary files need 4 GB"
    missing = NO_VERSION.search(output)
    if UNREACHABLE.search(output):
        return "pip cannot reach its package index; check the network, the proxy, and the index that pip is set up with"
    if missing:
        return (
            f"pip's package index has no {missing[1]} for this Python and machine; "
            "set PIP_EXTRA_INDEX_URL to an index that has it"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return f"pip failed: {errors[0] if errors else 'no reason given'}"


def is_ready() -> bool:
    """Whether the environment is the wanted one; which Python made it matters only to a Python that could make another."""
    present, target = found(), wanted()
    usable = sys.version_info[:2] in PYTHONS
    return all(present.get(key) == target[key] for key in target if usable or key != "python")


def make_env() -> None:
    """Bring `.venv` to what `wanted` says."""
    if is_ready():
        return
    check_machine()
    with (ROOT / ".venv.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready():
            return
        present, target = found(), wanted()
        if any(present.get(key) != target[key] for key in ("python", "root")):
            print(f"Making the environment {VENV}: one to two minutes and 2.3 GB, once.", flush=True)
            make_venv()
        STAMP.write_text("{}", encoding="utf-8")
        pins = [CONSTRAINTS / "cpu.txt", pins_of(DEFAULT)]
        num_packages = sum(path.read_text(encoding="utf-8").count("==") for path in pins) + 2
        progress = Progress(2 * num_packages)
        collected = 0
        try:
            for arguments in steps():
                collected = pip_install(arguments, progress, collected)
            compile_bytecode(progress)
        finally:
            progress.close()
            shutil.rmtree(SHIMS / "build", ignore_errors=True)
        STAMP.write_text(json.dumps(target), encoding="utf-8")
        print(f"The environment is ready: {time.monotonic() - progress.start:.0f} s.", flush=True)


def make_layer(version: str) -> None:
    """Bring `.venv-<version>` to what `wanted` says: its own packages first on the path, then those of `.venv`.

    The path to `.venv` is written last, so that pip has seen nothing of it and takes nothing there for its own.
    """
    if not pins_of(version).is_file():
        known = sorted(path.stem.removeprefix("sglang-") for path in CONSTRAINTS.glob("sglang-*.txt"))
        raise EnvError(f"SGLANG={version}: expected one of {', '.join(known)}")
    layer = ROOT / f".venv-{version}"
    stamp = layer / "stamp.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted():
        return
    print(f"Making the environment {layer}, over {VENV.name}: about half a minute.", flush=True)
    shutil.rmtree(layer, ignore_errors=True)
    pip = [str(PYTHON), "-I", "-m", "pip", "--python", str(layer / "bin" / "python"), "install", "--no-input", "--quiet"]
    for command in (
        [str(PYTHON), "-I", "-m", "venv", "--without-pip", str(layer)],
        [*pip, "--disable-pip-version-check", "--no-deps", "-r", str(pins_of(version))],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EnvError(explain(done.stdout + done.stderr))
    (base,), (site,) = (folder.glob("lib/python*/site-packages") for folder in (VENV, layer))
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n", encoding="utf-8")
    stamp.write_text(json.dumps(wanted()), encoding="utf-8")


def main() -> int:
    """Make the environment; the exit status."""
    try:
        make_env()
        if sys.argv[1:] not in ([], [DEFAULT]):
            make_layer(sys.argv[1])
    except EnvError as error:
        print(f"make env: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make env: interrupted; the next run starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
