"""The process of `tests.plugin.warm`: a line of jobs in, a line of numbers out: exit statuses, or where nobody waits for
the end, process ids. Imports nothing of ours."""

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the input ends."""
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.models.deepseek_v4  # noqa: F401

    del sys.modules["sglang.launch_server"]  # a copy runs it as its main module
    gc.freeze()  # a copy need not look at any of this again
    for line in sys.stdin:
        jobs, children = json.loads(line), []
        for job in jobs:
            child = os.fork()
            if not child:
                end(become(job))
            children.append(child)
        numbers = [
            os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if job["is_awaited"] else child
            for job, child in zip(jobs, children, strict=True)
        ]
        print(json.dumps(numbers), flush=True)


def become(job: dict) -> object:
    """Run the job's program as ``python`` would; what it gave to `sys.exit`. Another exception ends the copy from here."""
    os.setsid()  # its own process group, so that it can be ended as a whole
    # It ends with this process, which ends with the tests: a server must not outlive tests that were broken off.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(job["variables"])  # noqa: TID251
    sys.path[:0] = job["path"]
    kind, what, *rest = job["argv"]
    try:
        exec(job["before"], {"__name__": "before"})
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            exec(what, {"__name__": "__main__"})
    except SystemExit as leaving:
        return leaving.code
    return 0


def end(code: object) -> None:
    """End as ``python`` does, but leave the memory to the system: taking SGLang apart would cost two seconds."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    main()
