"""Python programs that start with the big libraries imported already, for tests that start one after the other.

A page of the documentation starts dozens of programs, and importing torch costs each more than all it does then. Here
one process imports what they share and forks for each: the program runs in a process of its own, from its first line to
what it does at exit, with the arguments, folder, environment and files of who asked for it.

Forking is safe only from a process with one thread, so the process refuses to begin with more; then programs start as
they always do.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The last part, after the loop, is the program's process. Its parent waits for it and tells the exit code.
KEEPER = """
import atexit, gc, importlib, json, os, runpy, signal, socket, sys
status = 1

def leave():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

atexit.register(leave)  # the first to register is called last; taking torch to pieces would cost more than a program
for name in sys.argv[2:]:
    importlib.import_module(name)
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
if threads > 1:
    sys.exit(f"importing started {threads - 1} threads")
gc.freeze()  # or the first collection would write to every page
here = socket.socket(socket.AF_UNIX)
here.bind(sys.argv[1])
here.listen()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    asked, _ = here.accept()
    if os.fork() == 0:
        break
    asked.close()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
here.close()
text, files, _, _ = socket.recv_fds(asked, 1 << 20, 3)
if program := os.fork():
    for file in files:
        os.close(file)
    asked.send(bytes([os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) % 256]))
    os._exit(0)
asked.close()
for place, file in enumerate(files):
    os.dup2(file, place)
    os.close(file)
sys.stdin = sys.__stdin__ = open(0, closefd=False)
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
folder, environment, words = json.loads(text)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
try:
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], folder
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")
    status = 0
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
"""
ASK = """
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect(sys.argv[1])
socket.send_fds(asked, [json.dumps([os.getcwd(), dict(os.environ), sys.argv[2:]]).encode()], [0, 1, 2])
sys.exit((asked.recv(1) or b"\\xff")[0])
"""


@contextmanager
def warm(folder: Path, modules: tuple[str, ...], environment: dict[str, str]) -> Iterator[str]:
    """A process with ``modules`` imported; its address, or "" where importing them starts threads.

    ``python -I -S -c ASK ADDRESS`` before ``-m MODULE ...`` or ``FILE ...`` runs that in it, as ``python`` would.
    """
    address = str(folder / "warm")
    command = [sys.executable, "-c", KEEPER, address, *modules]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as keeper:
        try:
            ready = keeper.stdout is not None and keeper.stdout.readline() == b"ready\n"
            yield address if ready else ""
        finally:
            keeper.terminate()
