"""The benchmark of two cards, in small: its parts by gloo, its record, and what a part that fails leaves standing."""
import json
import os
import sys

import psutil
import pytest
from several import several

from benchmarks import gpus, on_cards
from qlora_lab.processes import rank, world

pytestmark = pytest.mark.usefixtures("one_thread")
NOT_MODEL = "optimizer state", "libraries", "gradients from the start"


@pytest.fixture(scope="module")
def run():
    with several() as run: yield run


def part(name):
    "A part as one of its processes has it."
    env = {"RANK": rank(), "LOCAL_RANK": rank(), "WORLD_SIZE": world(), "LOCAL_WORLD_SIZE": world()}
    os.environ |= {key: str(value) for key, value in env.items()}  # as torchrun; accelerate reads them
    return on_cards.PARTS[name](True)


def planned(row):
    "What the plan of a row holds of its model."
    p = on_cards.plan(on_cards.SMALL, **row["settings"], **row["spread"])
    return {name: size for name, size in p.held.items() if name not in NOT_MODEL}


@pytest.fixture(scope="module")
def alone(): return on_cards.PARTS["alone"](True)


@pytest.mark.parametrize("name", ["ddp", "shard65", "offload65"])
def test_two_beside_one(run, alone, name):
    "The same examples on each card: the loss of one alone, wherever the base is; and what a plan holds, to the byte."
    for rows in run(2, part, name):
        one = {(r["model"], r["each"]): r for r in alone}
        assert {r["cards"] for r in rows} == {2} and {r["cards"] for r in alone} == {1}
        assert all(r["loss"] == pytest.approx(one[r["model"], r["each"]]["loss"], abs=2e-5) for r in rows)
        assert all(r["held"] == planned(r) and r["tokens_per_s"] > 0 for r in rows)
        assert all((r["shard_base_s"] is not None) == (r["spread"]["sharding"] == "full") for r in rows)
        assert all(r["spread"]["offload"] == (name == "offload65") and r["notices"] == [] for r in rows)


def test_further_plans(run):
    for rows in run(2, part, "plans"): assert len(rows) == 4 and all(r["held"] == planned(r) for r in rows)


def test_peers(run):
    "accelerate cuts each layer, and what it gathers are the bytes that were loaded."
    for found in run(2, part, "peers"):
        theirs, layers = found["theirs"], on_cards.SMALL["num_hidden_layers"]
        for when in ("before", "after"):
            first = theirs[when].pop("first_layer")
            assert theirs[when] == {"layers": layers, "layers_cut": layers, "layers_with_the_bytes_loaded": layers}
            assert first["words"] > 5_000 and first["other"] == first["of_them_nan"] == 0
        assert found["changed_by_copying"]["copy_"] == 0
        assert abs(theirs["loss"] - found["ours"]["loss"]) < 0.1 and found["ratio"] > 0


def test_a_part_is_started_by_torchrun(tmp_path, capsys):
    "From the command line to the record; the part of another day stays."
    record = tmp_path / "gpus.json"
    record.write_text(json.dumps({"ddp": "of another day"}))
    gpus.main(["wire", "--tiny", "--to", str(record)])
    found = json.loads(record.read_text())
    assert [r["what"] for r in found["wire"]] == ["all_gather", "all_reduce"] * 2 and found["ddp"] == "of another day"
    assert all(r["gbs"] > 0 and r["cards"] == 2 for r in found["wire"])
    assert found["about"]["wire"]["seconds"] > 0 and found["about"]["wire"]["versions"]["torch"]


def test_a_part_that_takes_too_long_is_ended(monkeypatch):
    "With its processes."
    monkeypatch.setattr(gpus, "LIMIT", 4)
    with pytest.raises(RuntimeError, match="ddp, 2 processes:\nnot done in 4 s\n"): gpus.launched("ddp", 2, True)
    lines = [p.info["cmdline"] or () for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if "benchmarks.on_cards" in line and "ddp" in line]


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def launched(name, count, tiny):
        if name == "alone" and count == 1: raise RuntimeError("out of memory")
        return [{"model": "", "each": 1, "sequence": 1, "tokens_per_s": 10. * count}]
    monkeypatch.setattr(gpus, "launched", launched)
    with pytest.raises(SystemExit, match="failed: alone"): gpus.main(["--to", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(gpus.PARTS) - set(found) == {"alone"} and found["ddp"][0]["tokens_per_s"] == 20.
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(SystemExit): gpus.main(["ddp", "ddq"])
    assert "no part ddq" in capsys.readouterr().err


@pytest.mark.parametrize("line, limit, said", [("raise SystemExit('gone wrong')", 60, "gone wrong"),
                                               ("print('begun', flush=True)\nimport time; time.sleep(60)", 3,
                                                "not done in 3 s\nbegun")])
def test_what_processes_said_last_is_told(tmp_path, monkeypatch, line, limit, said):
    "Of processes that end by an error, or do not end."
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{line}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gpus.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(gpus, "LIMIT", limit)
    with pytest.raises(RuntimeError, match=said): gpus.launched("wire", 2, True)
