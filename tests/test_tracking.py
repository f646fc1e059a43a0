"A tracker is three methods: told of a run whole, through a kill, and MLflow's own files as the ten-line example."
import json
from pathlib import Path

import pytest

from conftest import make_llama
from qlora_lab.sweeping import sweep
from qlora_lab.tracking import Tracker

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
SHORT = dict(steps=4, batch_size=4, accumulation=1, rank=2, eval_examples=4, dtype="float32", checkpoint_every=2)


class Diary(Tracker):
    "Keeps what it is told, and may end a run at a step."
    def __init__(self, stop=None): self.heard, self.stop = [], stop
    def begin(self, name, settings): self.heard.append(("begin", name, settings["rank"]))
    def end(self, results): self.heard.append(("end", results and sorted(results)))
    def log(self, step, numbers):
        self.heard.append((step, numbers.get("train/loss")))
        if step == self.stop: raise KeyboardInterrupt


@pytest.fixture
def grid(tmp_path, tokenizer, jsonl):
    make_llama(layers=1, hidden=32).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return SHORT | {"model": str(tmp_path / "m"), "data": str(jsonl)}


def test_three_methods_hear_all(grid, tmp_path):
    "A run that was cut short is told whole when it goes on, each step once, with the same numbers."
    first, second, whole = Diary(stop=3), Diary(), Diary()
    with pytest.raises(KeyboardInterrupt): sweep(grid, tmp_path / "s", watchers=[first], progress=False)
    table = sweep(grid, tmp_path / "s", watchers=[second], progress=False)
    sweep(grid, tmp_path / "whole", watchers=[whole], progress=False)
    assert [h[0] for h in first.heard] == ["begin", 0, 1, 2, 3, "end"] and first.heard[-1][1] is None
    assert second.heard == whole.heard and [h[0] for h in whole.heard] == ["begin", 0, 1, 2, 3, 4, "end"]
    assert whole.heard[0] == ("begin", Path(table["folder"][0]).name, 2) and "held_out/after" in whole.heard[-1][1]


def test_a_run_without_a_start_has_no_end(grid, tmp_path):
    "A cell that fails before its first step is not heard of, and ends no other's run."
    diary = Diary()
    asked = grid | {"targets": ["all-linear", ("no_such_layer",)]}
    table = sweep(asked, tmp_path / "s", watchers=[diary], progress=False)
    assert list(table["state"]) == ["done", "failed"]
    assert [h[0] for h in diary.heard] == ["begin", 0, 1, 2, 3, 4, "end"] and diary.heard[-1][1]


def test_mlflow_in_ten_lines(grid, tmp_path, monkeypatch):
    "The class of the page, as it stands there, over MLflow's local store."
    mlflow = pytest.importorskip("mlflow")
    page = json.loads((ROOT / "nbs/reference/tracking.ipynb").read_text(encoding="utf-8"))
    source = next(s for s in ("".join(c["source"]) for c in page["cells"]) if s.startswith("class MLflow"))
    assert len([line for line in source.splitlines() if "self." in line]) <= 10
    scope = {"Tracker": Tracker}
    exec(source, scope)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = str(tmp_path / "store")
    table = sweep(grid | {"seed": [0, 1]}, tmp_path / "s", watchers=[scope["MLflow"](store)], progress=False)
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("qlora").experiment_id])
    assert {r.info.run_name for r in runs} == {Path(p).name for p in table["folder"]}
    for run in runs:
        curve = client.get_metric_history(run.info.run_id, "train/loss")
        folder = next(p for p in table["folder"] if Path(p).name == run.info.run_name)
        wanted = [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        assert [m.value for m in curve] == wanted and run.data.params["rank"] == "2" and run.info.status == "FINISHED"


def test_tensorboard_is_one_option(grid, tmp_path):
    "Each cell has its logs, which make it no other cell."
    pytest.importorskip("tensorboard")
    plain = sweep(grid, tmp_path / "plain", progress=False)
    table = sweep(grid | {"tensorboard": True}, tmp_path / "s", progress=False)
    assert list((Path(table["folder"][0]) / "tensorboard").glob("events.out.tfevents.*"))
    assert Path(table["folder"][0]).name == Path(plain["folder"][0]).name
