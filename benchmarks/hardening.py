"""The lab's hardening, counted: runs that were killed, steps on the disk that went wrong, and what came of them.

    make harden           # or python -m benchmarks.hardening [PART ...]; on two cores about half an hour

Each part is tests of tests/hardening in their long form; they note what they met, a line of JSON each, and a part's
function counts the lines. A part that fails ends with the tests' own words, and leaves the record as it was. Writes
results/hardening.json; parts that were not asked for stay in it as they were.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import RESULTS, save_result
from qlora_lab.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


def kills(lines: list[dict]) -> dict:
    "Runs that were killed, each until it got through: how, and that all ended with the same bytes."
    met = [how for line in lines for how, code in line["kills"] if code != 0]
    return {"runs": len(lines), "kills": len(met), "by signal": dict(Counter(how.split()[0] for how in met)),
            "at a step on the disk": sum("at step" in how for how in met),
            "at a moment": sum("at a moment" in how for how in met),
            "got through before the kill": sum(code == 0 for line in lines for _, code in line["kills"]),
            "adapters equal to the undisturbed run's": len(lines)}  # a test that found another one has failed


def steps(lines: list[dict]) -> dict:
    "Steps on the disk that went wrong, by deed and way."
    tried = {f"{line['deed']}, {line['way']}": line["tried"] for line in lines}
    return {"deeds": sorted({line["deed"] for line in lines}), "tried": tried, "all": sum(tried.values()),
            "whole after the next call": sum(tried.values())}


def inputs(lines: list[dict]) -> dict:
    "Odd inputs: refused by one sentence that names the file or the option, or taken; a test that met else has failed."
    tried, refused = (sum(line[k] for line in lines) for k in ("tried", "refused"))
    return {"tried": tried, "refused by name": refused, "taken": tried - refused}


INPUTS = " ".join(f"tests/hardening/test_inputs_{of}.py" for of in ("data", "models", "runs", "options"))
PARTS = {"kills": ("tests/hardening/test_kills.py", kills), "steps": ("tests/hardening/test_every_step.py", steps),
         "inputs": (INPUTS, inputs)}


def carried_out(part: str, workers: int) -> dict:
    "The tests of a part in their long form, and what they met."
    tests, counted = PARTS[part]
    with TemporaryDirectory() as place:
        lines, start = Path(place) / "lines", time.perf_counter()
        env = os.environ | {"QLORA_LAB_HARDEN": "long", "QLORA_LAB_HARDENING": str(lines), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "load", *tests.split()]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f"{part}: {done.stdout[-6000:]}{done.stderr[-2000:]}")
        found = [json.loads(line) for line in lines.read_text().splitlines()]
        return counted([line for line in found if line["part"] == part]) | {
            "tests": done.stdout.strip().splitlines()[-1], "seconds": round(time.perf_counter() - start),
            "date": provenance()["date"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    odd = [part for part in args.parts if part not in PARTS]
    if odd: parser.error(f"{odd[0]}: expected one of {', '.join(PARTS)}")
    record = RESULTS / "hardening.json"
    before = json.loads(record.read_text())["parts"] if record.exists() else {}
    for part in args.parts or PARTS:
        before[part] = carried_out(part, args.workers)
        print(part, json.dumps(before[part], indent=1), flush=True)
        save_result("hardening", {"parts": before})


if __name__ == "__main__": main()
