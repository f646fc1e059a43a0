"Kernels that are forks of a process that has imported: surroundings and ends of the usual ones."
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(),
                                reason="kernels are forked on Linux alone, and not beside a GPU")
TALK = """
import json, sys
from jupyter_client.manager import start_new_kernel
km, kc = start_new_kernel(cwd=sys.argv[1])
def ask(code, interrupt=False):
    said = []
    def heard(m):
        if m["msg_type"] == "stream": said.append(m["content"]["text"].strip())
        if m["msg_type"] == "error": said.append(m["content"]["ename"])
        if interrupt and said == ["ready"]: km.interrupt_kernel()
    kc.execute_interactive(code, output_hook=heard, timeout=60)
    return said
"""
LOOK = """
import os, pandas, signal, sys, torch
from tqdm.auto import tqdm
print(__import__("json").dumps({
    "imported": [n for n in ("torch", "transformers", "peft") if n in before], "directory": os.getcwd(),
    "path": sys.path, "name": __name__, "arguments": len(sys.argv), "threads": torch.get_num_threads(),
    "columns": pandas.options.display.max_columns, "bar": tqdm.__mro__[1].__module__,
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "environment": {k: v for k, v in os.environ.items() if not k.startswith(("JPY_", "WARM_", "JUPYTER_PATH"))}}))
"""


def talk(code, folder, warm, **environment):
    "What a program that talks with a kernel prints, by lines."
    command = [sys.executable, *([ROOT / "scripts/warm_kernels.py"] if warm else []), "-c", TALK + code, folder]
    own = {k: v for k, v in os.environ.items() if k not in ("JUPYTER_PATH", "WARM_KERNELS")} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=own, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def surroundings(folder, warm):
    code = f"""
ask("import sys; before = set(sys.modules)")
print(*ask({LOOK!r}))
kc.stop_channels()
km.shutdown_kernel()
"""
    return talk(code, folder, warm, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", SAID="here")[0]


def test_a_warm_kernel_is_like_the_usual_one(tmp_path):
    "But for what it has imported: directory, environment, threads, an interrupt, where libraries think that they are."
    usual, warm = surroundings(tmp_path, False), surroundings(tmp_path, True)
    assert (usual.pop("imported"), warm.pop("imported")) == ([], ["torch", "transformers", "peft"])
    assert warm == usual and warm["directory"] == str(tmp_path) and warm["environment"]["SAID"] == "here"


def test_kernels_have_nothing_in_common_and_end_as_asked(tmp_path):
    "One is interrupted, one is killed, one ends by itself; none of them outlives the command."
    code = """
print(json.dumps(ask("import os, peft, time, torch; peft.mark = 1; print(os.getpid(), torch.rand(1).item())")))
print(json.dumps(ask("print('ready', flush=True); time.sleep(60)", interrupt=True)))
kc.stop_channels()
km.shutdown_kernel(now=True)
km, kc = start_new_kernel()
print(json.dumps(ask("import os, peft, torch; print(os.getpid(), torch.rand(1).item(), hasattr(peft, 'mark'))")))
"""
    (first,), interrupted, (second,) = talk(code, tmp_path, True)
    assert interrupted == ["ready", "KeyboardInterrupt"]
    first, drawn = first.split()
    number, again, marked = second.split()
    assert number != first and again != drawn and marked == "False"
    until = time.monotonic() + 10
    while any(map(psutil.pid_exists, map(int, (first, number)))) and time.monotonic() < until: time.sleep(0.1)
    assert not any(map(psutil.pid_exists, map(int, (first, number))))


def test_one_that_was_ended_too_early_does_no_harm(tmp_path):
    "It knocks and says nothing, half a word, or something else: the next kernel is warm all the same."
    early = """
import os, socket
for words in (b"", bytes(3), (9).to_bytes(4, "big") + b"half", (3).to_bytes(4, "big") + b"odd"):
    knocks = socket.socket(socket.AF_UNIX)
    knocks.connect(os.environ["WARM_KERNELS"])
    knocks.sendall(words)
    knocks.close()
kc.stop_channels()
km.shutdown_kernel()
km, kc = start_new_kernel()
"""
    assert talk(early + IMPORTED, tmp_path, True) == [["True"]]


IMPORTED = """
print(json.dumps(ask("import sys; print('torch' in sys.modules)")))
kc.stop_channels()
km.shutdown_kernel()
"""


def test_without_the_process_that_forks_kernels_start_as_usual(tmp_path):
    gone = """
import os
kc.stop_channels()
km.shutdown_kernel()
os.environ["WARM_KERNELS"] = os.environ["WARM_KERNELS"] + " gone"
km, kc = start_new_kernel()
"""
    assert talk(gone + IMPORTED, tmp_path, True) == [["False"]]


def test_where_no_socket_can_be_kernels_start_as_usual(tmp_path):
    "A temporary folder whose name is too long for one."
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    assert talk(IMPORTED, tmp_path, True, TMPDIR=str(folder)) == [["False"]]
