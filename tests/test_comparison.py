"What may be said of a difference: in pairs, over groups and seeds, corrected; and what may not be compared at all."
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import make_llama
from qlora_lab.comparison import compare, labels
from qlora_lab.data import Split, load_jsonl, split
from qlora_lab.estimates import difference, difference_of_numbers, estimate
from qlora_lab.grids import cells
from qlora_lab.intervals import holm, interval
from qlora_lab.published import publish, summary
from qlora_lab.ranking import against, methods, winner
from qlora_lab.records import LabError
from qlora_lab.results import results
from qlora_lab.runs import Run
from qlora_lab.scoring import Score, improvement
from qlora_lab.sweeping import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = dict(steps=3, batch_size=4, accumulation=1, rank=2, eval_examples=12, dtype="float32")
BEST, OTHER = "lr=0.01,max_grad_norm=0.3", "lr=0.0001,max_grad_norm=0.3"  # named beside the one that failed


def answer_length(model, tokenizer, data): return 1. + model.config.hidden_size


def each(model, tokenizer, data):
    "A measure with a value an example."
    groups = tuple(e.stays_with for e in data.held_out)
    return Score(tuple(float(len(e.prompt)) for e in data.held_out), (1,) * len(groups), groups)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tokenizer, jsonl, one_thread):
    "Two rates with three seeds each, and one run that failed."
    work = tmp_path_factory.mktemp("swept")
    make_llama(layers=1, hidden=64).save_pretrained(work / "small")
    tokenizer.save_pretrained(work / "small")
    grid = SHORT | {"model": str(work / "small")}
    measure = {"length": answer_length, "each": each}
    sweep([grid | {"lr": [1e-2, 1e-4], "seed": [0, 1, 2]}, grid | {"lr": 1e30, "max_grad_norm": 0}], work / "s",
          split(load_jsonl(jsonl), 0.3), progress=False, measure=measure)
    return work / "s"


@pytest.fixture(scope="module")
def sides(swept):
    table = results(swept)
    return table[table["lr"] == 1e-2], table[table["lr"] == 1e-4]


def test_a_comparison_of_seeds(sides):
    "The value is the mean over seeds of the paired difference; the sentence says who is better, and on what it stands."
    found = compare(*sides)
    a, b = (list(side["held-out loss [nats/token]"]) for side in sides)
    assert math.isclose(found.difference, np.mean(a) - np.mean(b), rel_tol=1e-12)
    assert found.estimate.seeds == 3 and found.estimate.examples == 12 and found.winner == "lr=0.01"
    low, high = found.interval
    assert low < found.difference < high < 0 and "lr=0.01 is better" in str(found) and "3 seeds" in str(found)
    assert not found.within(abs(high)) and found.within(2 * abs(low))


def test_one_run_each_is_the_paired_improvement(sides):
    "With one run a side the difference is that of `scoring`, and the error that of leaving out a group."
    a, b = (Run.load(side["folder"].iloc[0]) for side in sides)
    found = compare(a, b)
    assert math.isclose(found.difference, improvement(a.after, b.after)[0], rel_tol=1e-9)
    scores, groups = (a.after, b.after), sorted(set(a.after.groups))
    def without(g):
        kept = [i for i, name in enumerate(a.after.groups) if name != g]
        parts = [Score(*(tuple(getattr(s, f)[i] for i in kept) for f in ("sums", "tokens", "groups"))) for s in scores]
        return improvement(*parts)[0]
    left = np.array([without(g) for g in groups])
    error = ((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()) ** 0.5
    assert math.isclose(found.estimate.stderr, error, rel_tol=1e-9)


def test_order_of_seeds_does_not_matter(sides):
    a, b = sides
    assert compare(a, b[::-1]).estimate == compare(a, b).estimate


def test_other_seeds_are_compared_as_groups(sides):
    "Seeds that are not the same are no pairs: the variances over groups and over each side's seeds add."
    a, b = sides
    found = compare(a[:2], b[1:])
    left, right = ([Run.load(p).after for p in side] for side in (a["folder"][:2], b["folder"][1:]))
    paired = difference([left[0]], [right[0]], True)  # of one run each: over groups alone
    assert found.estimate.seeds == 2 and paired.df > 1
    sums = [np.mean([s.sums for s in side], 0) for side in (left, right)]
    means = [Score(tuple(s.tolist()), left[0].tokens, left[0].groups) for s in sums]
    over_groups = difference([means[0]], [means[1]], True).stderr ** 2
    over_seeds = sum(np.var([s.loss for s in side], ddof=1) / 2 for side in (left, right))
    assert math.isclose(found.estimate.stderr ** 2, over_groups + over_seeds, rel_tol=1e-9)


def test_what_is_said_of_seeds(sides):
    "Of two the sentence says what helps most; of unequal numbers it gives both."
    a, b = sides
    assert "2 seeds, 1 degree of freedom: a third seed helps most" in str(compare(a[:2], b[:2]))
    told = str(compare(a[:2], b))
    assert "2 and 3 seeds" in told and "a third seed" in told and "third" not in str(compare(a, b))
    both = str(winner({"a": a, "b": b}))
    assert "is better than the other" in both and both.endswith("3 seeds; 1 comparison")


def test_equal_differences_of_a_coarse_score_are_no_certainty():
    "Nor is what one seed alone says; a number that no seed moves is as it is."
    found = difference_of_numbers([.5, .6], [.25, .35], True)
    assert math.isnan(found.p) and not found.interval()[0] > 0
    assert math.isnan(difference_of_numbers([.1, .2], [.4, .5], True).p)  # equal but for rounding
    counted = difference_of_numbers([100, 100], [200, 200], True)
    assert counted.p == 0 and counted.interval() == (-100, -100)
    assert difference_of_numbers([.5, .6], [.5, .6], True).p == 1


def test_measures_are_compared(sides):
    "A number a run over seeds, a score over examples; which is better has to be said."
    told = compare(*sides, metric="each")
    assert told.difference == 0 and not told.is_told
    with pytest.raises(LabError, match="say whether"): told.winner  # noqa: B018
    assert compare(*sides, metric="length").difference == 0
    with pytest.raises(LabError, match="no error"): compare(*(s[:1] for s in sides), metric="length")


def test_what_cannot_be_compared(sides, swept, tokenizer, jsonl, tmp_path):
    "Each in one message."
    a, b = sides
    with pytest.raises(LabError, match="has no metric 'accuracy'; it has 'held-out loss'"): compare(a, b, "accuracy")
    with pytest.raises(LabError, match="differ in lr"): compare(results(swept)[:6], b)
    with pytest.raises(LabError, match="one run beside 3 seeds"): compare(a[:1], b)
    with pytest.raises(LabError, match="no such folder"): compare(tmp_path / "none", b)
    with pytest.raises(LabError, match="twice with seed"): compare(list(a["folder"][:1]) * 2, b)
    failed = results(swept)["state"] == "failed"
    with pytest.raises(LabError, match="not done"): compare(results(swept)[failed], b)
    with pytest.raises(LabError, match="other held-out examples"):
        compare(Score((1., 2.), (1, 1), ("a", "b")), Score((1., 2.), (1, 2), ("a", "b")))


def test_a_run_whose_lines_are_lost(sides, tmp_path, capsys):
    "It has no training loss, and is compared by the rest; the steps that it took are in run.json."
    here = shutil.copytree(sides[0]["folder"].iloc[0], tmp_path / "lost")
    (here / "metrics.jsonl").unlink()
    other = sides[1]["folder"].iloc[0]
    assert compare(here, other).estimate == compare(sides[0]["folder"].iloc[0], other).estimate
    with pytest.raises(LabError, match="lost: has no metric 'training loss'; it has"):
        compare(here, other, "training loss")
    assert said(capsys, "compare", here, other)[0] == 0
    assert Run.load(here).steps_done == 3 and results(here)["steps done"].tolist() == [3]


def test_other_data_is_refused(sides, swept, tmp_path, jsonl):
    data = split(load_jsonl(jsonl), 0.3)
    grid = SHORT | {"model": str(swept.parent / "small"), "lr": 1e-2}
    fewer, held = Split(data.train[:-8], data.held_out), Split(data.train, data.held_out[:-1])
    one = sides[0][:1]
    trained = sweep(grid, tmp_path / "a", fewer, progress=False)
    scored = sweep(grid, tmp_path / "b", held, progress=False)
    with pytest.raises(LabError, match="trained on other data"): compare(one, trained)
    assert compare(one, trained, other_data=True).estimate.examples == 12
    with pytest.raises(LabError, match="scored on other held-out examples"): compare(one, scored, other_data=True)


def test_a_winner_of_a_sweep(swept):
    "Runs that differ in the seed are one method; what failed is left out, and told in the table that is published."
    found = winner(swept)
    assert list(found.values) == [BEST, OTHER] and found.winner == BEST
    assert "is better than" in str(found)
    table = summary(swept, reference=OTHER)
    assert list(table["runs"]) == [3, 3] and table["difference"].notna().sum() == 1 and table.attrs["left out"] == 1
    with pytest.raises(LabError, match="no such method"): against("lr=3", swept)
    for said in ("lr=1e-4,max_grad_norm=0.30", "max_grad_norm=0.3,lr=0.0001"):
        assert against(said, swept).equals(against(OTHER, swept))


def test_tables_are_published(swept, tmp_path):
    table = summary(swept)
    text = publish(table, tmp_path / "t.md").read_text()
    assert "12 examples in" in text and "All runs: model small, quant_type nf4, method lora, rank 2, steps 3" in text
    assert text.count("\n|") == 3 and "1 run that failed" in text and "in nats/token" in text and "±" in text
    assert "<table>" in publish(table, tmp_path / "t.html").read_text()
    assert publish(table, tmp_path / "t.csv").read_text().startswith("method,runs,held-out loss,low,high,difference")
    with pytest.raises(LabError, match="ends in .md"): publish(table, tmp_path / "t.xlsx")


def test_methods_are_named_by_what_differs(swept):
    assert {name: len(runs) for name, runs in methods(swept).items()} == {BEST: 3, OTHER: 3}


def test_no_method_takes_another_s_place(tmp_path):
    "A format's own block size beside another is a method; runs of which one does not tell a setting are refused."
    def table(some):
        for i, one in enumerate(some):
            (tmp_path / f"{i}").mkdir(exist_ok=True)
            (tmp_path / f"{i}/cell.json").write_text(json.dumps({"settings": one}))
        return pd.DataFrame({"folder": [str(tmp_path / f"{i}") for i in range(len(some))], "state": "done"})
    made = cells([{"quant_type": "int4_affine"}, {"quant_type": "int4_affine", "blocksize": 128}])
    assert list(methods(table(made))) == ["blocksize=64", "blocksize=128"]
    with pytest.raises(LabError, match="does not tell its double_quant"):
        methods(table([{"seed": 0, "double_quant": None}, {"seed": 1, "double_quant": True}]))


def test_nothing_is_known_of_one_group():
    "An interval of one group, or of one number, is unknown and not empty."
    found = estimate([Score((1., 2.), (1, 1), ("a", "a"))])
    assert math.isnan(found.interval()[0]) and math.isnan(found.p) and math.isnan(interval(1., 0.1, 1)[0])


def test_equal_sides_are_equal():
    "No difference at all has p 1, and an interval of 0 to 0."
    one = Score((1., 2., 3.), (1, 1, 2), ("a", "b", "c"))
    same = difference([one], [one], True)
    assert same.p == 1 and same.interval() == (0, 0)


@pytest.mark.parametrize(("ps", "wanted"), [([], []), ([0.2], [0.2]), ([0.01, 0.02, 0.9], [0.03, 0.04, 0.9]),
                                            ([0.5, 0.5, 0.5], [1, 1, 1])])
def test_holm(ps, wanted): assert holm(ps) == pytest.approx(wanted)


# ---- the commands

def said(capsys, *words):
    "A command's exit code and what it printed."
    from qlora_lab.cli import main
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_compare_command(swept, sides, tmp_path, capsys):
    "A folder by its methods, two runs as two sides, two seeds of one method too; the same as JSON, and as a file."
    code, out, _ = said(capsys, "compare", swept, "--out", tmp_path / "t.md")
    assert code == 0 and "max_grad_norm=0.3 is better" in " ".join(out.split()) and (tmp_path / "t.md").exists()
    one, other = sides[0]["folder"].iloc[0], sides[1]["folder"].iloc[0]
    code, out, _ = said(capsys, "compare", one, other, "--json")
    told = json.loads(out)
    assert code == 0 and told["told"] and len(told["methods"]) == 2
    assert math.isclose(told["difference"], compare(one, other).difference)
    assert said(capsys, "compare", *sides[0]["folder"][:2])[0] == 0
    code, out, _ = said(capsys, "compare", swept, "--metric", "each", "--better", "higher", "--json")
    assert code == 0 and json.loads(out)["difference"] == 0
    assert said(capsys, "compare", swept, "--metric", "each")[0] == 0


@pytest.mark.parametrize(("words", "told"), [
    (["--metric", "accuracy"], "has no metric 'accuracy'"), (["--out", "t.xlsx"], "ends in .md"),
    (["--reference", "lr=7"], "no such method"), (["--prompts", "none.txt"], "no such file")])
def test_mistakes_of_the_compare_command(swept, capsys, words, told):
    code, _, err = said(capsys, "compare", swept, *words)
    assert code == 2 and told in err and err.count("\n") == 1


def test_the_same_cell_of_two_sweeps(swept, sides, tmp_path, capsys):
    "Each place is a side with all its seeds, however it is written; unfinished ones are told, or left out and counted."
    for name, count in (("one", 3), ("two", 3)):
        for folder in sides[0]["folder"][:count]: shutil.copytree(folder, tmp_path / name / Path(folder).name)
    code, out, _ = said(capsys, "compare", tmp_path / "one", f"{tmp_path}/two/", "--json")
    told = json.loads(out)
    assert code == 0 and [row["runs"] for row in told["methods"]] == [3, 3] and told["difference"] == 0
    same = [next((tmp_path / name).glob("*seed=0*")) for name in ("one", "two")]
    assert {str(p) for p in same} == set(labels([[(Run.load(p), None)] for p in same]))
    assert said(capsys, "compare", *same)[0] == 0
    failed = next(swept.glob("*1e+30*"))
    code, _, err = said(capsys, "compare", f"{failed}/", sides[0]["folder"].iloc[0])
    assert code == 2 and "not done" in err
    said(capsys, "compare", swept, "--out", tmp_path / "t.md")
    assert "1 run that failed" in (tmp_path / "t.md").read_text()


def test_json_is_json(swept, tmp_path, capsys):
    "What else is said goes to the other stream; a reference may be written with other digits."
    code, out, err = said(capsys, "compare", swept, "--json", "--out", tmp_path / "t.md", "--reference",
                          "lr=1e-4,max_grad_norm=0.3")
    assert code == 0 and json.loads(out)["b"] == OTHER and "written" in err and (tmp_path / "t.md").exists()


def strict(text):
    "JSON as the standard has it: without NaN and infinities."
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_what_nothing_is_known_of_is_null_in_json(sides, tmp_path, capsys):
    "One held-out example has no error; its interval is none, and not NaN."
    places = []
    for side, name in zip(sides, "ab"):
        here = shutil.copytree(side["folder"].iloc[0], tmp_path / name)
        record = json.loads((here / "run.json").read_text())
        for when in ("before", "after"): record[when]["score"] = {k: v[:1] for k, v in record[when]["score"].items()}
        (here / "run.json").write_text(json.dumps(record))
        places.append(here)
    code, out, _ = said(capsys, "compare", *places, "--json")
    assert code == 0 and strict(out)["interval"] == [None, None] and "NaN" not in out


def test_other_data_may_be_said(swept, sides, tmp_path, jsonl, capsys):
    data = split(load_jsonl(jsonl), 0.3)
    grid = SHORT | {"model": str(swept.parent / "small"), "lr": 5e-3}
    sweep(grid, tmp_path / "a", Split(data.train[:-8], data.held_out), progress=False)
    one = sides[0]["folder"].iloc[0]
    code, _, err = said(capsys, "compare", one, tmp_path / "a")
    assert code == 2 and "--other-data" in err
    assert said(capsys, "compare", one, tmp_path / "a", "--other-data")[0] == 0


def test_a_run_that_is_not_there(swept, tmp_path, capsys):
    assert said(capsys, "compare", tmp_path / "gone", swept)[0] == 2
    assert said(capsys, "compare")[0] == 2
