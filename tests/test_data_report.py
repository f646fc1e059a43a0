"What a set of examples holds: copies and leaks that are there and no others, and what is learned, for every reader."
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import TEMPLATES, tokenizer_of

from conftest import searched
from qlora_lab import cli
from qlora_lab.data import Example, Split, pair
from qlora_lab.engine.data_report import copies_of, data_report, unsplit
from qlora_lab.engine.learned_text import in_colour, runs_of, underlined
from qlora_lab.engine.near_copies import THRESHOLD, near_copies, overlap, shingles
from qlora_lab.records import LabError

DRAW = random.Random(0)


def sentence(n=30): return [f"w{DRAW.randrange(3000)}" for _ in range(n)]


@searched(30)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=12), min_size=2, max_size=10))
def test_near_copies_are_those_that_counting_finds(texts):
    """Against all pairs, one by one: whoever is joined is alike over a chain, whoever is alike is joined. Of a pair at
    the threshold itself one in 6,500 is missed, from 0.8 on one in 20 million."""
    texts = [" ".join(words) for words in texts]
    first, sets = near_copies(texts), shingles(texts)
    def alike(i, least):
        return {i, *(j for j in range(len(texts)) if len(sets[i]) and overlap(sets[i], sets[j]) >= least)}
    def chain(i, least):
        group = {i}
        while (more := set().union(*(alike(k, least) for k in group))) != group: group = more
        return group
    for i in range(len(texts)):
        assert first[i] in chain(i, THRESHOLD)
        assert {first[j] for j in chain(i, 0.8)} == {first[i]}


def test_what_comes_often_is_no_form():
    "Copies count once when forms are looked for: the near copy of a text that comes twenty times is found."
    often, other = sentence(), [" ".join(sentence()) for _ in range(80)]
    near = [*often]
    near[14] = "different"
    first = near_copies([*other, *[" ".join(often)] * 20, " ".join(near)])
    assert first[80:] == [80] * 21


def test_a_word_changed_makes_a_near_copy_and_half_of_them_does_not():
    texts = [sentence() for _ in range(60)]
    changed, other = [*texts[5]], [*texts[9]]
    changed[14] = "different"
    other[::2] = sentence(15)
    first = near_copies([" ".join(t) for t in (*texts, changed, other)])
    assert first[60] == 5 and first[61] == 61 and first[:60] == list(range(60))


def test_words_of_scripts_without_blanks():
    "A character is a word; else a sentence would be one, and no two alike."
    one = "私たちは昨日の夕方に駅の前の小さな店で新しい本を三冊買いました"
    first = near_copies([one, one.replace("三", "四"), "今日はとても良い天気なので散歩に行きたいと思います"])
    assert first == [0, 0, 2]


def test_copies_and_leaks():
    """Exact copies, near ones apart from them; a prompt that is asked on both sides, in other letters too; a system
    turn makes nobody alike."""
    system = {"role": "system", "content": " ".join(sentence(200))}
    def e(words, answer="yes it is so"): return Example((system, *pair(" ".join(words), answer).messages))
    texts = [sentence() for _ in range(20)]
    near = [*texts[3]]
    near[20] = "other"
    learn, held = [*map(e, texts), e(texts[0])], [e(near), e([w.upper() for w in texts[7]], "no"), e(sentence())]
    found = copies_of([*learn, *held], [False] * len(learn) + [True] * 3)
    assert (found.exact, found.near, found.held_out, found.prompts, found.leaks) == (1, 2, 3, 1, 2)
    assert copies_of(learn[:20], [False] * 20).exact == 0


@pytest.fixture(scope="module")
def chat(): return tokenizer_of(TEMPLATES["chatml"][0], merges=False)


def test_the_report_counts_what_a_training_would_see(chat):
    examples = [pair("a", "b" * n, f"g{n}") for n in (5, 6, 50)] + [pair("a" * 60, "b", "long")]
    odd = Example(({"role": "assistant", "content": "hi"},), "odd", "f:5")
    report = data_report([*examples, odd], chat, 40, held_out=None, samples=3)
    told = json.loads(json.dumps(report.as_dict()))
    assert (told["examples"], told["rows"], told["longer"], told["emptied"]) == (5, 4, 2, 1)
    assert told["learned"] == 5 + 6 + 50 + 1 + 4 and "f:5: " in told["refused"][0] and len(told["refused"]) == 1
    assert sum(n for _, _, n in told["histogram"]) == 4 and told["split"] == "none was asked for"
    assert len(report.lengths.shown) == 3
    assert len(data_report([*examples, odd], chat, 40, held_out=None, samples=10 ** 12).lengths.shown) == 4
    with pytest.raises(LabError, match="f:5"): data_report([odd], chat, held_out=None)


def test_a_split_that_cannot_be_is_said(chat):
    report = data_report([pair("a", "b", "g"), pair("c", "d", "g")], chat)
    assert "one side of the split empty" in dict(report.facts())["split"] and "leaks" not in dict(report.facts())
    assert unsplit(report) and not unsplit(data_report([pair("a", "b", "g")], chat, held_out=None))
    report = data_report(Split([pair("a", "b")], [pair("A ", "c")]), chat)
    assert not unsplit(report) and report.copies.prompts == 1 and "1 held out" in dict(report.facts())["split"]


@pytest.mark.parametrize("wrong", [{"held_out": float("nan")}, {"held_out": 2}, {"held_out": "x"}, {"max_length": -3},
                                   {"max_length": "x"}, {"samples": -1}, {"threshold": "x"}], ids=str)
def test_a_number_that_makes_no_sense_is_named(chat, wrong):
    (name, value), = wrong.items()
    with pytest.raises(LabError, match=f"{name}={value!r}: expected"): data_report([pair("a", "b")], chat, **wrong)


@searched(40)
@given(st.text(st.sampled_from("ab \né👍🏽日<>&"), min_size=1).filter(lambda t: t.strip()))
def test_what_is_shown_is_the_text_and_the_marks_are_under_what_is_learned(answer):
    tokenizer = tokenizer_of(TEMPLATES["chatml"][0], merges=False)
    report = data_report([pair("hi", answer)], tokenizer, held_out=None)
    runs, = report.lengths.shown
    assert "".join(text for text, learned in runs if learned) == answer + "<|im_end|>"
    whole = tokenizer.apply_chat_template([*pair("hi", answer).messages], tokenize=False)
    assert in_colour(runs).plain == whole and "<script" not in report._repr_html_()
    assert "^" * len("<|im_end|>") in underlined(runs, 200)


def test_a_long_run_is_shortened(chat):
    ids = chat("a" * 500).input_ids
    (text, learned), = runs_of(chat, ids, [True] * 500, most=20)
    assert text == "a" * 10 + " […] " + "a" * 10 and learned


@pytest.fixture(scope="module")
def model(tmp_path_factory, chat):
    "A folder with a config and a tokenizer, and no weights."
    from transformers import LlamaConfig
    folder = tmp_path_factory.mktemp("models") / "no weights"
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    chat.save_pretrained(folder)
    return folder


def test_the_command(model, tmp_path, capsys):
    "For a reader, for a program, and with a file that is broken; weights are not asked for."
    file = tmp_path / "mine.csv"
    file.write_text("prompt,completion\n" + "".join(f"Say {i},It is {i}.\n" for i in range(30)))
    assert cli.main(["data", str(file), "--model", str(model), "--max-length", "64"]) == 0
    said = capsys.readouterr().out
    assert "30 from" in said and "leaks" in said and "What is learned, underlined" in said and "\x1b" not in said
    assert "^" * len("It is 7.<|im_end|>") in said
    assert cli.main(["data", str(file), "--model", str(model), "--json", "--held-out", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 30
    file.write_text(file.read_text() + "Say,\n")
    assert cli.main(["data", str(file), "--model", str(model)]) == 2
    assert "mine.csv:32: completion is an empty cell" in capsys.readouterr().err


def test_the_command_ends_with_1_where_a_training_would_refuse(model, tmp_path, capsys):
    rows = [{"messages": [{"role": "assistant", "content": "hi"}]},
            *({"prompt": f"{i}", "completion": "b"} for i in range(9))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["data", str(tmp_path / "a.jsonl"), "--model", str(model), "--held-out", "none"]) == 1
    assert "1, the first: " in (said := capsys.readouterr().out) and "a.jsonl:1: " in said
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))  # alone on one side of the split
    assert cli.main(["data", str(tmp_path / "b.jsonl"), "--model", str(model)]) == 1
    assert "leave one side of the split empty" in " ".join(capsys.readouterr().out.split())
    for wrong, message in ((["--max-length", "0"], "max_length=0"), (["--model", "nowhere"], "no model named")):
        assert cli.main(["data", str(tmp_path / "a.jsonl"), *wrong]) == 2
        assert message in capsys.readouterr().err
