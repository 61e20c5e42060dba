"""What of another SGLang is not as the plug-in expects: names that are missing, probes that answer otherwise, options unread.

Run by `make contract SGLANG=x.y.z`: that version's wheel is installed without its dependencies into a folder of its own, which
goes before the environment's on the path of a process that only imports and asks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ask() -> int:
    """Print the differences between the SGLang on the path and the newest one that is served."""
    from sglang.srt.server_args import ServerArgs

    from sglang_dsv4.plugin.install import contract, refusals
    from sglang_dsv4.plugin.install.portable.table import portable_ops
    from sglang_dsv4.plugin.install.versions import SERVED, probes
    from tests.plugin import option_classes

    newest = SERVED[-1]
    names = [
        *contract.names_of(newest),
        *(contract.ContractName(op.target, f"portable op {op.name}") for op in portable_ops(newest)),
    ]
    found = [f"missing: {name.path} ({name.use})" for name in names if not name.is_found()]
    answers = probes.ask(probes.EARLY | probes.LATE)
    found += [f"answers otherwise: {probe}: {answers[probe]}" for probe in answers if answers[probe] != newest.answers[probe]]
    refused = {refusal.field for refusal in (*refusals.REFUSALS, *newest.refusals)}
    fields = set(ServerArgs.__annotations__)
    found += [f"refused, but no option any more: {name}" for name in sorted(refused - fields)]
    new = (name for name in sorted(fields) if option_classes.SPEAKS_OF_A_CACHE.search(name))
    found += [f"unread option: {name}" for name in new if option_classes.kind_of(name, refused) is None]
    print("\n".join(found) or f"as {newest.number}: {len(names)} names, {len(answers)} probes, {len(fields)} options")
    return bool(found)


def main() -> int:
    """Install a version beside the environment, and ask it; the exit status is 1 where anything differs."""
    if sys.argv[1:] == ["--ask"]:
        return ask()
    (version,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--no-compile"]
        subprocess.run([*pip, "--target", folder, f"sglang=={version}"], check=True)
        code = f"import sys; sys.path[:0] = [{folder!r}, {str(ROOT)!r}]; sys.argv[1:] = ['--ask']; "
        code += f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
        print(f"SGLang {version}:")
        environment = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(["env", "SGLANG_USE_CPU_ENGINE=1", *environment], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
