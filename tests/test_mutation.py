"The record of small changes to the code: what is counted as not caught stays in the list."
import json
import os
from unittest.mock import patch

import pytest

with patch.dict(os.environ):
    from benchmarks import mutation


def test_what_was_not_tried_again_stays_listed(monkeypatch, tmp_path):
    "Minutes that ran out after one of three, a line that has changed since, a change that somebody has looked at."
    text = [mutation.Change("rates", f"{n}:0 x", "Add", f"text {n}") for n in range(4)]
    alive = [{"place": c.place, "change": c.what, "mark": c.mark, "said": None} for c in text]
    alive.append({"place": "9:0 gone", "change": "Add", "mark": "00000000", "said": None})
    before = {"changes": 20, "tried": 20, "by tests": 12, "by the page": 3, "alive": alive}
    (tmp_path / "said.json").write_text(json.dumps({text[3].key: "changes nothing"}))
    clock = iter(range(1000))
    monkeypatch.setattr(mutation, "SAID", tmp_path / "said.json")
    monkeypatch.setattr(mutation, "changes", lambda module: text)
    monkeypatch.setattr(mutation, "forked", lambda change, *_: "failed" if change is text[0] else "passed")
    monkeypatch.setattr(mutation.time, "monotonic", lambda: next(clock))
    found = mutation.try_module("rates", 3.5, pages=False, one_in=1, before=before)
    assert [c["mark"] for c in found["alive"]] == [c["mark"] for c in alive[1:]]
    assert [c["said"] for c in found["alive"]] == [None, None, "changes nothing", None]
    assert found["tried"] == 20 == found["by tests"] + found["by the page"] + len(found["alive"])


def test_a_run_goes_on_where_the_time_was_up(monkeypatch):
    "In the order of the lines, beside what was found before; not where the module has changed since."
    text, tried = [mutation.Change("rates", f"{n}:0 x", "Add", f"text {n}") for n in range(5)], []
    alive = [{"place": text[1].place, "change": "Add", "mark": text[1].mark, "said": None}]
    before = {"changes": 5, "tried": 2, "by tests": 1, "by the page": 0, "alive": alive}
    def forked(change, *_):
        tried.append(change)
        return "failed" if change is text[2] else "passed"
    monkeypatch.setattr(mutation, "changes", lambda module: text)
    monkeypatch.setattr(mutation, "forked", forked)
    found = mutation.try_module("rates", float("inf"), pages=False, one_in=1, before=before, rest=True)
    assert tried == [None, *text[2:]]
    assert (found["tried"], found["by tests"]) == (5, 2)
    assert [c["place"] for c in found["alive"]] == ["1:0 x", "3:0 x", "4:0 x"]
    with pytest.raises(SystemExit, match="changed since"):
        mutation.try_module("rates", float("inf"), False, 1, before | {"changes": 4}, rest=True)


def test_a_change_reaches_the_tests_of_a_module_that_was_there_already():
    "The levels of NF4 are loaded with the package; a changed one fails its tests, the unchanged one does not."
    pytest.importorskip("cosmic_ray")
    change = next(c for c in mutation.changes("nf4") if "values / values.max()" in c.place and "Div_Mul" in c.what)
    assert [mutation.forked(c, ["tests/test_nf4.py"], 120) for c in (change, None)] == ["failed", "passed"]
