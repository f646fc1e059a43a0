"Verdicts follow from numbers: rules, readers of records, the lesson's tables, and what happens when a record changes."
import copy
import json
import re
import shutil
from math import exp, isfinite
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab.claims import (
    VERDICTS,
    Claim,
    Number,
    Rule,
    about,
    at_least,
    at_most,
    claims_table,
    exactly,
    left_by,
    near,
    over,
)
from qlora_lab.deciding import READERS, from_records
from qlora_lab.records import LabError
from qlora_lab.statements import CLAIMS, TOPICS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
FOUND = from_records(RESULTS)
FINITE = st.floats(-100, 100)
RULES = st.sampled_from([at_most(1), at_most(1, 2, 3), at_least(0.5, 0.2), near(10, 1, 2, 5), about(10, 2, 4)])


def verdict(name, number): return CLAIMS[name].rule.verdict(number)


# ---- rules

@given(RULES, FINITE, FINITE, st.booleans())
def test_a_number_with_two_ends_gets_no_better_verdict_than_its_ends_together(rule, a, b, estimated):
    number = Number(min(a, b), max(a, b), estimated=estimated)
    ends = {rule.verdict(exactly(x)) for x in (a, b)}
    found = rule.verdict(number)
    if estimated: assert found in ends | {"open"}
    else: assert found == "holds with limits" or VERDICTS.index(found) <= max(map(VERDICTS.index, ends))
    if found == "holds": assert ends == {"holds"}
    if a == b: assert {found} == ends and found != "open"


@given(RULES, FINITE, st.floats(0, 20), st.floats(0, 20))
def test_a_wider_interval_never_decides_more(rule, middle, half, more):
    narrow, wide = (rule.verdict(Number(middle - h, middle + h, estimated=True)) for h in (half, half + more))
    assert wide in (narrow, "open")


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), FINITE)
def test_the_ranges_of_a_rule_decide_in_their_order(limit, second, third, x):
    limits, misleading = limit + second, limit + second + third
    expected = VERDICTS[(x > limit) + (x > limits) + (x > misleading)]
    assert at_most(limit, limits, misleading).verdict(exactly(x)) == expected
    assert at_least(-limit, -limits, -misleading).verdict(exactly(-x)) == expected


def test_an_open_claim_says_what_is_left():
    rule = at_most(0.01, limits=0.03)
    def left(least, most): return left_by(Number(least, most, estimated=True), rule)
    assert left(0.018, 0.037) == ["holds with limits", "wrong"] and left(0.0, 0.02) == ["holds", "holds with limits"]
    assert left(0.0, 0.1) == ["holds", "holds with limits", "wrong"] and left(0.02, 0.025) == ["holds with limits"]
    assert left_by(Number(0, 20, estimated=True), near(10, 1)) == ["holds", "wrong"]


def test_an_interval_around_a_small_range_is_open_and_circumstances_around_it_are_limits():
    rule = near(10, 1)
    assert rule.verdict(Number(0, 20, estimated=True)) == "open"
    assert rule.verdict(over([0, 20, 10])) == "holds with limits"
    assert rule.verdict(over([12, 20])) == rule.verdict(Number(12, 20, estimated=True)) == "wrong"


def test_what_is_no_number_and_no_rule_is_refused():
    for ends in ((1, 0), (float("nan"), 1), (0, float("inf"))):
        with pytest.raises(LabError, match="two finite ends"): Number(*ends)
    with pytest.raises(LabError, match="inside the next"): Rule((0, 5), (1, 5), (0, 5))
    with pytest.raises(LabError, match="inside the next"): at_most(2, limits=1)
    with pytest.raises(LabError, match="no values"): over([])


def test_a_number_is_written_with_its_unit_once():
    assert str(exactly(0.373, "{:.3f} bits")) == "0.373 bits"
    assert str(over([16, 32], "{:.0f} bits")) == "16 to 32 bits"
    assert str(over([0.081, 0.9996], "{:.0%}", "both bases")) == "8% to 100% (both bases)"


# ---- statements

@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_a_claim_names_its_source_and_the_page_of_its_number(claim):
    assert claim.topic in TOPICS and claim.says.endswith(".") and claim.who
    assert (ROOT / "nbs" / claim.page).exists()
    local, _, anchor = claim.source.partition("#")
    if "://" in claim.source: assert re.fullmatch(r"https://[\w.-]+/\S+", claim.source)
    else: assert f"### {anchor}\n" in (ROOT / "nbs" / local).read_text().replace("\\n", "\n")


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_each_claim_could_come_out_otherwise(claim):
    rule = claim.rule
    ends = {x for r in (rule.holds, rule.limits, rule.misleading) for x in r if isfinite(x)}
    tried = {rule.verdict(exactly(x + d)) for x in ends for d in (-1e9, -1e-9, 0, 1e-9, 1e9)}
    assert "holds" in tried and tried & {"wrong", "misleading"}


def test_a_table_needs_a_number_for_each_claim_and_none_is_open():
    claims = list(CLAIMS.values())[:2]
    with pytest.raises(LabError, match=f"no number for {claims[1].name}"):
        claims_table(claims, {claims[0].name: exactly(1)})
    table = claims_table(claims, {claims[0].name: exactly(8, "{:.1f}"), claims[1].name: None}, "../")
    first, second = table.splitlines()[2:]
    assert "| **holds** |" in first and "**8.0**" in first and "](../03_double_quant.ipynb)" in first
    assert "| **open** |" in second and "no record yet" in second
    assert "](../reference/bibliography.ipynb#qlora)" in second
    wide = Number(7, 9, "{:.0f}", estimated=True)
    row = claims[0].row(wide)
    assert "| **open** |" in row and "**7 to 9**, which leaves *holds* or *holds with limits*" in row


# ---- the lesson

def lesson_rows() -> dict[str, str]:
    "The rows of the lesson's tables as they are stored, by what is said."
    cells = json.loads((ROOT / "nbs/17_claims.ipynb").read_text())["cells"]
    shown = "\n".join("".join(o["data"].get("text/markdown", "")) for c in cells for o in c.get("outputs", [])
                      if "data" in o)
    return {row.split(" (", 1)[0].removeprefix("| "): row for row in shown.splitlines() if row.startswith("| ")}


def row_of(claim: Claim, number) -> str: return claim.row(number)


def test_the_lesson_shows_every_claim():
    rows = lesson_rows()
    assert {c.says for c in CLAIMS.values()} <= set(rows)
    assert len(CLAIMS) >= 30 and set(READERS) >= {"memory_cuda", "merging", "quality_methods"}


@pytest.mark.parametrize("name", FOUND)
def test_a_verdict_in_the_lesson_is_what_the_record_says_today(name):
    assert lesson_rows()[CLAIMS[name].says] == row_of(CLAIMS[name], FOUND[name])


@pytest.mark.parametrize("name", sorted(set(CLAIMS) - set(FOUND)))
def test_a_verdict_in_the_lesson_is_one_that_its_rule_can_give(name):
    "For what the lesson computes itself: the row has a verdict and, unless it is open, a number."
    row = lesson_rows()[CLAIMS[name].says]
    said = next(v for v in VERDICTS if f"| **{v}** |" in row)
    assert (said == "open") == ("no record yet" in row)
    number = re.search(r": \*\*([\d.,]+)[^*]*\*\* \(\[", row)
    if number and "%" not in row.split("** ([")[0] and " to " not in number[0]:
        assert verdict(name, exactly(float(number[1].replace(",", "")))) == said


# ---- records that change

def change(record: dict, path: str, value) -> None:
    *way, last = path.split("/")
    for key in way: record = record[int(key) if key.isdigit() else key]
    record[int(last) if last.isdigit() else last] = value


def tampered(folder: Path, record: str, change_it) -> dict:
    shutil.copytree(RESULTS, folder, dirs_exist_ok=True)
    content = json.loads((folder / f"{record}.json").read_text())
    change_it(content)
    (folder / f"{record}.json").write_text(json.dumps(content))
    return from_records(folder)


def never_finished(model):
    def change_it(r):
        for c in r["claims"]:
            if c["model"] != model: continue
            for t in c["tried"]: t["outcome"] = "out of memory"
    return change_it


def small(r):
    for t in next(c["tried"] for c in r["claims"] if c["model"] == "llama-2-70b"):
        if t["outcome"] == "finished": t["reserved_gib"] = 20


def slow_paging(r):
    for p in r["peers"]:
        if p["paged"]: p["step_s"] *= 3


def as_fast(r):
    for row in r["layer"]: row["bitsandbytes_ms"] = row["lab_recorded_ms"] = row["bf16_ms"] = row["bf16_recorded_ms"]


def faster(r):
    as_fast(r)
    for row in r["layer"]: row["bf16_ms"] = row["bf16_recorded_ms"] = 2 * row["bf16_ms"]


def swap(way):
    def change_it(r): r["ways"][way] = r["ways"]["dequantized, bfloat16"]
    return change_it


def no_spike(r): change(r, "spike/runs/2/peak_gib", max(r["spike"]["runs"][0]["peaks_gib"][:-1]))


CHANGES = [("7b", "memory_cuda", never_finished("llama-7b"), "wrong"),
           ("13b", "memory_cuda", never_finished("llama-13b"), "wrong"),
           ("33b", "memory_cuda", never_finished("llama-33b"), "wrong"),
           ("65b", "memory_cuda", never_finished("llama-65b"), "wrong"),
           ("70b on 24", "memory_cuda", small, "holds"), ("paged speed", "memory_cuda", slow_paging, "wrong"),
           ("spike", "paged_cuda", no_spike, "holds"), ("slower", "gpu", as_fast, "wrong"),
           ("cheaper", "gpu", faster, "holds"), ("lossless", "merging", swap("PEFT, bitsandbytes 4 bit"), "holds"),
           ("again", "merging", swap("4bit, nearest"), "holds"),
           ("sixteen", "merging", lambda r: change(r, "ways/PEFT, 16-bit base/agreement", 0.999), "holds")]


@pytest.mark.parametrize(("name", "record", "change_it", "expected"), CHANGES, ids=[c[0] for c in CHANGES])
def test_a_record_that_says_otherwise_changes_the_verdict_and_the_row(tmp_path, name, record, change_it, expected):
    now = tampered(tmp_path, record, change_it)
    assert verdict(name, now[name]) == expected != verdict(name, FOUND[name])
    assert row_of(CLAIMS[name], now[name]) != lesson_rows()[CLAIMS[name].says]  # so that the lesson's test fails


def test_an_untouched_copy_changes_nothing(tmp_path):
    assert tampered(tmp_path, "gpu", lambda r: None) == FOUND


@pytest.mark.parametrize("record", READERS)
def test_a_record_that_is_not_there_leaves_its_claims_open_and_no_others(tmp_path, record):
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{record}.json").unlink(missing_ok=True)
    now, mine = from_records(tmp_path), READERS[record][1]
    assert {verdict(name, now[name]) for name in mine} == {"open"}
    assert {k: v for k, v in now.items() if k not in mine} == {k: v for k, v in FOUND.items() if k not in mine}


@pytest.mark.parametrize("record", [r for r in READERS if (RESULTS / f"{r}.json").exists()])
def test_a_record_of_another_form_is_refused_by_name(tmp_path, record):
    (tmp_path / f"{record}.json").write_text('{"provenance": {}}')
    with pytest.raises(LabError, match=f"{record}.json: this record does not say what decides {READERS[record][1][0]}"):
        from_records(tmp_path)


# ---- records of quality, made up

GROUPS = 8


def side(by: float, seeds: int = 6, rate: float = 1e-3, right: float = 0.6) -> dict:
    "A row whose loss is 2.5 nats a token, times 1 + by, with what a seed and a group do to it."
    luck = 1 if right == 0.6 else 2  # of each method its own
    one = {str(s): {"nats": [(250 + s + 3 * g) * (1 + by) for g in range(GROUPS)], "before": 4.,
                    "right answers": right + luck * s % 5 / 1000, "loss": 2.5 * (1 + by)} for s in range(seeds)}
    return {"rate": rate, "seeds": one}


def quality(rows: dict, data: str = "docstrings") -> dict:
    groups = {"names": [f"module {g}" for g in range(GROUPS)], "tokens": [100] * GROUPS}
    return {"data": {data: {"groups": groups, "rows": rows}}}


@pytest.mark.parametrize(("by", "expected"), [(0.004, "holds"), (-0.01, "holds"), (0.02, "holds with limits"),
                                              (0.08, "wrong")])
def test_comparable_follows_from_the_rows(tmp_path, by, expected):
    rows = {"full": side(0), "LoRA": side(0.001), "nf4+dq": side(by)}
    (tmp_path / "quality_methods.json").write_text(json.dumps(quality(rows)))
    now = from_records(tmp_path)
    assert verdict("comparable", now["comparable"]) == expected
    assert now["comparable"].least <= by <= now["comparable"].most and now["comparable"].estimated


def test_seeds_that_disagree_leave_a_claim_open(tmp_path):
    rows = {"full": side(0), "nf4+dq": side(0)}
    for s, one in rows["nf4+dq"]["seeds"].items():
        one["nats"] = [x * (1.05 if int(s) % 2 else 0.95) for x in one["nats"]]
    (tmp_path / "quality_methods.json").write_text(json.dumps(quality(rows)))
    assert verdict("comparable", from_records(tmp_path)["comparable"]) == "open"


def test_rows_that_are_not_run_yet_and_single_seeds_leave_a_claim_open(tmp_path):
    without_groups = quality({"full": side(0), "nf4+dq": side(0)})
    without_groups["data"]["docstrings"]["groups"] = None
    for record in (quality({"full": side(0)}), quality({"full": side(0), "nf4+dq": side(0, seeds=1)}), without_groups):
        (tmp_path / "quality_methods.json").write_text(json.dumps(record))
        assert from_records(tmp_path)["comparable"] is None


def test_rows_that_learned_nothing_decide_nothing(tmp_path):
    "Or a training that does not work would prove that 4 bits cost nothing."
    rows = {"full": side(0, right=0), "nf4+dq": side(0, right=0)}
    for row in rows.values():
        for one in row["seeds"].values(): one["before"] = one["loss"]
    (tmp_path / "quality_methods.json").write_text(json.dumps(quality(rows)))
    (tmp_path / "quality_others.json").write_text(json.dumps(quality(rows, "arithmetic")))
    now = from_records(tmp_path)
    assert now["comparable"] is None and now["one percent"] is None


@pytest.mark.parametrize(("right", "expected"), [(0.6, "holds"), (0.58, "holds with limits"), (0.4, "wrong"),
                                                 (0.8, "holds")])
def test_one_percent_is_about_right_answers(tmp_path, right, expected):
    rows = {"full": side(0, right=0.6), "nf4+dq": side(0, right=right)}
    (tmp_path / "quality_others.json").write_text(json.dumps(quality(rows, "arithmetic")))
    assert verdict("one percent", from_records(tmp_path)["one percent"]) == expected
    (tmp_path / "quality_others.json").write_text(json.dumps(quality(rows, "support")))
    assert from_records(tmp_path)["one percent"] is None


@pytest.mark.parametrize(("by", "expected"), [(0.02, "holds"), (-0.02, "wrong")])
def test_all_layers_is_about_the_lowest_rank(tmp_path, by, expected):
    rows = {"nf4+dq, attention": side(by), "nf4+dq, rank 2": side(0)}
    (tmp_path / "quality_ranks.json").write_text(json.dumps(quality(rows)))
    assert verdict("all layers", from_records(tmp_path)["all layers"]) == expected


@pytest.mark.parametrize(("rates", "expected"), [([8, 16], "holds"), ([4, 8], "holds with limits"), ([2, 2], "wrong")])
def test_ten_times_is_about_best_rates_over_the_data_sets(tmp_path, rates, expected):
    data = {f"data {i}": {"nf4+dq": {"best": k * 1e-4}, "full": {"best": 1e-4}, "LoRA": {"best": 1.}}
            for i, k in enumerate(rates)}
    (tmp_path / "quality_rates.json").write_text(json.dumps({"data": data}))
    assert verdict("ten times", from_records(tmp_path)["ten times"]) == expected
    without = copy.deepcopy(data)
    for rows in without.values(): del rows["full"]
    (tmp_path / "quality_rates.json").write_text(json.dumps({"data": without}))
    assert from_records(tmp_path)["ten times"] is None


def format_study(by: float, documents: int = 12) -> dict:
    "A model's part of data_types.json: every document costs `by` nats a token more once its weights are rounded."
    before = [3. * 500 + 7 * d for d in range(documents)]
    rows = {"tokens": [500] * documents, "kl": [0.] * documents, "agree": [500] * documents}
    return {"models": {"as it is": {"nats": before} | rows},
            "formats": {"nf4+dq/64": {"nats": [x + 500 * by for x in before]} | rows}}


@pytest.mark.parametrize(("costs", "expected"), [((0.01, 0.005), "holds"), ((0.05, 0.005), "holds with limits"),
                                                 ((0.2, 0.15), "misleading"), ((0.7, 0.5), "wrong")])
def test_near_full_is_about_perplexity_of_two_models(tmp_path, costs, expected):
    models = dict(zip(("smollm2", "from_nothing"), map(format_study, costs)))
    (tmp_path / "data_types.json").write_text(json.dumps({"models": models}))
    number = from_records(tmp_path)["near full"]
    assert verdict("near full", number) == expected
    assert (number.least, number.most) == pytest.approx((exp(min(costs)), exp(max(costs))))
