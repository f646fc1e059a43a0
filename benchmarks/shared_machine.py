"""A training step on a machine that is shared: alone, beside one busy process, beside three.

    make bench            # or python -m benchmarks.shared_machine; on two cores about six minutes
    python -m benchmarks.shared_machine --class 12     # twelve processes that start while the machine is free

Each time in a process of its own, started when the others are busy already, with the way in which OpenMP's threads wait
chosen by `qlora_lab.threads`, or spinning, or asleep. Prints seconds a step, writes results/shared_machine.json.

A class is the case that no look at the machine can foresee: all its processes have loaded torch before the first one
works. Each quantizes a matrix of 1,024 x 1,024 by the lab and by bitsandbytes, as lesson 03 does; as torch comes,
asleep, and with one thread. Prints seconds a matrix, writes results/shared_class.json.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pandas as pd

from benchmarks.common import save_result
from qlora_lab.threads import POLICY, THREADS

BUSY = "while True: pass"
WAYS = {"chosen": {}, "spinning": {POLICY: "ACTIVE"}, "asleep": {POLICY: "PASSIVE"}}
CLASS = {"as it comes": {}, "asleep": WAYS["asleep"], "one thread": {THREADS: "1"}}


def environment(way: dict[str, str]) -> dict[str, str]:
    "That of a process whose threads are to wait in one way."
    return {name: value for name, value in os.environ.items() if name not in (POLICY, THREADS)} | way


@contextmanager
def busy(processes: int):
    "Other people's work: processes that keep a core each."
    with ExitStack() as stack:
        for _ in range(processes):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(other.kill)
        time.sleep(0.5)
        yield


def seconds(side: str, steps: int) -> list[float]:
    "Seconds of each step, the first two aside, in this process."
    from benchmarks.cpu import training_step
    step, found = training_step(side), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found[2:]


def measured(side: str, others: int, way: str, steps: int) -> dict:
    "A process of its own beside so many others."
    command = [sys.executable, "-m", "benchmarks.shared_machine", "--one", side, "--steps", str(steps)]
    with busy(others):
        out = subprocess.run(command, env=environment(WAYS[way]), check=True, capture_output=True, text=True)
    found = json.loads(out.stdout.splitlines()[-1])
    return {"side": side, "others": others, "way": way, **found, "median_s": statistics.median(found["seconds"])}


def quantized(matrices: int = 9) -> list[float]:
    "Seconds of each matrix, when all are ready: a line out, a line in."
    import bitsandbytes.functional as bnb
    import torch

    from qlora_lab.double_quant import quantize_4bit
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    def both(w):
        start = time.perf_counter()
        quantize_4bit(w)
        bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        return time.perf_counter() - start

    both(w[:64])  # what is compiled or loaded at first use
    print("ready", flush=True)
    input()
    return [both(w) for _ in range(matrices)]


def together(processes: int, way: str) -> dict:
    "So many processes that begin at once."
    command = [sys.executable, "-c", "import torch; from benchmarks.shared_machine import quantized as f; print(f())"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started = [subprocess.Popen(command, env=environment(CLASS[way]), **pipes) for _ in range(processes)]
    for one in started: assert one.stdout.readline() == "ready\n"
    for one in started: print(file=one.stdin, flush=True)
    found = [json.loads(one.communicate()[0]) for one in started]
    return {"processes": processes, "way": way, "median_s": statistics.median(sum(found, [])), "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--class", type=int, dest="processes", help="so many processes at once, in place of steps")
    args = parser.parse_args()
    if args.one:
        from qlora_lab.threads import choose
        return print(json.dumps({"policy": choose().policy, "seconds": seconds(args.one, args.steps)}))
    if args.processes:
        rows = [together(n, way) for n in (1, args.processes) for way in CLASS]
        save_result("shared_class", {"rows": rows})
        table = pd.DataFrame(rows).pivot_table("median_s", "way", "processes").round(3)
        return print(table.to_string())
    rows = []
    for others in (0, 1, 3):
        for side in ("lab", "bnb"):
            for way in WAYS if side == "lab" else ("chosen", "spinning"):
                rows.append(measured(side, others, way, args.steps))
                print({k: v for k, v in rows[-1].items() if k != "seconds"}, flush=True)
    save_result("shared_machine", {"rows": rows})
    table = pd.DataFrame(rows).pivot_table("median_s", ["side", "way"], "others").round(2)
    print(table.rename(columns=lambda n: f"beside {n}" if n else "alone").to_string())


if __name__ == "__main__": main()
