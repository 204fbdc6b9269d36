"""Run by preloaded_ranks: imports modules once, then forks a process for every request.

fork_server.py MODULE...: says "ready", then takes one request after another from stdin, a line of JSON {"argv", "env",
"cwd", "stdout", "stderr"} each. The process goes on as `python argv...` would, in a process group of its own. Answers
are two lines: its id, and its exit code when it has ended (negative for a signal). Ends with stdin. When the imports
started threads it says "threads" and ends: a fork takes along one thread, and a lock that another holds stays held.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType


def serve(modules: list[str]) -> dict:
    """Import and answer; returns in each forked process only, with its request."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # modules may print when they are imported
    for name in modules:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        print("threads", file=answers)
        os._exit(0)  # without waiting for them
    print("ready", file=answers)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            answers.close()
            return json.loads(line)
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)
    os._exit(0)  # without taking apart all that was imported


def take_place(request: dict) -> list[str]:
    """Give this process the files, folder and environment that were asked for; returns its argv."""
    os.setsid()
    for number, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["argv"]


def run(argv: list[str]) -> None:
    """What `python argv...` does, with `__main__` as it would be: loader processes import it by its file."""
    main = ModuleType("__main__")
    if argv[0] == "-c":
        source, name, sys.path[0], sys.argv = argv[1], "<string>", "", ["-c", *argv[2:]]
    else:
        source, name, sys.path[0], sys.argv = Path(argv[0]).read_text(), argv[0], str(Path(argv[0]).parent), argv
        main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    run(take_place(serve(sys.argv[1:])))
