"Files and rows as people have them: five forms, one meaning, and each mistake by its place and the field as written."
import copy
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import searched
from qlora_lab.data import Example, data_hash, encode, load_examples, pair, split
from qlora_lab.records import LabError


def turn(role, content, **more): return {"role": role, "content": content, **more}


ASK, REPLY = turn("user", "2 + 2?"), turn("assistant", "4")
FORMS = {"messages": {"messages": [ASK, REPLY]}, "prompt and completion": {"prompt": "2 + 2?", "completion": "4"},
         "lists of turns": {"prompt": [ASK], "completion": [REPLY]},
         "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4", "text": "Below is an instruction."},
         "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
         "with columns of no concern": {"id": 7, "prompt_id": "x", "prompt": "hi", "messages": [ASK, REPLY]}}
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), min_size=1).filter(
    lambda t: t.strip())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(form):
    e, = load_examples([FORMS[form] | {"group": 3}])
    assert (e.messages, e.group, e.source) == ((ASK, REPLY), "3", "row 1")


def test_more_than_question_and_answer():
    "A system turn as a column, an input below the instruction, plain text, tools as JSON."
    rows = [{"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."},
            {"text": "Once upon a time."},
            {"messages": json.dumps([ASK, REPLY]), "tools": '[{"name": "f"}]', "group": None}]
    alpaca, text, cells = load_examples(rows)
    assert [m["content"] for m in alpaca.messages] == ["Be brief.", "Add.\n\n2, 2", "4"]
    assert (text.text, text.messages, text.stays_with) == ("Once upon a time.", (), "Once upon a time.")
    assert cells.tools == ({"name": "f"},) and cells.group == ""


def test_plain_texts_do_not_all_stay_together():
    data = split(load_examples([{"text": f"text {i}"} for i in range(40)]), 0.3)
    assert len(data.train) > 10 and len(data.held_out) > 3


def test_turns_keep_what_templates_read():
    "And nothing else, so that an id or a date changes no fingerprint."
    said = ASK | {"date": "today", "name": "Ann"}, REPLY | {"reasoning_content": "hm", "id": 3}
    e, = load_examples([{"messages": list(said)}])
    assert e.messages == (ASK | {"name": "Ann"}, REPLY | {"reasoning_content": "hm"})


CALL = {"id": "c1", "type": "function", "function": {"name": "warmth", "arguments": {"at": "Lima"}}}

@pytest.mark.parametrize("written", [
    turn("assistant", None, tool_calls=[CALL]), {"role": "assistant", "tool_calls": [CALL]},
    turn("assistant", "", tool_calls=[CALL | {"function": {"name": "warmth", "arguments": '{"at": "Lima"}'}}]),
    turn("assistant", None, tool_calls=[{"id": "c1", "name": "warmth", "arguments": {"at": "Lima"}}])])
def test_tool_calls_in_every_spelling(written):
    rows = [{"messages": [ASK, written, turn("tool", "21", tool_call_id="c1"), REPLY]}]
    assert load_examples(rows)[0].messages[1] == turn("assistant", "", tool_calls=[CALL])
    assert load_examples(pd.DataFrame(rows))[0].messages[1] == turn("assistant", "", tool_calls=[CALL])


BAD = {
    "unknown columns": ({"question": "a", "answer": "b"}, r"found 'question', 'answer'; expected 'messages'"),
    "nothing": ({}, "found no fields"),
    "no output": ({"instruction": "a"}, "no field 'output' beside 'instruction'"),
    "half a form": ({"prompt": "a", "text": "b"}, "no field 'completion' beside 'prompt'"),
    "number": ({"instruction": "a", "output": 4}, "output should be text, got int"),
    "empty text": ({"text": " \n"}, "text is empty"),
    "NaN": ({"prompt": float("nan"), "completion": "b"}, r"prompt is an empty cell \(NaN\)"),
    "surrogate": ({"prompt": "a", "completion": "b \ud83d"}, "completion has half a character at place 3"),
    "speaker": ({"conversations": [{"from": "robot", "value": "a"}]}, r"conversations\[0\].from should be .*'robot'"),
    "value": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": 4}]},
              r"conversations\[1\].value should be text"),
    "empty value": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]},
                    r"conversations\[1\].value is an empty answer"),
    "call that is no JSON": ({"conversations": [{"from": "function_call", "value": "f("}]},
                             r"conversations\[0\].value is not valid JSON"),
    "arguments": ({"messages": [turn("assistant", None, tool_calls=[{"name": "f", "arguments": [1]}])]},
                  r"messages\[0\].tool_calls\[0\].function.arguments should be an object, got list"),
    "calls by the user": ({"messages": [ASK | {"tool_calls": [CALL]}, REPLY]}, r"messages\[0\].tool_calls .*'user'"),
    "tools": ({"messages": [ASK, REPLY], "tools": ["f"]}, r"tools\[0\] should be an object, got str"),
    "image": ({"messages": [turn("user", [{"type": "image"}]), REPLY]}, r"messages\[0\].content should be text"),
    "weight": ({"messages": [ASK, REPLY | {"weight": 2}]}, r"messages\[1\].weight should be 0 or 1, got 2"),
    "no weight at all": ({"messages": [ASK, REPLY | {"weight": 0}]}, "no answer is to be learned"),
    "two systems": ({"messages": [turn("system", "a"), ASK, REPLY], "system": "b"}, "'system' is a field and"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' is not read"),
    "mixed": ({"prompt": [ASK], "completion": "4"}, "prompt should be text, got list"),
    "not an object": ([1], "expected an object, got list")}

@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_by_place_and_field(kind):
    row, message = BAD[kind]
    with pytest.raises(LabError, match=f"^row 2: .*{message}"): load_examples([FORMS["messages"], row])


def files(folder):
    rows = [{"prompt": "Capital of\nPeru?", "completion": "NA", "group": "a"},
            {"prompt": "2 + 2?", "completion": "null"}]
    table = pd.DataFrame(rows)
    texts = {"a.jsonl": "".join(json.dumps(row) + "\n\n" for row in rows), "list.json": json.dumps(rows, indent=2),
             "lines.json": "\n".join(map(json.dumps, rows)), "b.csv": "\ufeff" + table.to_csv(index=False),
             "c.csv": table.to_csv(index=False, sep=";"), "d.tsv": table.to_csv(index=False, sep="\t"),
             "no_ending": json.dumps(rows[0]) + "\n" + json.dumps(rows[1]),
             "windows.csv": table.to_csv(index=False, lineterminator="\r\n")}
    for name, text in texts.items(): (folder / name).write_bytes(text.encode())
    table.to_parquet(folder / "e.parquet")
    return [folder / name for name in [*texts, "e.parquet"]]


def test_every_kind_of_file(tmp_path):
    "The same examples, with the words that pandas takes for empty cells, each with its place."
    pytest.importorskip("pyarrow")
    places = {"a.jsonl": [":1", ":3"], "list.json": [": row 1", ": row 2"], "lines.json": [":1", ":2"],
              "b.csv": [":2", ":4"], "e.parquet": [": row 1", ": row 2"]}
    for path in files(tmp_path):
        first, second = load_examples(path)
        assert [first.prompt, first.answer, first.group] == ["Capital of\nPeru?", "NA", "a"], path
        assert [second.prompt, second.answer, second.group] == ["2 + 2?", "null", ""], path
        if path.name in places:
            assert [e.source.removeprefix(str(path)) for e in (first, second)] == places[path.name]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_is_written_is_read(rows):
    "Any text, through JSON lines and CSV."
    table = pd.DataFrame(rows, columns=["prompt", "completion"])
    with TemporaryDirectory() as folder:
        table.to_json(Path(folder) / "a.jsonl", orient="records", lines=True, force_ascii=False)
        table.to_csv(Path(folder) / "a.csv", index=False)
        for name in ("a.jsonl", "a.csv"):
            assert [(e.prompt, e.answer) for e in load_examples(Path(folder) / name)] == rows


def test_iterables():
    "A generator, a DataFrame, a Dataset with the empty keys that its schema makes, and Examples as they are."
    rows = [FORMS["messages"], {"messages": [ASK, turn("assistant", "", tool_calls=[CALL]), turn("tool", "21"), REPLY]}]
    want = [e.messages for e in load_examples(rows)]
    assert [e.messages for e in load_examples(row for row in rows)] == want
    assert [e.messages for e in load_examples(pd.DataFrame(rows))] == want
    datasets = pytest.importorskip("datasets")
    assert [e.messages for e in load_examples(datasets.Dataset.from_list(rows))] == want
    made = [pair("a", "b", source="here")]
    assert load_examples(made) == made
    with pytest.raises(LabError, match="dictionary of splits"): load_examples(datasets.DatasetDict(train=None))
    with pytest.raises(LabError, match="expected a path or rows, got int"): load_examples(7)
    with pytest.raises(LabError, match="no examples"): load_examples([])


def test_calls_with_other_arguments_do_not_borrow_keys(tmp_path):
    "A table's schema gives every call the keys of all; the empty ones are nobody's."
    pytest.importorskip("pyarrow")
    other = CALL | {"function": {"name": "add", "arguments": {"x": 1}}}
    rows = [{"messages": [ASK, turn("assistant", "", tool_calls=[call])]} for call in (CALL, other)]
    pd.DataFrame(rows).to_parquet(tmp_path / "calls.parquet")
    found = load_examples(tmp_path / "calls.parquet")
    assert [e.messages[1]["tool_calls"] for e in found] == [[CALL], [other]]


BROKEN = {
    "cut.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp', r":2: not valid JSON .*cut short"),
    "middle.jsonl": ('{"prompt": "a", "comp\n{"prompt": "a", "completion": "b"}', ":1: not valid JSON [^;]*; expected"),
    "twice.jsonl": ('{"prompt": "a", "prompt": "b", "completion": "c"}', ":1: the field 'prompt' is there twice"),
    "deep.jsonl": ("[" * 100_000, ":1: nested too deep"),
    "digits.jsonl": ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", ":1: not valid JSON"),
    "model.gguf.jsonl": (b"GGUF\x03\0\0\0\xff\xfe", ": no text, as files of weights are; expected examples in JSONL"),
    "latin.jsonl": (b'{"prompt": "a"}\n{"prompt": "\xfc"}', ":2: not UTF-8 text, byte 0xfc"),
    "wide.csv": ("prompt,completion\na,b\n".encode("utf-16"), ":1: not UTF-8 text.*UTF-16"),
    "list.json": ('[{"prompt": "a", "completion": "b"},\n{"prompt"', ": not valid JSON .*line 2.* expected a list"),
    "splits.json": ('{"train": [\n]}', ": row 1: found 'train'"), "empty.json": (" ", ": no examples"),
    "empty.csv": ("", ": no examples"), "header.csv": ("prompt,completion\n", ": no examples"),
    "short.csv": ("prompt,completion\na,b\na\n", ":3: 1 cells, where the header has 2"),
    "comma.csv": ("prompt,completion\na,b,c\n", ":2: 3 cells, where the header has 2"),
    "cell.csv": ("prompt,completion\na,\n", r":2: completion is an empty cell \(NaN\)"),
    "open.csv": ('prompt,completion\na,b\nc,"d\n', ":3: not valid CSV .*cut short"),
    "same.csv": ("prompt,prompt\na,b\n", ":1: the column 'prompt' is there twice"),
    "columns.csv": ("a,b\n1,2\n", ":2: found 'a', 'b'; expected"), "x.parquet": (b"PAR1", ": not a whole Parquet file"),
    "x.jsonl.gz": (b"\x1f\x8b", ": .gz is not read")}

@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LabError, match=f"{name}{message}"): load_examples(tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        with pytest.raises(LabError, match=f"{name}: no such file"): load_examples(tmp_path / name)
    with pytest.raises(LabError, match="a folder; name the file"): load_examples(tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    "The package that is missing is named, and how to do without it."
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "fastparquet"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LabError, match=r"a\.parquet: .*pyarrow, which is not installed; pip install pyarrow"):
        load_examples(tmp_path / "a.parquet")


def test_a_cell_of_any_size(tmp_path):
    "Longer than the 128 KiB that the csv module takes by default; its limit is left as it was."
    import csv
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "a" * 200_000 + ",b\n")
    assert len(load_examples(tmp_path / "a.csv")[0].prompt) == 200_000 and csv.field_size_limit() == before


def test_examples_made_by_hand_stand():
    "The fields that were there are where they were."
    e = Example((ASK, REPLY), "g", "s")
    assert (e.prompt, e.answer, e.group, e.source, e.stays_with) == ("2 + 2?", "4", "g", "s", "g")


# whatever is in a row

ODD = st.sampled_from([None, True, -1, 1e308, "", " ", "\ud800", "\0", [], {}, [[]], [None], {"a": None}, [{}], "[",
                       "[[", '{"a": 1}', math.nan, {"role": "user"}, "assistant", {"x": "\udc80"}, {"\ud800": 1}])
SOUND = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}, {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "c"}], "tools": [{"function": {"name": "f", "parameters": {}}}], "group": "g"},
    {"prompt": "a", "completion": "b", "group": 1}, {"text": "t"}, {"instruction": "i", "output": "o", "history": []},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b", "weight": 1}]}]


def places(value, at=()):
    if at: yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs: yield from places(inner, (*at, key))


@searched(400)
@given(st.sampled_from(SOUND), st.data())
def test_whatever_a_row_holds_the_mistake_has_its_place(tokenizer, row, draw):
    "A good row of any form in which something has become something else: it is taken, or refused by its number."
    row = copy.deepcopy(row)
    *path, last = draw.draw(st.sampled_from(list(places(row))))
    inner = row
    for key in path: inner = inner[key]
    inner[last] = copy.deepcopy(draw.draw(ODD))
    try:
        examples = load_examples([row])
        data_hash(examples)
        for e in examples: e.stays_with.encode()
        encode(tokenizer, examples)
    except LabError as e: assert str(e).startswith("row 1: ") and "\n" not in str(e), e


def nested(levels): return {"a": nested(levels - 1)} if levels else 1


@pytest.mark.parametrize("levels", [90, 120, 900])
def test_deep_arguments(levels, tokenizer):
    "What a reader of JSON takes is not for that reason an example."
    call = {"function": {"name": "f", "arguments": nested(levels)}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    if levels < 100: assert data_hash(load_examples([row]))
    else:
        with pytest.raises(LabError, match="row 1: .*nested too deep"): load_examples([row])


def test_each_text_is_looked_at_once(monkeypatch):
    "Megabytes of answers are not encoded a second time; what stands beside them is looked at too."
    from qlora_lab import conversations
    seen, real = [], conversations.text_of
    monkeypatch.setattr(conversations, "text_of", lambda value, *where: (seen.append(value), real(value, *where))[1])
    conversations.conversation({"messages": [ASK, {**REPLY, "thinking": "two and two"}], "group": "sums"}, "row 1")
    assert all(seen.count(text) == 1 for text in (ASK["content"], REPLY["content"], "sums", "two and two")), seen
    with pytest.raises(LabError, match="half a character"):
        conversations.conversation({"messages": [ASK, {**REPLY, "thinking": "\ud800"}]}, "row 1")


class Failing:
    "A tokenizer that fails on one text, as a library's own may, with an error of its own kind."
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)

    def __call__(self, texts, **how):
        if any("bad" in t for t in ([texts] if isinstance(texts, str) else texts)): raise OverflowError("too big")
        return self.inner(texts, **how)

    def apply_chat_template(self, turns, **how):
        if any("worse" in t["content"] for t in turns): raise AttributeError("no such attribute")
        return self.inner.apply_chat_template(turns, **how)


@pytest.mark.parametrize(("word", "told"), [("bad", "tokenizer fails .*OverflowError: too big"), ("worse", "template")])
def test_a_tokenizer_that_fails_on_one_example(word, told, tokenizer):
    rows = [{"prompt": f"p{i}", "completion": word if i == 4 else "c"} for i in range(9)]
    with pytest.raises(LabError, match=f"^row 5: .*{told}"): encode(Failing(tokenizer), load_examples(rows))
