"""Runs killed at random moments, by any signal, at any write: the same command ends with the bytes of a run that nobody
disturbed.

The runs are the console script's own `main`. `make test` kills three, `make harden` a hundred; QLORA_LAB_KILLS says how
many. What was met is kept in the file that QLORA_LAB_HARDENING names, for benchmarks/hardening.py.
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from layer import faults
from noted import LONG, note
from safetensors import safe_open
from several import forking

KILLED = int(os.environ.get("QLORA_LAB_KILLS") or (100 if LONG else 3))  # runs
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
STEPS = 12


def command(jsonl, tiny, out):
    return ["train", "--data", str(jsonl), "--model", str(tiny), "--out", str(out), "--steps", str(STEPS), "--rank",
            "2", "--checkpoint-every", "3", "--eval-every", "2", "--dropout", "0.1", "--lr", "1e-2", "--eval-examples",
            "2", "--eval-prompts", "1", "--compute-dtype", "float32", "--held-out", "0.2", "--device", "cpu"]


def process(argv, log, folder, at, sig, count):
    "The console script; at its step number `at` on the disk it gets a signal. Steps are counted into a file."
    with open(log, "a") as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    sys.argv = ["qlora-lab", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    from qlora_lab.cli import main
    with faults(folder, at, "kill", sig) as layer: code = main(argv)
    sys.stdout.flush()
    if count: Path(count).write_text(str(layer.count))
    os._exit(code)


def start(argv, log, folder, at=0, sig=signal.SIGKILL, count=None):
    p = forking().Process(target=process, args=(argv, str(log), str(folder), at, sig, count))
    p.start()
    return p


def whole_files(folder):
    "Every file that has its name is whole; a record that says done has all that a run leaves."
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir(): continue
        if path.suffix == ".json": json.loads(path.read_text())
        elif path.suffix == ".jsonl": [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as f: [f.get_tensor(k) for k in f.keys()]
    record = folder / "run.json"
    if record.exists() and json.loads(record.read_text())["state"] == "done":
        assert len(list((folder / "adapter").iterdir())) == 2


def result(folder):
    "What must not depend on a kill: adapters, checkpoint and best adapter by their bytes, losses."
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    files |= {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return files, [record[k] for k in ("state", "before", "after", "answers", "best", "ended")], [
        {k: v for k, v in row.items() if k != "seconds"} for row in lines]


@pytest.fixture(scope="module")
def undisturbed(tiny, jsonl, tmp_path_factory):
    "A run that nobody disturbs: what it ends with, its seconds, its steps on the disk."
    place = tmp_path_factory.mktemp("undisturbed")
    start(["--version"], place / "warm", place).join()  # the server of the processes starts with the first one
    began = time.perf_counter()
    p = start(command(jsonl, tiny, place / "run"), place / "log", place / "run", count=str(place / "count"))
    p.join()
    assert p.exitcode == 0, (place / "log").read_text()
    return result(place / "run"), time.perf_counter() - began, int((place / "count").read_text())


def kill_once(r, argv, folder, log, seconds, steps):
    "Start, and end it by a signal at a random moment or a random step on the disk; how, and its exit code."
    sig, by_step = r.choice(SIGNALS), r.random() < 0.7
    at = r.randint(1, steps) if by_step else 0
    p = start(argv, log, folder, at, sig)
    if not by_step:
        p.join(r.uniform(0, seconds))
        if p.exitcode is None: os.kill(p.pid, sig)
    p.join()
    return f"{signal.Signals(sig).name} {f'at step {at} on the disk' if by_step else 'at a moment'}", p.exitcode


@pytest.mark.parametrize("seed", range(KILLED))
def test_a_run_that_is_killed_ends_with_the_same_bytes(seed, undisturbed, tiny, jsonl, tmp_path):
    "Killed once to three times; each time no file is half."
    wanted, seconds, steps = undisturbed
    folder, log, r, met = tmp_path / "run", tmp_path / "log", random.Random(seed), []
    argv = command(jsonl, tiny, folder)
    for _ in range(r.choice([1, 1, 2, 3])):
        before = log.stat().st_size if log.exists() else 0
        how, code = kill_once(r, argv, folder, log, seconds, steps)
        met.append((how, code))
        if folder.exists(): whole_files(folder)
        begun = log.exists() and log.stat().st_size > before  # else multiprocessing was still making the process
        fine = 0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT
        assert code in fine or not begun, (how, code, log.read_text())
        if code == 0: break
    p = start(argv, log, folder)
    p.join()
    said = log.read_text()
    assert p.exitcode == 0 and "Traceback" not in said, (met, said)
    assert result(folder) == wanted, met
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], met  # Ctrl-C may come as it is removed
    note("kills", seed=seed, kills=met)
