"""The study of quality: its rows are cells, its rates are found, and what chooses a rate does not judge the row."""
from math import log2

import pytest

from benchmarks.common import RESULTS
from benchmarks.quality import cells as study
from benchmarks.quality.record import by_group
from benchmarks.quality.rows import EVERY, data_sets, dealt_anew
from qlora_lab.grids import cell_id, cells
from qlora_lab.records import read_json
from qlora_lab.scoring import Score, improvement


@pytest.mark.parametrize("row", EVERY)
def test_every_row_is_a_cell_of_its_own(row):
    bench = study.Bench("runs/none", 1, False)
    made = [cells([bench.cell(r, 1e-3, 0)])[0] for r in EVERY]
    assert len({cell_id(c) for c in made}) == len(EVERY)
    assert cells([bench.cell(row, 1e-3, 0, "docstrings, to choose by")])[0]["steps"] == 100


class Valley:
    "A bench whose losses are known: the best rate is 2^n times the middle one."
    cut, quick = False, False
    def __init__(self, n): self.n, self.asked = n, []

    def cell(self, row, lr, seed, data): return {"lr": lr, "seed": seed}

    def run(self, asked):
        self.asked += asked
        return [{"loss": 2 + abs(log2(c["lr"] / study.MIDDLE) - self.n) + c["seed"] * 1e-6} for c in asked]


@pytest.mark.parametrize("n", [-3, -1, 0, 2])
def test_a_ladder_goes_on_until_its_best_is_no_end(n):
    bench = Valley(n)
    found = study.ladders(bench, ["nf4+dq"], seeds=(90, 91))["nf4+dq"]
    assert found["best"] == pytest.approx(study.MIDDLE * 2. ** n)
    assert found["rates"][0] < found["best"] < found["rates"][-1]
    once = {(c["lr"], c["seed"]) for c in bench.asked}
    assert len(once) == len(bench.asked) == 2 * len(found["rates"])


def test_a_row_that_only_fails_ends():
    class Failing(Valley):
        def run(self, asked): return [None] * len(asked)
    found = study.ladders(Failing(0), ["nf4+dq"])["nf4+dq"]
    assert len(found["rates"]) <= study.ROOM and all(v == [None] for v in found["losses"])


@pytest.mark.parametrize("name", ["docstrings", "support", "arithmetic"])
def test_what_chooses_and_what_judges_is_not_learned(name):
    judge, choose = data_sets()[name], data_sets()[f"{name}, to choose by"]
    def asked(examples): return {e.prompt for e in examples}
    assert asked(judge.train) == asked(choose.train) and len(judge.held_out) >= 50
    for held in (judge.held_out, choose.held_out): assert not asked(held) & asked(judge.train)
    if name != "arithmetic":
        groups = [{e.stays_with for e in part} for part in (judge.train, judge.held_out, choose.held_out)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_the_control_has_the_same_answers_under_other_questions():
    whole = data_sets()["docstrings"].train
    dealt = dealt_anew(whole)
    assert sorted(e.answer for e in dealt) == sorted(e.answer for e in whole)
    assert sum(a.answer == b.answer for a, b in zip(dealt, whole)) < 0.05 * len(whole)


def test_sums_by_group_are_enough_for_a_paired_difference():
    a = Score((3., 1., 2., 5.), (2, 1, 1, 3), ("x", "y", "x", "z"))
    b = Score((2., 1., 1., 4.), (2, 1, 1, 3), ("x", "y", "x", "z"))
    def grouped(s):
        parts = by_group(s)
        return Score(tuple(v[0] for v in parts.values()), tuple(v[1] for v in parts.values()), tuple(parts))
    assert improvement(grouped(a), grouped(b)) == pytest.approx(improvement(a, b))


def test_the_records_hold_every_seed_of_every_row():
    "And sums by group that make the loss which stands beside them."
    data = read_json(RESULTS / "quality_methods.json")["data"]["docstrings"]
    total = sum(data["groups"]["tokens"])
    for name, row in data["rows"].items():
        assert len(row["seeds"]) == 8, name
        for seed in row["seeds"].values():
            assert len(seed["nats"]) == len(data["groups"]["names"])
            assert sum(seed["nats"]) / total == pytest.approx(seed["loss"], abs=1e-4)
