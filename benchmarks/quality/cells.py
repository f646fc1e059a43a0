"""Cells in rows: what a row asks of `sweep`, what came out, and the ladder on which a row's best rate is found."""
import shutil
import time
from math import inf, isfinite
from pathlib import Path

from benchmarks.quality.record import groups_of, told
from benchmarks.quality.rows import COMMON, EVERY, FIRST, MIDDLE, data_sets, opened
from qlora_lab.arithmetic import exact
from qlora_lab.cell_folders import FAILED
from qlora_lab.cell_work import prepare
from qlora_lab.methods import CHANGED_BASE, kept_name
from qlora_lab.model import answer
from qlora_lab.runs import Run
from qlora_lab.sweeping import sweep
from qlora_lab.watching import Watcher

CHOOSING = 90, 91  # seeds of the runs by which rates are chosen; no other run has them
ONE = CHOOSING[:1]
TRIAL = {"steps": 3, "batch_size": 2, "eval_examples": 6}
ROOM = 9           # rungs of a ladder, at most


class Sparing(Watcher):
    "Removes what a cell has trained: hundreds of whole models would fill a disk."
    def on_end(self, run: "Run | None") -> None:
        if run is None: return
        for name in (CHANGED_BASE, kept_name("full"), "checkpoint"):
            shutil.rmtree(run.folder / name, ignore_errors=True)


def right_answers(model, tokenizer, data) -> float:
    "Share of held-out exercises that are answered exactly."
    asked = data.held_out
    batches = [asked[i:i + 120] for i in range(0, len(asked), 120)]
    said = [a for batch in batches for a in answer(model, tokenizer, [e.prompt for e in batch], 16)]
    return sum(exact(e, a) for e, a in zip(asked, said)) / len(asked)


class Bench:
    "Where cells lie, and how they are run."
    def __init__(self, folder: str, workers: int, quick: bool, model: str | None = None):
        self.folder, self.workers, self.quick, self.model = Path(folder), workers, quick, model
        self.groups, self.cut = {}, False

    def cell(self, row: str, lr: float, seed: int, data: str = "docstrings", **more) -> dict:
        "The settings of one cell."
        made = {**COMMON, **EVERY[row], "lr": lr, "seed": seed, "data": data, **more}
        if data.endswith("to choose by"): made["eval_examples"] = 160
        if not self.quick: return made
        name, sep, kind = made.get("model", "").partition(" as ")
        if "init_adapter" in made: made["init_adapter"] += "_quick"
        return made | TRIAL | {"model": f"{self.model}{sep}{kind}"}

    def run(self, asked: list[dict], measure: dict | None = None) -> list[dict | None]:
        "What a record says of each cell, done now where it was not; None for one that failed, or when time is up."
        how = dict(data=data_sets(), base=opened, measure=measure, watchers=[Sparing()], keep="numbers")
        start = time.perf_counter()
        try: sweep(asked, self.folder, workers=self.workers, **how)
        except KeyboardInterrupt: self.cut = True
        places = prepare(asked, self.folder, **how).places
        for place in places:
            name = place.cell["data"]
            if name not in self.groups and (found := groups_of(place.folder)): self.groups[name] = found
            if message := place.told(FAILED).get("message"): print(f"failed  {place.folder.name}: {message}")
        said = [told(place.folder, place.cell) for place in places]
        took, done = time.perf_counter() - start, sum(one is not None for one in said)
        print(f"{done} of {len(asked)} cells done, {took:.0f} s in this call", flush=True)
        return said


def rate(row: str, rung: int) -> float:
    "A rate of a row's ladder, of which 0 is in the middle of the first three."
    return FIRST.get(row.removesuffix(", bfloat16"), MIDDLE) * 2. ** rung


def ladders(bench: Bench, rows: list[str], data: str = "docstrings", seeds=ONE) -> dict[str, dict]:
    "For each row its rates with the losses by which it is chosen; rungs are added until the best is no end."
    found: dict[str, dict[int, list[float]]] = {row: {} for row in rows}
    todo = [(row, k) for row in rows for k in (-1, 0, 1)]
    while todo:
        cells = [bench.cell(row, rate(row, k), s, f"{data}, to choose by") for row, k in todo for s in seeds]
        said = [inf if t is None or not isfinite(t["loss"]) else t["loss"] for t in bench.run(cells)]
        if bench.cut: raise KeyboardInterrupt
        for i, (row, k) in enumerate(todo): found[row][k] = said[i * len(seeds):(i + 1) * len(seeds)]
        todo = []
        for row, rungs in found.items():
            best = min(rungs, key=lambda k: sum(rungs[k]))
            beside = best - 1 if best == min(rungs) else best + 1 if best == max(rungs) else None
            if beside is not None and len(rungs) < ROOM and not bench.quick: todo.append((row, beside))
    return {row: {"rates": [rate(row, k) for k in sorted(rungs)],
                  "losses": [[v if isfinite(v) else None for v in rungs[k]] for k in sorted(rungs)],
                  "best": rate(row, min(rungs, key=lambda k: sum(rungs[k])))} for row, rungs in found.items()}
