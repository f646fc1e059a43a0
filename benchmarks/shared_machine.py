"""A training step on a machine that is shared: alone, beside one busy process, beside three.

    make bench            # or python -m benchmarks.shared_machine; on two cores about six minutes

Each time in a process of its own, started when the others are busy already, with the way in which OpenMP's threads wait
chosen by `qlora_lab.threads`, or spinning, or asleep. Prints seconds a step, writes results/shared_machine.json.
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

BUSY = "while True: pass"
WAYS = {"chosen": {}, "spinning": {"OMP_WAIT_POLICY": "ACTIVE"}, "asleep": {"OMP_WAIT_POLICY": "PASSIVE"}}


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
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | WAYS[way]
        out = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found = json.loads(out.stdout.splitlines()[-1])
    return {"side": side, "others": others, "way": way, **found, "median_s": statistics.median(found["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if args.one:
        from qlora_lab.threads import choose
        return print(json.dumps({"policy": choose().policy, "seconds": seconds(args.one, args.steps)}))
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
