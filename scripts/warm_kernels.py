#!/usr/bin/env python3
"""Run Python with kernels that start warm: `python scripts/warm_kernels.py -m pytest --nbval nbs`.

Most notebooks import the same libraries, for some seconds each. Here one process imports them, and what Jupyter starts
as a kernel asks it for a fork of itself, which takes over directory, environment and output, and runs the usual kernel.
What forks share was imported and not used; their random numbers start anew. Where no process can be forked safely
(macOS, Windows, beside a GPU), or the first one is gone, kernels start as they always do.

Three roles: the command's parent (`main`), the process that forks (`serve`), and what Jupyter starts and waits for in
place of a kernel (`stand_in`): it passes signals on, ends when the kernel does, and takes the kernel with it.
"""
import atexit
import builtins
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

WARM = "ipykernel.kernelapp", "torch", "transformers", "peft", "pandas", "matplotlib.pyplot"  # tqdm looks for the first
CARDS = "/dev/nvidiactl", "/dev/kfd"  # whose drivers no fork may share
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}  # as beside other tests; torch reads them once
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # no network, no advice to processes that fork
PLACE = "WARM_KERNELS"  # the variable that says where the process is that forks
USUAL = [sys.executable, str(Path(__file__).resolve().parent.parent / "qlora_lab/threads.py"), "ipykernel_launcher"]


# ---------------------------------------------------------------- what Jupyter starts

def stand_in(argv: list[str]) -> None:
    "A kernel by these arguments, as another process, until it ends."
    there = socket.socket(socket.AF_UNIX)
    asked = json.dumps({"argv": argv, "directory": os.getcwd(), "environment": dict(os.environ)}).encode()
    try:
        there.connect(os.environ[PLACE])
        socket.send_fds(there, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        there.sendall(asked)
        kernel = int.from_bytes(_exactly(there, 4), "big")
    except (OSError, EOFError): os.execv(USUAL[0], [*USUAL, *argv])
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, _: os.kill(kernel, number))
    there.recv(1)


def _exactly(there: socket.socket, n: int) -> bytes:
    "So many bytes of the other side; EOFError where it is gone."
    found = b""
    while len(found) < n:
        more = there.recv(n - len(found))
        if not more: raise EOFError
        found += more
    return found


# ---------------------------------------------------------------- the process that forks

def serve(door: socket.socket, parent: socket.socket) -> dict:
    "Answer until the parent's end is closed; gives what was asked for, in each fork."
    waiting = selectors.DefaultSelector()
    for thing in (door, parent): waiting.register(thing, selectors.EVENT_READ)
    kernels: dict[int, socket.socket] = {}
    while True:
        for key, _ in waiting.select(timeout=0.05):
            if key.fileobj is parent:
                for kernel in kernels: os.kill(kernel, signal.SIGKILL)
                sys.exit()
            if key.fileobj is door:
                there, asked = _asked(door)
                if asked is None: continue
                if not (kernel := os.fork()):
                    for thing in (door, parent, there, waiting, *kernels.values()): thing.close()
                    return asked
                for number in asked["outputs"]: os.close(number)
                with suppress(OSError): there.sendall(kernel.to_bytes(4, "big"))
                kernels[kernel] = there
                waiting.register(there, selectors.EVENT_READ, kernel)
            else:  # its stand-in is gone
                os.kill(key.data, signal.SIGKILL)
                waiting.unregister(key.fileobj)
        for kernel in list(kernels):
            if os.waitpid(kernel, os.WNOHANG) == (0, 0): continue
            there = kernels.pop(kernel)
            with suppress(KeyError): waiting.unregister(there)
            there.close()  # which its stand-in waits for


def _asked(door: socket.socket) -> tuple[socket.socket, dict | None]:
    "What a stand-in wants; nothing of one that was ended before it had said so."
    there, _ = door.accept()
    size, outputs, _, _ = socket.recv_fds(there, 4, 3)
    try: return there, json.loads(_exactly(there, int.from_bytes(size, "big"))) | {"outputs": outputs}
    except (EOFError, ValueError):
        for number in outputs: os.close(number)
        there.close()
        return there, None


def become(asked: dict) -> None:
    "In a fork: the kernel that was asked for."
    from ipykernel.kernelapp import launch_new_instance
    os.setsid()
    for here, number in enumerate(asked["outputs"]):
        os.dup2(number, here)
        os.close(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["directory"])
    own = {name: os.environ[name] for name in THREADS}
    os.environ.clear()
    os.environ.update(asked["environment"] | own)
    sys.argv = ["ipykernel_launcher", *asked["argv"]]
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    launch_new_instance(asked["argv"], parent_handle=os.getppid())


@contextmanager
def as_in_a_kernel():
    "A block in which libraries that ask where they are imported hear: in a kernel (pandas' and tqdm's do)."
    import IPython
    shell, real = SimpleNamespace(config={"IPKernelApp": {}}, kernel=None), IPython.get_ipython
    builtins.get_ipython = IPython.get_ipython = lambda: shell
    try: yield
    finally:
        IPython.get_ipython = real
        del builtins.get_ipython


def warm(door: socket.socket, parent: socket.socket) -> None:
    "Import, say so, then serve."
    atexit.register(os._exit, 0)  # registered first, so called last: to take down what forks share takes two seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C ends
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel does
    os.environ["TRITON_INTERPRET"] = "1"  # as pages without a GPU say before they import Triton
    if sys.path and sys.path[0] == str(Path(__file__).resolve().parent): del sys.path[0]
    with as_in_a_kernel():
        for name in WARM: __import__(name)
    gc.freeze()  # what is never looked at again stays in shared memory
    parent.sendall(b".")
    become(serve(door, parent))


# ---------------------------------------------------------------- the command's parent

def main(argv: list[str]) -> int:
    "Run Python with these arguments, with kernels that start warm while it runs."
    command = [sys.executable, *argv]
    if not sys.platform.startswith("linux") or any(map(os.path.exists, CARDS)): return subprocess.call(command)
    with tempfile.TemporaryDirectory() as folder:
        place, (ours, theirs) = Path(folder) / "door", socket.socketpair()
        spec = Path(folder) / "kernels/python3/kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, str(Path(__file__).resolve()), "--kernel", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}))
        door = socket.socket(socket.AF_UNIX)
        try: door.bind(str(place))
        except OSError: return subprocess.call(command)  # a place with too long a name
        door.listen(64)
        numbers = door.fileno(), theirs.fileno()
        first = subprocess.Popen([sys.executable, __file__, "--warm", *map(str, numbers)], pass_fds=numbers,
                                 env=THREADS | QUIET | os.environ)
        door.close()
        theirs.close()
        ours.recv(1)  # until it is warm, or gone
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        running = subprocess.Popen(command, env=os.environ | {"JUPYTER_PATH": paths, PLACE: str(place)})
        while running.returncode is None:
            with suppress(KeyboardInterrupt): running.wait()  # the command has heard it too
        ours.close()
        first.wait()
        return running.returncode


if __name__ == "__main__":
    if sys.argv[1] == "--kernel": stand_in(sys.argv[2:])
    elif sys.argv[1] == "--warm": warm(*(socket.socket(fileno=int(n)) for n in sys.argv[2:]))
    else: sys.exit(main(sys.argv[1:]))
