"""The commands from tickets to a served model, typed in order, with what each prints.

    python -m benchmarks.support_road              # some minutes, if runs/support_desk is trained already
    python -m benchmarks.support_road --only chat  # one of them again, the others as they were recorded

Each is run as a user runs it, in a process of its own; what it prints, its exit code and its seconds are written to
benchmarks/results/support_road.json. The page of the how-to shows that file.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import RESULTS, save_result

RUN, MERGED = "runs/support_desk", "runs/support_desk_merged"
TICKET = "hi, i was charged two times this month for the same plan?? please check. Ana"
ROAD = {
    "data": "qlora-lab data nbs/data/support.jsonl --held-out 0.2 --samples 1",
    "train": f"qlora-lab train --data nbs/data/support.jsonl --held-out 0.2 --steps 120 --out {RUN}",
    "chat": f"qlora-lab chat {RUN} --prompt {shlex.quote(TICKET)}",
    "merge": f"qlora-lab merge {RUN} --out {MERGED}",
    "export": f"qlora-lab export {MERGED} --gguf Q4_K_M",
    "verify": f"qlora-lab verify {MERGED}",
}


def typed(line: str) -> dict:
    "Run a command as it is typed; what it printed, without colours and bars."
    command = shlex.split(line)
    command[0] = str(Path(sys.executable).parent / command[0])
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    said = re.sub(re.escape(str(Path.cwd())) + "/?", "", done.stdout.strip())  # no folder of this machine
    if done.returncode: said += "\n" + done.stderr.strip()[-600:]
    return {"command": line, "exit": done.returncode, "seconds": time.perf_counter() - start, "printed": said.strip()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(ROAD), action="append")
    args = parser.parse_args(argv)
    path = RESULTS / "support_road.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else {}
    for name, line in ROAD.items():
        if args.only and name not in args.only: continue
        steps[name] = typed(line)
        print(f"$ {line}\n{steps[name]['printed']}\n", flush=True)
    print(save_result("support_road", {"steps": steps}))
    failed = [name for name, step in steps.items() if step["exit"]]
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__": main()
