"Files of examples and grids that are wrong: each is refused by its name and place, or taken; nothing else happens."
import json
import random

import pandas as pd
import pytest
from bad_inputs import NESTED, as_text, refusal, refused, spoiled_bytes, spoiled_value, spoilings, written
from hypothesis import given
from hypothesis import strategies as st

from conftest import CHATML, make_tokenizer, searched
from qlora_lab.data import data_hash, encode, load_examples, split
from qlora_lab.engine.data_report import data_report
from qlora_lab.grids import cells, names, read_grid
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = ("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML).replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}")


def turn(role, content, **more): return {"role": role, "content": content, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ROWS = [
    {"messages": [turn("system", "Be"), turn("user", "hi"), turn("assistant", "ho", weight=1)], "group": "g"},
    {"prompt": "a", "completion": "b", "group": 3},
    {"instruction": "a", "input": "", "output": "b", "system": "s"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    {"messages": [turn("user", "q"), turn("assistant", "", tool_calls=[CALL]),
                  turn("tool", "r", tool_call_id="c1", name="f"), turn("assistant", "a")], "tools": [{"name": "f"}]},
    {"text": "plain"}, {"prompt": [turn("user", "x")], "completion": [turn("assistant", "y")]}]
LINES = "".join(as_text(row) + "\n" for row in ROWS)
TABLE = b'prompt,completion,group\na,b,1\n"x, y","z\n""q""",2\nlast,one,\n'
GRID = b"""steps = 3
lr = [1e-3, 1e-4]
quant_type = ["nf4", "fp4"]
[[grid]]
rank = 4
targets = [["q_proj", "v_proj"]]
[[grid]]
rank = 8
init = "pissa"
"""


def learned(path):
    "All that a training does with a file before the first step."
    rows = load_examples(path)
    assert len(data_hash(rows)) == 16
    try: split(rows, 0.5)
    except LabError as e: assert "leave one side of the split empty" in str(e)
    encode(TOKENIZER, rows, 200, "truncate", say=lambda line: None)


def reported(path): data_report(path, TOKENIZER, 64, None, 1)


def swept(path): names(cells(read_grid(path)))


@pytest.mark.parametrize("form", range(len(ROWS)))
def test_odd_values_in_a_row(form, tmp_path):
    "In every form: a value exchanged, a key lost, in a line or in a list."
    said = set()
    for seed in spoilings(24):
        row = spoiled_value(ROWS[form], seed)
        for read in (learned, reported) if seed % 6 == 0 else (learned,):
            said.add(refusal(read, written(tmp_path / "a.jsonl", as_text(row) + "\n" + as_text(ROWS[1]) + "\n")))
        said.add(refusal(learned, written(tmp_path / "a.json", as_text([ROWS[1], row]))))
    assert len(said - {None}) > 3


@pytest.mark.parametrize("name, content, read", [
    ("a.jsonl", LINES.encode(), learned), ("a.json", as_text(ROWS).encode(), learned), ("a.csv", TABLE, learned),
    ("a.tsv", TABLE.replace(b",", b"\t"), learned), ("grid.toml", GRID, swept)])
def test_odd_bytes(name, content, read, tmp_path):
    "One fault in a file of each kind; the control is the file as it was."
    read(written(tmp_path / name, content))
    said = [refusal(read, written(tmp_path / name, spoiled_bytes(content, seed))) for seed in spoilings(60)]
    assert sum(s is not None for s in said) > 15


def test_odd_bytes_in_parquet(tmp_path):
    pd.DataFrame({"prompt": ["a", "b"] * 50, "completion": ["c", "d"] * 50}).to_parquet(tmp_path / "good.parquet")
    raw = (tmp_path / "good.parquet").read_bytes()
    said = [refusal(learned, written(tmp_path / "a.parquet", spoiled_bytes(raw, seed))) for seed in spoilings(60)]
    assert sum(s is not None for s in said) > 15


BOMBS = {
    "deep list": NESTED, "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000, "deep and open": "[" * 10**6,
    "deep in a field": '{"prompt": "a", "completion": ' + NESTED + "}",
    "deep in a text": json.dumps({"messages": "[" * 50_000 + "]" * 50_000}),
    "deep in tools": json.dumps({"prompt": "a", "completion": "b", "tools": "[" * 50_000 + "]" * 50_000}),
    "digits": '{"prompt": "a", "completion": "b", "group": ' + "9" * 10_000 + "}",
    "a field twice": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "half a character in a group": '{"prompt": "a", "completion": "b", "group": "\\ud800"}',
    "half a character in tools": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}'
                                 '], "tools": [{"name": "\\udfff"}]}',
    "half a character in a name": json.dumps({"messages": [turn("user", "q", name="\ud800"), turn("assistant", "a")]}),
    "a speaker that is a list": '{"conversations": [{"from": ["gpt"], "value": "a"}]}',
    "zeros": "\0" * 100_000, "nothing but lines": "\n" * 10_000}


@pytest.mark.parametrize("kind", BOMBS)
def test_crafted_rows(kind, tmp_path):
    "Refused in both kinds of file, with the line where there is one."
    said = refused(learned, written(tmp_path / "a.jsonl", BOMBS[kind]))
    assert "a.jsonl:1: " in said or kind == "nothing but lines"
    refused(learned, written(tmp_path / "a.json", BOMBS[kind]))


def test_deep_but_not_too_deep(tmp_path):
    "What a machine's stack would just bear is refused too, wherever the reader stands in its own stack."
    for depth in (150, 400, 900):
        deep = {"a": 1}
        for _ in range(depth): deep = {"a": deep}
        row = {"messages": [turn("user", "q"), turn("assistant", "a")], "tools": [deep]}
        assert "tools is nested too deep" in refused(
            learned, written(tmp_path / "a.jsonl", as_text(row)))


def test_places_that_are_no_file(tmp_path):
    "Folders, devices without an end, names that no file can have."
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "folder.jsonl", "/dev/zero", tmp_path / "gone.csv", tmp_path / "gone.parquet",
                 tmp_path / ("x" * 300 + ".jsonl"), tmp_path / "a\0b.jsonl"):
        refused(learned, path, "folder.jsonl", "a\\x00b.jsonl", "x" * 100)
    for path in (tmp_path / "gone.toml", tmp_path): refused(swept, path)


def test_a_message_steers_no_terminal(tmp_path):
    "Names in a file may hold what clears a screen; a message shows it as an escape."
    path = written(tmp_path / "a.jsonl", json.dumps({"\x1b[2J\x1b[31mred": "a", "\u202eback": "b"}))
    said = refused(learned, path)
    assert "\x1b" not in said and "\\x1b[2J" in said and "\\u202e" in said


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
                      max_leaves=8)
FIELDS = st.sampled_from(["messages", "prompt", "completion", "text", "conversations", "instruction", "output", "tools",
                          "group", "system", "role", "content", "from", "value", "history", "input", "x"])
TURNS = st.lists(st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "weight"]),
                                 st.sampled_from(["user", "assistant", "human", "gpt", "tool"]) | VALUES, max_size=4),
                 max_size=3)


@searched(150)
@given(st.lists(st.dictionaries(FIELDS, VALUES | TURNS, max_size=4), max_size=3))
def test_any_rows_in_memory(rows):
    "Objects of any content are refused by the number of their row, or read."
    try: learned(rows)
    except LabError as e: assert "row" in str(e)


@searched(100)
@given(st.dictionaries(st.sampled_from(["lr", "rank", "steps", "quant_type", "targets", "seed", "blocksize", "init"]),
                       VALUES, max_size=4), st.integers(0, 3))
def test_any_grid_in_memory(grid, seed):
    "A grid of any values is refused by the name of a setting, or read."
    grid = dict(random.Random(seed).sample(sorted(grid.items()), len(grid)))
    try: names(cells(grid))
    except LabError as e: assert str(e)
