"What a model is measured by: sums that agree with plain counting, and clear words for what cannot be measured."
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from conftest import make_llama, make_tokenizer
from qlora_lab.comparison import compare
from qlora_lab.data import Example, load_examples, pair, split, tokenize
from qlora_lab.divergence import divergence, said
from qlora_lab.evaluate import evaluate
from qlora_lab.harness import number_of, task_scores
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import add_lora, trainable
from qlora_lab.measures import answered, beside, documents, spanned
from qlora_lab.model import answer, perplexity
from qlora_lab.records import LabError
from qlora_lab.scoring import Score

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = {"a": "read the file and return the sum", "b": "close a socket, then open an archive and join two paths"}


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer()


def model_of(tokenizer, seed=0):
    return make_llama(seed, vocab_size=len(tokenizer))


def examples(n=6): return [pair(f"question {i}", "return the sum", group=f"g{i // 2}") for i in range(n)]


def test_of_text(tokenizer):
    "Every token but the first of a window is scored once; loss and perplexity are lesson 08's."
    model = model_of(tokenizer)
    rows = documents(tokenizer, TEXTS, 5)
    assert {r.example.stays_with for r in rows} == {"a", "b"} and max(len(r.ids) for r in rows) == 6
    for name, text in TEXTS.items():
        own = [r for r in rows if r.example.stays_with == name]
        assert sum(len(r.ids) - 1 for r in own) == len(tokenizer(text).input_ids) - 1
        assert math.exp(beside(model, own)["loss"].loss) == pytest.approx(perplexity(model, tokenizer, text, 5), 1e-4)


def test_divergence_is_that_of_two_models(tokenizer):
    "Against a model, and against what it said; of a model from itself it is none, and they agree everywhere."
    one, other = model_of(tokenizer), model_of(tokenizer, 1)
    rows = [tokenize(tokenizer, e) for e in examples()]
    wanted = divergence(said(other, rows), said(one, rows))
    for reference in (other, said(other, rows)):
        found = beside(one, rows, reference)
        assert found["KL"].sums == pytest.approx(wanted.sums, rel=1e-4) and found["KL"].groups == wanted.groups
        assert all(0 <= s <= n for s, n in zip(found["top-1"].sums, found["top-1"].tokens))
    own = beside(one, rows, one)
    assert own["top-1"].sums == own["top-1"].tokens and max(map(abs, own["KL"].sums)) < 1e-5


def test_a_model_as_train_leaves_it(tokenizer):
    "In train mode, with dropout in its adapters: measured without it, and still in train mode afterwards."
    model = quantize_model(model_of(tokenizer))
    add_lora(model, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"), seed=0)
    for p in trainable(model): p.data += 0.05 * torch.randn_like(p)
    scores = {"length": lambda e, a: len(a)}
    first, again = (evaluate(model.train(), tokenizer, examples(), model, scores, max_new_tokens=3) for _ in range(2))
    assert model.training and all(first[name].sums == again[name].sums for name in first.measures)
    assert max(map(abs, first["KL"].sums)) < 1e-5


def test_what_was_said_of_other_rows_is_no_reference(tokenizer):
    model, rows = model_of(tokenizer), [tokenize(tokenizer, e) for e in examples()]
    others = [tokenize(tokenizer, pair("question", "sort the list", group=str(i))) for i in range(6)]
    for other in (rows[:4], others):
        with pytest.raises(LabError, match="was said of other rows"): beside(model, rows, said(model, other))


@pytest.mark.parametrize("metric, value, wanted", [
    ("acc", 1., (1., 1)), ("acc", True, (1., 1)), ("word_perplexity", (-12., 4), (12., 4)), ("f1", (1, 1), None),
    ("byte_perplexity", (-3., 9), (3., 9)), ("bleu", ("a", "b"), None)])
def test_numbers_of_a_sample(metric, value, wanted): assert number_of(metric, value) == wanted


def test_scores_of_answers(tokenizer):
    "The function sees the example and the model's own greedy answer; yes and no stay between none and all."
    model, asked = model_of(tokenizer), examples(5)
    texts = answer(model, tokenizer, [e.prompt for e in asked], 4)
    scores = {"same": lambda e, a: a == texts[asked.index(e)], "length": lambda e, a: len(a) / 10}
    found = evaluate(model, tokenizer, asked, scores=scores, max_new_tokens=4)
    assert found["same"].sums == (1.,) * 5 and found["length"].sums == pytest.approx([len(t) / 10 for t in texts])
    value, low, high = spanned(found["same"])
    assert value == 1 and 0 < low < 1 and high == pytest.approx(1)


def test_turns_before_the_last_are_read(tokenizer):
    "A conversation is asked whole: another beginning, another answer's place."
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    seen = []
    def template(given, **how):
        seen.append(given)
        return "x"
    class Asked:
        def __call__(self, *args, **how): return tokenizer(*args, **how)
        def __getattr__(self, name): return template if name == "apply_chat_template" else getattr(tokenizer, name)
    asked = Example((*turns, {"role": "assistant", "content": "d"}))
    answered(model_of(tokenizer), Asked(), [asked], {"x": lambda *_: 1}, 2)
    assert seen == [turns]


def test_the_table(tokenizer):
    "Each value lies in its interval, whose width follows from groups: twice as many copies in a group change nothing."
    model = model_of(tokenizer)
    table = evaluate(model, tokenizer, examples(), reference=model_of(tokenizer, 1)).table()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert table.loc["perplexity", "value"] == pytest.approx(math.exp(table.loc["loss", "value"]))
    assert set(table["examples"]) == {6} and set(table["groups"]) == {3}
    once = Score((1., 2., 4.), (1, 1, 1), ("a", "b", "c"))
    twice = Score(once.sums * 2, once.tokens * 2, once.groups * 2)
    assert spanned(once) == pytest.approx(spanned(twice))


def test_in_pairs(tokenizer):
    "Two evaluations are compared example by example."
    one, other = (evaluate(model_of(tokenizer, seed), tokenizer, TEXTS) for seed in (0, 1))
    found = compare(one["loss"], other["loss"])
    assert found.difference == pytest.approx(one["loss"].loss - other["loss"].loss)


@pytest.mark.parametrize("data, how, said", [
    ([], {}, "nothing to measure on"),
    ("", {}, "nothing to measure on"),
    ("README.md", {}, "the name of a file"),
    (Path("gone.txt"), {}, "the name of a file"),
    (examples(2), {"scores": {"x": 3}}, "expected a function"),
    ("a text", {"scores": {"x": lambda *_: 1}}, "running text asks nothing"),
    (examples(2), {"scores": {"KL": lambda *_: 1}}, "measured anyway"),
    ([Example((), text="read the file")], {"scores": {"x": lambda *_: 1}}, "plain text and tools have no answer"),
])
def test_bad_input(tokenizer, data, how, said):
    with pytest.raises(LabError, match=said): evaluate(model_of(tokenizer), tokenizer, data, **how)


def test_unlike_models(tokenizer):
    with pytest.raises(LabError, match="one tokenizer and the same rows"):
        evaluate(model_of(tokenizer), tokenizer, examples(2), reference=make_llama(vocab_size=999))


def test_what_is_not_finite_and_what_was_not_measured(tokenizer):
    model = model_of(tokenizer)
    with pytest.raises(LabError, match="not measured: 'accuracy'; there are 'loss'"):
        evaluate(model, tokenizer, examples(2))["accuracy"]
    with torch.no_grad(): model.model.norm.weight[0] = float("nan")
    with pytest.raises(LabError, match="not finite on 'g0'"): evaluate(model, tokenizer, examples(2))


def test_a_split_gives_its_held_out_side(tokenizer):
    data = split([pair(f"q {i}", "join two paths", group=str(i)) for i in range(60)], 0.3)
    found = evaluate(model_of(tokenizer), tokenizer, data, examples=7)
    assert len(found["loss"].sums) == 7 and set(found["loss"].groups) <= {e.group for e in data.held_out}


def test_without_the_harness(tokenizer, monkeypatch):
    monkeypatch.setattr("qlora_lab.harness.find_spec", lambda name: None)
    with pytest.raises(LabError, match="lm-eval: pip install"): task_scores(model_of(tokenizer), tokenizer, ["a task"])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
def test_a_task_of_the_harness(tokenizer, tmp_path):
    "A file of one's own, no network; an entry a document, and a task that nobody knows."
    rows = [{"q": f"{word} the", "a": i % 2} for i, word in enumerate(("read", "close", "sort", "parse"))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"test": str(tmp_path / "t.jsonl")}}
    task = {"task": "own", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "a",
            "doc_to_choice": [" file", " sum"], "metric_list": [{"metric": "acc"}]}
    model = model_of(tokenizer)
    found = evaluate(model, tokenizer, load_examples([{"prompt": "a", "completion": "b"}]), tasks=[task])
    assert len(found["own acc"].sums) == 4 and set(found["own acc"].sums) <= {0., 1.}
    with pytest.raises(LabError, match="no task of lm-evaluation"): task_scores(model, tokenizer, ["no such task"])
    with pytest.raises(LabError, match="the token .* has the number .* has 64 rows"):
        task_scores(small := make_llama(vocab_size=64), tokenizer, [task])
    assert not small.get_input_embeddings()._forward_pre_hooks
