"""Does 4-bit keep the quality? Several hundred runs of SmolLM2 on one GPU, in parts, the most important first.

    python -m benchmarks.quality --minutes 9              # goes on where it was cut short; as often as it takes
    python -m benchmarks.quality methods repair           # some parts alone
    python -m benchmarks.quality --quick --workers 1      # tries every part on a tiny model; no record is touched

Each part writes benchmarks/results/quality_PART.json with what is done so far, whenever some of its cells are.
"""
import argparse
import os
import signal
import time

import torch

from benchmarks.quality import swallowed
from benchmarks.quality.cells import CHOOSING, Bench, ladders, right_answers
from benchmarks.quality.record import TF32, keep, kept
from benchmarks.quality.rows import BFLOAT16, COMMON, EVERY, OTHERS, RANKS, ROWS, STARTS, TARGETS, tiny_folder
from qlora_lab.records import LabError

SEEDS, FEWER = range(8), range(4)


def settings_of(row: str) -> dict: return {k: v for k, v in EVERY[row].items() if v != COMMON.get(k)}


def noted(bench: Bench, name: str, data: str, found: dict[str, dict]) -> None:
    "A ladder's rates and losses, into the record of rates."
    record = kept("quality_rates", bench.quick)
    every = record.get("data", {})
    had = every.get(data, {})
    surer = {row for row in found if row in had and len(had[row]["losses"][0]) > len(found[row]["losses"][0])}
    every[data] = had | {row: one for row, one in found.items() if row not in surer}  # of more seeds it stays
    result = {"common": COMMON, "settings": {row: settings_of(row) for row in EVERY}, "data": every}
    keep("quality_rates", result, bench.quick)


def judged(bench: Bench, part: str, rates: dict[str, float], seeds, data: str = "docstrings", measure=None,
           others: dict[str, dict] | None = None) -> None:
    "Rows at their rates over seeds, as the record of a part; `others` are cells that are no row's own."
    plan = [(row, seed, bench.cell(row, lr, seed, data)) for row, lr in rates.items() for seed in seeds]
    plan += [(name, seed, bench.cell(**how, seed=seed)) for name, how in (others or {}).items() for seed in seeds]
    said = bench.run([cell for _, _, cell in plan], measure)
    rows: dict[str, dict] = {}
    for (row, seed, cell), one in zip(plan, said):
        if one is None: continue
        own = settings_of(row) if row in EVERY else {}
        had = rows.setdefault(row, {"rate": cell["lr"], "settings": own, "seeds": {}})
        had["seeds"][str(seed)] = one
    record = kept(f"quality_{part}", bench.quick).get("data", {})
    record[data] = {"groups": bench.groups.get(data), "rows": record.get(data, {}).get("rows", {}) | rows}
    keep(f"quality_{part}", {"common": COMMON, "data": record}, bench.quick)
    if bench.cut: raise KeyboardInterrupt


def best(found: dict[str, dict]) -> dict[str, float]: return {row: one["best"] for row, one in found.items()}


def methods(bench: Bench) -> None:
    "Rates of every method, then every method at its own, with bfloat16 and two controls that must fail."
    found = ladders(bench, list(ROWS), seeds=CHOOSING)
    noted(bench, "methods", "docstrings", found)
    rates = best(found)
    rates |= {row: rates[row.removesuffix(", bfloat16")] for row in BFLOAT16}
    own = rates["nf4+dq"]
    controls = {"frozen adapters": {"row": "nf4+dq", "lr": 1e-30},
                "answers dealt anew": {"row": "nf4+dq", "lr": own, "data": "docstrings, dealt anew"}}
    judged(bench, "methods", rates, SEEDS, others=controls)


def repair(bench: Bench) -> None:
    "Starts of adapters: rates, then each at its own, beside the usual start."
    found = ladders(bench, [*STARTS, "nf4+dq", "LoRA"])
    noted(bench, "repair", "docstrings", found)
    judged(bench, "repair", best(found), FEWER)


def ranks(bench: Bench) -> None:
    "Ranks from 2 to 256, and which layers: rates, then each at its own."
    found = ladders(bench, [*RANKS, *TARGETS, "nf4+dq", "LoRA"])
    noted(bench, "ranks", "docstrings", found)
    judged(bench, "ranks", best(found), FEWER)


def others(bench: Bench) -> None:
    "Two more data sets: four rows each."
    for data in ("support", "arithmetic"):
        found = ladders(bench, list(OTHERS), data)
        noted(bench, "others", data, found)
        frozen = {"frozen adapters": {"row": "nf4+dq", "lr": 1e-30, "data": data}}
        exactly = {"right answers": right_answers} if data == "arithmetic" else None
        judged(bench, "others", best(found), range(6), data, exactly, frozen)


PARTS = {"methods": methods, "swallowed": swallowed.study, "repair": repair, "ranks": ranks, "others": others}


def time_is_up(*_) -> None: raise KeyboardInterrupt


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them by default, in this order")
    ask.add_argument("--folder", default="runs/quality", help="where the cells lie")
    ask.add_argument("--workers", type=int, default=10, help="processes that share the card")
    ask.add_argument("--minutes", type=float, default=0, help="after so many it ends, and goes on when called again")
    ask.add_argument("--exact", action="store_true", help="products of whole float32 numbers, not of TF32")
    ask.add_argument("--quick", action="store_true", help="three steps of a tiny model in each cell")
    asked = ask.parse_args()
    folder = f"{asked.folder}_quick" if asked.quick else asked.folder
    bench = Bench(folder, asked.workers, asked.quick)
    if asked.quick: bench.model = str(tiny_folder(bench.folder.parent / "quality_tiny"))
    torch.set_float32_matmul_precision("highest" if asked.exact else "high")
    if not asked.exact: os.environ[TF32] = "1"  # for the processes that this one starts
    signal.signal(signal.SIGALRM, time_is_up)
    signal.alarm(int(60 * asked.minutes))
    try:
        for name in asked.parts or PARTS:
            start = time.perf_counter()
            PARTS[name](bench)
            print(f"{name}: done, {time.perf_counter() - start:.0f} s", flush=True)
    except KeyboardInterrupt: print(f"{name}: cut short; the same call goes on")
    except LabError as e: raise SystemExit(f"{name}: {e}") from None


if __name__ == "__main__": main()
