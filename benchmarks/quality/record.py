"""From the folders of cells to a record: for each row and seed the held-out loss of every group, and what it took."""
import os
from pathlib import Path

from benchmarks.common import RESULTS, save_result
from qlora_lab.cell_folders import CellFolder
from qlora_lab.records import read_json
from qlora_lab.runs import Run
from qlora_lab.scoring import Score


def by_group(score: Score) -> dict[str, list[float]]:
    "Group to its nats and its tokens: enough for a loss, a difference in pairs, and their intervals over groups."
    made: dict[str, list[float]] = {}
    for nats, tokens, group in zip(score.sums, score.tokens, score.groups):
        had = made.setdefault(group, [0., 0])
        had[0] += nats
        had[1] += tokens
    return made


def told(folder: Path, cell: dict) -> dict | None:
    "What a record says of a cell; None for one that is not done."
    place = CellFolder(folder, cell)
    if place.run_state() != "done": return None
    run = Run.load(folder)
    groups, measures = by_group(run.after), place.measures
    cost = place.told("measures.json").get("cost", {})
    return {"nats": [round(v[0], 3) for v in groups.values()], "before": round(run.before.loss, 5),
            "loss": round(run.after.loss, 5), "training": round(sum(run.losses[-10:]) / len(run.losses[-10:]), 4),
            "first": [round(v, 4) for v in run.losses[:5]], "seconds": round(cost.get("seconds", 0), 1),
            "peak_gib": round(run.record["peak_memory_gib"] - cost.get("kept_gib", 0), 2),
            **{k: v for k, v in measures.items() if isinstance(v, float)}}


def groups_of(folder: Path) -> dict | None:
    "Names of the groups and their tokens, the same for every cell of a data set."
    if not (folder / "run.json").exists() or read_json(folder / "run.json")["state"] != "done": return None
    found = by_group(Run.load(folder).after)
    return {"names": list(found), "tokens": [v[1] for v in found.values()]}


TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"  # by which torch is told, before it begins, what products may read


def keep(name: str, result: dict, quick: bool) -> None:
    "Write a record; a trial's goes elsewhere."
    before, now = kept(name, quick).get("products", ""), "TF32" if os.environ.get(TF32) else "float32"
    result = {"products": before if before.startswith(now) else f"{now}; {before}".rstrip("; ")} | result
    print(save_result(name, result) if not quick else save_result(f"../../runs/{name}", result), flush=True)


def kept(name: str, quick: bool) -> dict:
    "A record that is there, or nothing."
    path = (RESULTS if not quick else RESULTS / "../../runs") / f"{name}.json"
    return read_json(path) if path.exists() else {}
