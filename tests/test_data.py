"Data: no leak across the split, the loss on the answers alone, every mistake in a file named by its line."
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import searched
from qlora_lab.batches import batch_indices
from qlora_lab.data import (
    Example,
    collate,
    data_hash,
    default_split,
    docstring_pairs,
    encode,
    load_jsonl,
    pair,
    split,
    tokenize,
)
from qlora_lab.records import LabError


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows),
                    encoding="utf-8")
    return path


GOOD = {"prompt": "2 + 2?", "completion": "4"}


def test_docstring_pairs_from_sources(tmp_path):
    """Public functions and methods with a one-line docstring, in order, each with its module as group; nothing private,
    nothing unfinished."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "till.py").write_text('''
def pay(amount, *, tip=0):
    "Take the money and give change."
def _hide(): "Not for others to see, ever."
def vague(): "no full stop and no capital"
class Till:
    async def open(self):
        """Open the drawer with a bell.

        And more."""
class _Safe:
    def open(self): "Open what is closed to us."
''')
    (tmp_path / "broken.py").write_text("def broken(:\n")
    got = docstring_pairs(tmp_path)
    assert [(e.prompt.split("\n\n")[1], e.answer) for e in got] == [
        ("shop.till.pay(amount, *, tip=0)", "Take the money and give change."),
        ("shop.till.Till.open(self)", "Open the drawer with a bell.")]
    assert {e.group for e in got} == {"shop"} and got[0].source == "shop/till.py:2"


def test_the_edges_of_what_is_taken(tmp_path):
    "Lines of 15 to 100 characters and no break, with a full stop; signatures of 110 at most, each once."
    def line(n): return "x" * (n - 1) + "."
    def named(n): return "f" * (n - len("m.()"))  # a signature m.fff() of n characters
    docs = {"a": line(14), "b": line(15), "c": line(100), "d": line(101), "e": f"{line(20)}\\n    {line(20)}",
            "f": "x" * 20, named(110): line(20), named(111): line(20)}
    text = "".join(f'def {name}():\n    "{doc}"\n' for name, doc in docs.items())
    (tmp_path / "m.py").write_text(text + text)
    got = docstring_pairs(tmp_path)
    assert [e.prompt.split("m.")[1] for e in got] == ["b()", "c()", f"{named(110)}()"]
    assert [len(e.answer) for e in got] == [15, 100, 20]
    assert [len(e.answer) for e in docstring_pairs(tmp_path, longest=19)] == [15]
    assert len(docstring_pairs(tmp_path, longest=101)) == 4


def test_no_module_of_the_standard_library_is_on_both_sides():
    "The held-out loss would be too good if the same module, or the same function, had been learned."
    data = default_split()
    assert not {e.group for e in data.train} & {e.group for e in data.held_out}
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.held_out}
    assert len(data.train) > 1000 and len(data.held_out) > 100


@searched(50)
@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["", "g1", "g2", "g3", "g4"])),
                min_size=8, max_size=60), st.integers(0, 5))
def test_split_keeps_groups_together(rows, seed):
    """Any data, any seed: nothing lost, nothing twice, no group on both sides; examples without a group go by their
    prompt. More data moves no one."""
    examples = [pair(p, "yes", g) for p, g in rows]
    try: data = split(examples, 0.3, seed)
    except LabError as e:
        assert "one side of the split empty" in str(e)
        return
    def key(e): return e.group or e.prompt
    assert not set(map(key, data.train)) & set(map(key, data.held_out))
    assert sorted(map(repr, data.train + data.held_out)) == sorted(map(repr, examples))
    more = split(examples + [pair("new", "yes", f"new{i}") for i in range(20)], 0.3, seed)
    assert set(map(key, data.held_out)) <= set(map(key, more.held_out))


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_outside_0_to_1(share):
    with pytest.raises(LabError, match="held_out=.*between 0 and 1"): split([pair("a", "b")], share)


def test_jsonl_in_both_forms(tmp_path):
    """Prompt and completion, or messages; blank lines, a byte order mark and Unicode's own line separators are no
    mistakes."""
    odd = "one\u2028two\x85three"
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(GOOD), "", {"prompt": odd, "completion": "ok", "group": 7},
                 {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                               {"role": "assistant", "content": "Hello"}]})
    a, b, c = load_jsonl(path)
    assert (a.prompt, a.answer) == ("2 + 2?", "4") and b.prompt == odd and b.group == "7"
    assert c.messages[0]["role"] == "system"
    assert b.source.endswith("a.jsonl:3")


BAD = {
    "not JSON": ("{oops", "not valid JSON"),
    "not an object": ("[1]", "expected an object, got list"),
    "no completion": ({"prompt": "a"}, "'completion'"),
    "no prompt": ({"completion": "a"}, "'prompt'"),
    "empty answer": (GOOD | {"completion": "  "}, "completion is an empty answer"),
    "number for text": (GOOD | {"completion": 4}, "completion should be text, got int"),
    "null": (GOOD | {"prompt": None}, "prompt should be text, got NoneType"),
    "empty turn": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
                   r"messages\[1\].content is an empty answer"),
    "no turns": ({"messages": []}, "at least one turn"),
    "messages of text": ({"messages": "hi"}, "should be a list"),
    "odd role": ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role"),
    "turn without content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content"),
    "last by user": ({"messages": [{"role": "user", "content": "x"}]}, "expected 'assistant'")}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named(kind, tmp_path):
    "File and line first, then what is wrong with it, by the name of the field as it stands in the line."
    row, message = BAD[kind]
    path = write(tmp_path / "mine.jsonl", GOOD, GOOD, row, GOOD)
    with pytest.raises(LabError, match=rf"mine\.jsonl:3: .*{message}") as e: load_jsonl(path)
    assert ("messages[" in str(e.value)) <= ("messages" in row)


def test_bad_files(tmp_path):
    "Missing, empty, not text."
    with pytest.raises(LabError, match="no such file"): load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(LabError, match="no examples"): load_jsonl(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabError, match="not UTF-8"): load_jsonl(tmp_path / "bytes.jsonl")


def test_the_mask_covers_the_answers_and_what_ends_them(tokenizer):
    "The model learns the answers and when to stop, and none of the questions, in every turn by the assistant."
    e = Example(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "read the file"},
                 {"role": "assistant", "content": "Return it."},
                 {"role": "user", "content": "sort"}, {"role": "assistant", "content": "Sorted."}))
    t = tokenize(tokenizer, e)
    assert tokenizer.decode(t.ids) == tokenizer.apply_chat_template(list(e.messages), tokenize=False)
    assert tokenizer.decode(t.ids[t.mask]) == "Return it.<|im_end|>Sorted.<|im_end|>"


def test_longer_than_the_limit(tokenizer):
    "Cut answers would teach the model to stop in the middle; so it is an error, with the example's place."
    e = pair("x" * 400, "y", source="mine.jsonl:9")
    with pytest.raises(LabError, match=r"mine\.jsonl:9: \d+ tokens, longer than 64"): tokenize(tokenizer, e, 64)


def test_no_template(tokenizer, monkeypatch):
    "A base model's tokenizer has no turns to speak of; it learns a completion, and when to stop."
    monkeypatch.setattr(tokenizer, "chat_template", None)
    t = tokenize(tokenizer, pair("a", "b"))
    assert tokenizer.decode(t.ids) == "ab<|im_end|>" and tokenizer.decode(t.ids[t.mask]) == "b<|im_end|>"


def test_collate_masks_what_it_adds(tokenizer):
    "Padding is neither seen nor learned."
    a, b = (tokenize(tokenizer, pair(w, "Yes.")) for w in ("read", "read the file and close a socket"))
    batch = collate([a, b])
    n = len(a.ids)
    assert batch["input_ids"].shape == (2, len(b.ids)) and batch["attention_mask"].sum(1).tolist() == [n, len(b.ids)]
    assert (batch["labels"][0, n:] == -100).all() and torch.equal(batch["labels"][0, :n][a.mask], a.ids[a.mask])
    assert (batch["labels"][0, :n][~a.mask] == -100).all()


@searched(40)
@given(st.lists(st.integers(5, 90), min_size=4, max_size=200), st.integers(1, 4), st.integers(0, 3))
def test_a_pass_sees_each_example_once(lengths, batch_size, seed):
    "No example twice in a pass, at most an incomplete batch left out, the same order whenever it is asked for."
    steps = len(lengths) // batch_size
    first = [batch_indices(lengths, batch_size, s, seed) for s in range(steps)]
    flat = [i for b in first for i in b]
    assert len(set(flat)) == len(flat) == steps * batch_size and set(flat) <= set(range(len(lengths)))
    assert first[steps // 2] == batch_indices(lengths, batch_size, steps // 2, seed)


def test_too_few_for_a_batch():
    with pytest.raises(LabError, match="3 examples do not fill one batch of 4"): batch_indices([9, 9, 9], 4, 0)


def test_data_hash_tells_data_apart():
    "Order and content count, groups do not; the value of earlier versions stands, or their runs could not go on."
    a, b = pair("a", "1"), pair("b", "2")
    assert data_hash([a, b]) == "14113cfe2a5bb195"
    tools, text = ({"name": "f"},), Example((), text="a")
    others = Example(a.messages, tools=tools), Example(a.messages, unlearned=(1,)), text
    assert len({data_hash([e]) for e in (a, *others)}) == 4
    assert data_hash([a, b]) == data_hash([pair("a", "1", "g"), b]) != data_hash([b, a])


def test_half_a_character_made_in_python_is_refused_by_its_row(tokenizer):
    "A split and a hash take it as it is; the tokenizer cannot, and the message says which example."
    odd = [pair(f"question {i}", "an answer") for i in range(40)] + [pair("half \ud83d", "an answer")]
    both = split(odd, 0.3)
    assert len(both.train) + len(both.held_out) == 41 and data_hash(odd) != data_hash(odd[:-1])
    with pytest.raises(LabError, match="half a character|surrogate|\\\\ud83d"): encode(tokenizer, odd)
