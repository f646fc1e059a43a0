"Edges that a small change to the code would move: found by `python -m benchmarks.mutation`, which nothing had noticed."
import math
from contextlib import nullcontext
from dataclasses import FrozenInstanceError

import pytest
import torch

from conftest import make_llama, make_tokenizer
from qlora_lab import rates
from qlora_lab.admission import Kind
from qlora_lab.batches import batch_indices
from qlora_lab.data import Example, Split, collate, docstring_pairs, encode, pair, split, tokenize
from qlora_lab.evaluate import evaluate
from qlora_lab.linear4bit import quantize_model
from qlora_lab.loading import choice_of
from qlora_lab.model import answer, perplexity
from qlora_lab.rates import adapter_groups, as_decided, make_optimizer, steps_of
from qlora_lab.records import LabError
from qlora_lab.scoring import Score
from qlora_lab.settings import TrainConfig
from qlora_lab.talk import Talk
from qlora_lab.train import attach_adapters, train

pytestmark = pytest.mark.usefixtures("one_thread")


def long_pair(tokenizer, tokens):
    "A pair of exactly so many tokens, and one token longer ones for longer texts."
    for n in range(1, 2000):
        e = pair("x" * n, "yes", source=f"mine:{n}")
        if len(tokenize(tokenizer, e, 10**6).ids) == tokens: return e
    raise AssertionError("no such length")


def test_a_docstring_of_the_longest_length_is_taken(tmp_path):
    line = "Count the words of a text."
    (tmp_path / "a.py").write_text(f'def count(text): "{line}"\n')
    assert len(docstring_pairs(tmp_path, longest=len(line))) == 1
    with pytest.raises(LabError): split(docstring_pairs(tmp_path, longest=len(line) - 1), 0.5)


@pytest.mark.parametrize("how", [{}, {"longest": 512}])
def test_as_many_tokens_as_allowed_and_one_more(how, tokenizer):
    "512 where nothing is said."
    whole = long_pair(tokenizer, 512)
    more = pair(whole.prompt + "x", "yes", source="mine:9")
    assert len(tokenize(tokenizer, whole, **how).ids) == len(encode(tokenizer, [whole], **how)[0].ids) == 512
    for read in (lambda: tokenize(tokenizer, more, **how), lambda: encode(tokenizer, [more], **how)):
        with pytest.raises(LabError, match="mine:9: 513 tokens, longer than 512"): read()


def test_what_becomes_of_longer_ones(tokenizer):
    "Truncated, where a learned token is left; or dropped; the line counts both, and a row of the length is not longer."
    whole, said = long_pair(tokenizer, 40), []
    asks = pair("x" * 60, "yes")                  # its answer lies behind the 40th token
    answers = pair("x", "yes " * 60)              # its begins before
    rows = [whole, asks, answers, short := pair("x", "yes")]
    kept = encode(tokenizer, rows, 40, "truncate", "rows", said.append)
    assert [r.example for r in kept] == [whole, answers, short] and [len(r.ids) for r in kept[:2]] == [40, 40]
    assert said == ["rows: 2 of 4 longer than 40 tokens, 1 truncated and 1 dropped"]
    kept = encode(tokenizer, rows, 40, "drop", "rows", said.append)
    assert [r.example for r in kept] == [whole, short]
    assert said[1:] == ["rows: 2 of 4 longer than 40 tokens, 0 truncated and 2 dropped"]
    with pytest.raises(LabError, match="long='cut': expected"): encode(tokenizer, rows, 40, "cut")
    with pytest.raises(LabError, match="all 1 examples are longer"):
        encode(tokenizer, [asks], 40, "drop", say=said.append)


def test_a_row_is_of_the_example_it_was_made_from(tokenizer):
    "Itself, group and all, not a copy of its turns."
    e = pair("a", "b", group="g", source="mine:1")
    assert tokenize(tokenizer, e).example is e and encode(tokenizer, [e])[0].example is e


def test_an_example_and_its_tokens_stay_as_they_were_made(tokenizer):
    "They are shared by splits, rows and runs."
    example = pair("Which?", "This.")
    for made, field in ((example, "group"), (tokenize(tokenizer, example), "mask"), (Split([example], []), "train")):
        with pytest.raises(FrozenInstanceError): setattr(made, field, None)


def test_a_batch_is_filled_up_with_0(tokenizer):
    "Where nothing else is said; no label and no attention there."
    batch = collate([tokenize(tokenizer, pair("x", answer)) for answer in ("yes", "yes, and no, and yes")])
    behind = batch["attention_mask"][0] == 0
    assert behind.any() and (batch["input_ids"][0][behind] == 0).all() and (batch["labels"][0][behind] == -100).all()


def test_the_answer_is_the_last_turn():
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    assert Example(tuple(turns)).answer == "turn 3" and Example(tuple(turns)).prompt == "turn 2"


def test_a_tenth_is_held_out_where_nothing_is_said():
    rows = [pair(f"q {i}", "a") for i in range(300)]
    assert split(rows) == split(rows, 0.1, 0) != split(rows, 0.11)
    with pytest.raises(LabError, match="1 examples in 1 groups leave one side of the split empty"): split(rows[:1])


def test_the_order_of_seed_0_where_nothing_is_said():
    lengths = [5 + i % 7 for i in range(40)]
    assert batch_indices(lengths, 4, 3) == batch_indices(lengths, 4, 3, 0) != batch_indices(lengths, 4, 3, 1)


def test_the_order_of_batches_stands():
    "Of any seed, in the first pass and the second, as runs of earlier versions had it: they go on with it."
    lengths = [5 + i % 7 for i in range(40)]
    made = [batch_indices(lengths, 4, step, seed) for step, seed in ((3, 0), (3, 1), (13, 1))]
    assert made == [[4, 11, 39, 5], [38, 10, 4, 6], [0, 28, 22, 3]]


def test_the_error_of_groups_by_hand():
    "The ratio estimator: residuals are added up within a group, however many it has."
    sums, tokens, groups = (1., 4., 2., 6., 3.), (1, 2, 1, 3, 1), ("a", "a", "a", "b", "b")
    m = sum(sums) / sum(tokens)
    a = sum(s - m * t for s, t, g in zip(sums, tokens, groups) if g == "a")
    b = sum(s - m * t for s, t, g in zip(sums, tokens, groups) if g == "b")
    assert math.isclose(Score(sums, tokens, groups).stderr, (2 * (a * a + b * b)) ** 0.5 / sum(tokens))


@pytest.mark.parametrize("examples, size, steps", [(1, 4, 1), (3, 4, 1), (8, 4, 1), (12, 4, 2)])
def test_a_run_of_epochs_takes_a_step_at_least(examples, size, steps):
    assert steps_of(TrainConfig(epochs=1., batch_size=size, accumulation=2), examples) == steps


def test_how_many_steps_epochs_are_is_said(capsys):
    config, said = as_decided(TrainConfig(epochs=2., batch_size=2, accumulation=2), make_llama(), [0] * 10)
    assert capsys.readouterr().out == "steps   5: 2 passes over 10 examples\n"
    assert (config.steps, config.epochs, said) == (5, 0., {"steps": 5})


def test_one_rate_is_one_group_and_a_budget_is_in_mib(monkeypatch):
    "With a ratio of 1 an optimizer is given plain parameters; a budget of 3 MiB is 3 << 20 bytes, and 0 is none."
    model = attach_adapters(quantize_model(make_llama()), TrainConfig(rank=2))
    assert all(isinstance(p, torch.nn.Parameter) for p in adapter_groups(model, TrainConfig(rank=2)))
    two = adapter_groups(model, TrainConfig(rank=2, loraplus_ratio=2., lr=1e-3))
    assert [(g["lr"], g["initial_lr"]) for g in two] == [(1e-3, 1e-3), (2e-3, 2e-3)]
    asked = []
    monkeypatch.setattr(rates, "faster", lambda operation, device, *args: asked.append(args) or "made")
    for mib in (3, 0): assert make_optimizer(model, TrainConfig(rank=2, device_budget=mib)) == "made"
    assert [args[-1] for args in asked] == [3 << 20, None]


TEXT = "say <new> again"


@pytest.mark.parametrize("use", [
    lambda m, t, to: train(m, t, Split([pair(f"{TEXT} {i}", "yes") for i in range(4)], [pair("no", "no")]),
                           TrainConfig(folder=str(to), steps=1, batch_size=2, rank=2, eval_prompts=0), progress=False),
    lambda m, t, to: train(m, t, Split([pair(f"say {i}", "yes") for i in range(4)], [pair(TEXT, "no")]),
                           TrainConfig(folder=str(to), steps=1, batch_size=2, rank=2, eval_prompts=0), progress=False),
    lambda m, t, to: answer(m, t, ["say", TEXT], max_new_tokens=1),
    lambda m, t, to: perplexity(m, t, TEXT),
    lambda m, t, to: evaluate(m, t, TEXT + "\n"),
    lambda m, t, to: evaluate(m, t, [pair(TEXT, "yes")]),
    lambda m, t, to: Talk(m, t, max_new_tokens=1).ask(TEXT),
    lambda m, t, to: choice_of(m, t, Kind("nf4", 64, True), torch.device("cpu"), scales="chosen", calibration=[TEXT]),
], ids=["train", "held out", "answer", "perplexity", "evaluate text", "evaluate", "talk", "calibration"])
@pytest.mark.parametrize("more", [0, 1], ids=["the last row", "one more"])
def test_the_last_token_that_the_model_has_a_row_for(more, use, tmp_path):
    "A tokenizer was given tokens that the model was not: harmless until a text has one of them."
    model, tokenizer = make_llama(), make_tokenizer()
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<filler{i}>" for i in range(rows - 1 - len(tokenizer) + more)])
    tokenizer.add_tokens(["<new>", "<unused>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == rows - 1 + more
    told = rf"'<new>' has the number {rows}, .* has {rows} rows; .*embeddings\({rows + 2}\)"
    with pytest.raises(LabError, match=told) if more else nullcontext(): use(model, tokenizer, tmp_path / "run")


def test_the_cure_of_a_token_without_a_row():
    "The call that the message names is enough, on a model in 4 bits too."
    model, tokenizer = quantize_model(make_llama()), make_tokenizer()
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<{i}>" for i in range(rows + 1 - len(tokenizer))])
    with pytest.raises(LabError): perplexity(model, tokenizer, f"say <{rows - len(make_tokenizer())}>")
    model.resize_token_embeddings(len(tokenizer))
    assert perplexity(model, tokenizer, f"say <{rows - len(make_tokenizer())}>") > 1
