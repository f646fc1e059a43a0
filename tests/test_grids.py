"A grid is read, checked and made into cells before anything runs; each mistake is one message with what is meant."
import json
import threading
from contextlib import suppress
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab.cell_folders import CellFolder, set_up
from qlora_lab.grids import ASIDE, DEFAULTS, SETTINGS, cell_id, cells, config_of, method_names, names, read_grid
from qlora_lab.locks import check_free, locked
from qlora_lab.records import LabError
from qlora_lab.settings import TrainConfig


def test_every_field_of_a_run_can_be_swept():
    "A field that TrainConfig is given is a setting of a cell, with its default; two are set to spare time."
    own = {f.name for f in fields(TrainConfig)} - {"folder"}
    assert own <= SETTINGS.keys()
    odd = {n for n in own if DEFAULTS[n] != SETTINGS[n].default}
    assert odd == {"eval_prompts", "checkpoint_every"}
    wanted = TrainConfig("runs/x", rank=8, eval_prompts=0, checkpoint_every=100)
    assert config_of(cells({"rank": 8})[0], "runs/x") == wanted


@pytest.mark.parametrize(("grid", "told"), [
    ({}, "the grid is empty"), ([], "the grid is empty"), ([{}], "the grid is empty"), ([{"lr": 1e-3}, {}], "is empty"),
    ("lr", "a grid is a dict"), ([1], "a grid is a dict"), (None, "a grid is a dict"),
    ({"lr": []}, r"lr=\[\]"), ({"lr": {1e-3}}, "expected a value"), ({"lr": {"from": 1}}, "expected a value"),
    ({"learning_rate": 1e-3}, "did you mean 'lr'"), ({"lora_alpha": 8}, "did you mean 'alpha'"),
    ({"lora_r": 8}, "did you mean 'rank'"),
    ({"compute_dtype": "float32"}, "did you mean 'dtype'"), ({"learning-rate": 1e-3}, "did you mean 'lr'"),
    ({"held_out": 9}, "did you mean 'eval_examples'"), ({"seeds": [1]}, "did you mean 'seed'"),
    ({"Rank": 2}, "did you mean 'rank'"), ({3: 2}, "3 is no setting"),
    ({"folder": "x"}, "each cell has its own"), ({"lr": "fast"}, "lr='fast': expected a finite number"),
    ({"lr": float("nan")}, "finite"), ({"lr": None}, "lr=None"), ({"rank": 2.5}, "a whole number"),
    ({"rank": True}, "a whole number"), ({"rslora": 1}, "true or false"), ({"double_quant": "no"}, "true or false"),
    ({"schedule": "cosin"}, "constant, linear or cosine"), ({"targets": [[]]}, "targets"), ({"data": 3}, "text"),
    ({"targets": [["q_proj", 3]]}, "targets"), ({"seed": [0, 0]}, "twice"), ({"lr": [1, 1.0]}, "twice"),
    ([{"quant_type": "mxfp4"}, {"quant_type": "mxfp4", "blocksize": 32}], "twice"),
    ([{"rank": 4}, {"rank": [2, 4]}], r"twice: \(rank=4\) and \(rank=4\)"), ({"tensorboard": [True, False]}, "twice"),
    ({"quant_type": "nf5"}, "did you mean 'nf4'"), ({"quant_type": "dynamic8"}, "no such type"),
    ({"quant_type": "none", "double_quant": True}, "double_quant=True and quant_type='none'"),
    ({"quant_type": "none", "blocksize": 64}, "blocksize=64"), ({"quant_type": "mxfp4", "blocksize": 16}, "mxfp4"),
    ({"quant_type": "int8", "double_quant": True}, "scales of its own"), ({"blocksize": 0}, "blocksize=0"),
    ({"backend": "bnb", "quant_type": "int4"}, "bitsandbytes' layers hold nf4 and fp4"),
    ({"backend": "bnb", "quant_type": "none"}, "bitsandbytes' layers"), ({"backend": "bnb", "blocksize": 32}, "of 64"),
    ({"backend": "bnb", "scales": "chosen"}, "scales='chosen'"), ({"epochs": 1, "steps": 20}, "one of them decides"),
    ({"dtype": "float8"}, "dtype"), ({"patience": 2}, "eval_every")])
def test_what_is_refused(grid, told):
    with pytest.raises(LabError, match=told) as e: cells(grid)
    assert "\n" not in str(e.value)


def test_values_of_other_kinds():
    "Ranges, arrays and numpy's numbers are what they look like; an axis of tuples has names in each."
    made = cells({"seed": range(2), "rank": np.array([2, 4]), "lr": np.float64(1e-3), "alpha": 8})
    assert len(made) == 4 and {c["rank"] for c in made} == {2, 4} and json.dumps(made)
    assert [c["targets"] for c in cells({"targets": ["all-linear", ("q_proj", "v_proj")]})][1] == ("q_proj", "v_proj")


def test_what_a_base_has_not_is_none():
    "And makes no other name: the types of a mixed grid are told apart by what they have."
    made = cells([{"quant_type": "nf4", "double_quant": [True, False]}, {"quant_type": ["none", "mxfp4", "int8"]}])
    assert [c["double_quant"] for c in made] == [True, False, None, None, None] and made[3]["blocksize"] is None
    assert len({cell_id(c) for c in made}) == len(set(names(made))) == 5


def test_a_format_s_own_block_size_is_one_of_its_sizes():
    "It is named beside another, and alone it is not; ids are as they were."
    made = cells([{"quant_type": "int4_affine"}, {"quant_type": "int4_affine", "blocksize": 128}])
    assert names(made) == ["blocksize=64", "blocksize=128"] and cell_id(made[0]) == "e03a805a0e"
    assert names(cells({"quant_type": ["nf4", "mxfp4"]})) == ["quant_type=nf4", "quant_type=mxfp4"]


def test_methods_are_named_without_seeds():
    "And without what changes no result."
    made = [*cells({"lr": [1e-3, 1e-4], "seed": [0, 1]}), *cells({"lr": 1e-2, "checkpoint_every": 3})]
    assert list(dict.fromkeys(method_names(made))) == ["lr=0.001", "lr=0.0001", "lr=0.01"]


@given(st.permutations(["rank", "lr", "seed", "quant_type"]))
def test_a_cell_is_its_settings(order):
    "Whatever the order of names, and whatever is not part of what a cell does."
    values = {"rank": 4, "lr": 1e-4, "seed": 3, "quant_type": "fp4"}
    one = cells({k: values[k] for k in order})[0]
    assert cell_id(one) == cell_id(cells(values | {"checkpoint_every": 3, "tensorboard": True})[0])
    assert cell_id(one) != cell_id(cells(values | {"seed": 4})[0])


def test_a_setting_that_is_newer_leaves_a_cell_as_it_was():
    "Its default is no part of the identity."
    cell = cells({"rank": 4})[0]
    older = {k: v for k, v in cell.items() if k not in ("packing", "budget")}
    assert cell_id(older) == cell_id(cell) and set(ASIDE) <= cell.keys()


@pytest.mark.parametrize(("text", "told"), [
    ("lr = [1e-3", "not valid TOML"), ("lr = 1e-3\n[grid]\nrank = 2", r"under \[\[grid\]\]"), ("", "the grid is empty"),
    ("grid = 3", r"under \[\[grid\]\]"), ("[table]\nrank = 2", r"\[table\]"), ("rank = 2\nrank = 4", "not valid TOML")])
def test_files_that_are_no_grid(tmp_path, text, told):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(LabError, match=told): cells(read_grid(tmp_path / "grid.toml"))


def test_a_file(tmp_path):
    (tmp_path / "grid.toml").write_text('seed = [0, 1]\n[[grid]]\nlr = 1e-3\n[[grid]]\nlr = 1e-4\nseed = 7\n')
    assert [(c["lr"], c["seed"]) for c in cells(read_grid(tmp_path / "grid.toml"))] == [(1e-3, 0), (1e-3, 1), (1e-4, 7)]


def test_folders_are_found_by_settings(tmp_path):
    "A larger grid finds a cell under its first name; other data, a damaged or a foreign cell.json are refused."
    first = set_up(tmp_path, cells({"rank": [2, 4]}), [["a", "b"]] * 2)
    again = set_up(tmp_path, cells({"rank": [2, 4], "lr": [1e-3, 5e-4]}), [["a", "b"]] * 4)
    assert {p.folder for p in first} <= {p.folder for p in again} and len({p.folder for p in again}) == 4
    with pytest.raises(LabError, match="were others than now"): set_up(tmp_path, cells({"rank": 2}), [["c", "b"]])
    path = first[0].folder / "cell.json"
    told = json.loads(path.read_text())
    told["settings"]["rank"] = 3
    path.write_text(json.dumps(told))
    with pytest.raises(LabError, match="rank was 3 there, and is 2"): set_up(tmp_path, cells({"rank": 2}), [["a", "b"]])
    path.write_text("{")
    with pytest.raises(LabError, match="not valid JSON"): set_up(tmp_path, cells({"rank": 2}), [["a", "b"]])
    with pytest.raises(LabError, match="a file"): set_up(path, cells({"rank": 2}), [["a", "b"]])


def test_a_dry_run_makes_nothing(tmp_path):
    places = set_up(tmp_path / "s", cells({"rank": [2, 4]}), [["a", "b"]] * 2, dry=True)
    assert not (tmp_path / "s").exists() and isinstance(places[0], CellFolder) and places[0].state() == "waiting"


def test_a_folder_is_looked_at_while_its_lock_comes_and_goes(tmp_path):
    "No look finds half of it, and those who look are not in each other's way."
    place = CellFolder(tmp_path / "cell", DEFAULTS)
    lock, stop, odd = tmp_path / "x", threading.Event(), []
    def hold():
        while not stop.is_set():
            with suppress(LabError), locked(lock): pass
            place.fail(LabError("no"))
            (place.folder / "failed.json").unlink()
    def look():
        for _ in range(3000):
            try: check_free(lock)
            except LabError: pass
            except OSError as e: odd.append(e)
            try: place.told("failed.json")
            except (OSError, LabError) as e: odd.append(e)
    holder, lookers = threading.Thread(target=hold), [threading.Thread(target=look) for _ in range(2)]
    for t in (holder, *lookers): t.start()
    for t in lookers: t.join()
    stop.set()
    holder.join()
    assert not odd, odd[0]


def test_one_who_looks_holds_nothing(tmp_path):
    "Another sees a free folder as free."
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        check_free(tmp_path)
