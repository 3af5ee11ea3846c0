"""A Python that starts at once: for tests of programs that start Python themselves, such as the launchers.

`QuickPython` starts a server that has imported torch and the package, and writes an executable that takes Python's
arguments. The executable asks the server to fork. The child has the executable's arguments, environment, folder and
standard streams, and signals are passed on to it. It knows the options -m, -c, - and -u, and runs a sitecustomize that
PYTHONPATH leads to.
"""

from __future__ import annotations

import array
import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
server.sendall(told)
answer = server.makefile("r")
child = int(answer.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(child, number))
status = int(answer.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""
PRELOADED = ("torch._dynamo", "recurrent_db.training.trainer", "recurrent_db.objectives", "recurrent_db.commands.blocks",
             "recurrent_db.huggingface.export", "recurrent_db.report.page", "recurrent_db.commands.plan",
             "recurrent_db.commands.repl")  # fmt: skip


class QuickPython:
    """A running server, and the ``executable``."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.executable = folder / "python"
        address = str(folder / "socket")
        self.executable.write_text(CLIENT.format(python=sys.executable, address=address))
        self.executable.chmod(0o755)
        given = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        environment = {**given, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def _run(arguments: list[str]) -> None:
    """What ``python ARGUMENTS`` runs."""
    arguments = [word for word in arguments if word != "-u"]
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        sys.path.insert(0, "")
        sys.argv = [kind, *(rest[1:] if kind == "-c" else rest)]
        code = rest[0] if kind == "-c" else sys.stdin.read()
        main: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, "<string>", "exec", dont_inherit=True), main)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def _child(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    """The process that was asked for; its exit status."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    if any(Path(path, "sitecustomize.py").exists() for path in paths):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    if "COVERAGE_PROCESS_CONFIG" in environment:
        import coverage

        coverage.process_startup()
    try:
        _run(arguments)
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve_one(connection: socket.socket) -> None:
    """Fork what a client asks for, and tell it the exit status; a client that is gone takes its child along."""
    message, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i", ancillary[0][2]).tolist()
    left, parts = int.from_bytes(message, "big"), b""
    while len(parts) < left:
        parts += connection.recv(left - len(parts))
    child = os.fork()
    if child == 0:
        connection.close()
        os._exit(_child(*json.loads(parts), streams))
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"{status}\n".encode())


def serve(address: str) -> None:
    import torch

    for name in PRELOADED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a handler that ends leaves nothing behind
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen(64)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve_one(connection)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
