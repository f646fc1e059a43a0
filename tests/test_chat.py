"Talking to a run: what is opened, what is asked, what is shown, and how it is stopped."
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import make_llama, make_tokenizer
from qlora_lab import cli
from qlora_lab.adapter_sets import adapter_set
from qlora_lab.engine.decoded_once import decode_once
from qlora_lab.engine.dispatch import standing_in, use_kernels
from qlora_lab.engine.host_memory import HostMemory
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import add_lora, load_adapter, save_adapter
from qlora_lab.model import answer, load_model
from qlora_lab.open_run import base_as_held, held_as_told, open_run
from qlora_lab.records import LabError
from qlora_lab.runs import TrainConfig
from qlora_lab.talk import Pieces, Talk, chat, prompt_ids, respond
from qlora_lab.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).view(2, 12) % 300


def trained(base, data, folder, backend="lab", quantize="auto", **more):
    "A run of two steps, at a rate that shows."
    model, tokenizer = load_model(base, quantize, backend, torch.float32, device="cpu", **more)
    config = TrainConfig(folder=str(folder), steps=2, lr=0.05, rank=4, dropout=0.2, eval_examples=2, eval_prompts=1)
    return train(model, tokenizer, data, config, progress=False)


def talkative(seed=1, **other): return make_llama(seed=seed, tie=False, **other)  # others say nothing after two steps


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    "A folder with a model whose answers are not empty."
    folder = tmp_path_factory.mktemp("models") / "base"
    talkative().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    trained(base, data, folder)
    return folder


@torch.no_grad()
def logits(model): return model(input_ids=IDS).logits


# -- opening a run

@pytest.mark.parametrize("backend, how", [
    ("lab", dict(quantize="fp4", blocksize=128, double_quant=False)), ("lab", dict(quantize=None)), ("lab", dict()),
    ("bnb", dict(quantize="nf4", double_quant=False)), ("bnb", dict(quantize=None))])
def test_a_run_opens_as_it_was_trained(backend, how, base, data, tmp_path):
    "Both backends, in 4 bits and not: kind, dtypes and logits, without dropout; the base alone is another."
    trained(base, data, tmp_path / "run", backend, **how)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record.pop("base")["mark"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))  # as earlier versions wrote it
    with pytest.warns(UserWarning, match="does not say") if backend == "bnb" and how["quantize"] else nothing():
        model, tokenizer, run = open_run(tmp_path / "run", device="cpu")
    plain, _ = load_model(base, backend=backend, compute_dtype=torch.float32, device="cpu", **how)
    assert base_as_held(model)["held"] == base_as_held(plain)["held"]
    before = logits(plain)
    theirs = getattr(plain, "is_loaded_in_4bit", False)
    if theirs:
        from peft import PeftModel
        again = PeftModel.from_pretrained(plain.train(), tmp_path / "run" / "adapter")
        again.train()
        for m in again.modules():
            if isinstance(m, torch.nn.Dropout): m.eval()
    else: again = load_adapter(plain, tmp_path / "run" / "adapter").eval()
    assert torch.equal(logits(model), logits(again)) and not torch.allclose(logits(model), before, atol=1e-3)
    assert not any(p.requires_grad for p in model.parameters()) and len(run.losses) == 2
    assert any(not m.training for m in model.modules()) and tokenizer.chat_template


def nothing():
    from contextlib import nullcontext
    return nullcontext()


def test_the_base_alone_and_another_adapter(run, base, tmp_path):
    model = add_lora(quantize_model(talkative()), LoraConfig(r=2, init_lora_weights=False), seed=3)
    save_adapter(model, tmp_path / "other")
    alone, _, _ = open_run(run, None, "cpu")
    assert torch.equal(logits(alone), logits(load_model(base, compute_dtype=torch.float32, device="cpu")[0]))
    other, _, _ = open_run(run, tmp_path / "other", "cpu")
    assert not torch.allclose(logits(other), logits(open_run(run, device="cpu")[0]), atol=1e-3)


def record_of(run, out, change):
    "A copy of a run with its record changed."
    shutil.copytree(run, out)
    record = change(json.loads((run / "run.json").read_text()))
    (out / "run.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return out


@pytest.mark.parametrize("change, said", [
    (lambda r: r | {"state": "running"}, "this run is not done"),
    (lambda r: json.dumps(r)[:50], "not valid JSON"),
    (lambda r: [r], "expected a JSON object"),
    (lambda r: {"state": "done"}, "says nothing of the model"),
    (lambda r: r | {"identity": r["identity"] | {"model": "/nowhere/model"}}, "its base '/nowhere/model' is not there"),
    (lambda r: r | {"identity": r["identity"] | {"quantization": "Linear4bit(8, 8, nf4, blocksize=64)"}},
     "is another model than it was"),
    (lambda r: r | {"base": {"held": {"quantize": "nf4"}, "mark": "0" * 16}}, "its weights are not those")])
def test_a_run_that_cannot_be_opened_says_why(change, said, run, tmp_path):
    with pytest.raises(LabError, match=re.escape(said)): open_run(record_of(run, tmp_path / "x", change), device="cpu")


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(LabError, match="no run here"): open_run(tmp_path / "gone")


@pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:run.json does not say")
@pytest.mark.parametrize("backend", ["lab", "bnb"])
def test_another_base_is_noticed(backend, data, base, tmp_path):
    "By its mark where the record has one, and by its shapes where not; files may be cut otherwise."
    here = shutil.copytree(base, tmp_path / "base")
    trained(here, data, tmp_path / "run", backend)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["base"] = base_as_held(load_model(here, backend=backend, device="cpu")[0])
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    talkative().save_pretrained(here, max_shard_size="100KB")
    (here / "model.safetensors").unlink()
    expected = logits(open_run(tmp_path / "run", device="cpu")[0])
    shutil.move(here, tmp_path / "moved")
    with pytest.raises(LabError, match="is not there as it was"): open_run(tmp_path / "run", device="cpu")
    moved = open_run(tmp_path / "run", device="cpu", name=tmp_path / "moved")[0]
    assert torch.equal(logits(moved), expected)
    talkative(seed=2).save_pretrained(here)
    shutil.copy(base / "tokenizer.json", here)
    with pytest.raises(LabError, match="its weights are not those"): open_run(tmp_path / "run", device="cpu")
    del record["base"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    shutil.rmtree(here)
    talkative(hidden=32).save_pretrained(here)
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(base / name, here)
    with pytest.raises(LabError): open_run(tmp_path / "run", device="cpu")


@pytest.mark.filterwarnings("ignore:run.json does not say")
def test_an_adapter_that_lost_a_tensor_is_refused_by_both(data, base, tmp_path):
    "PEFT alone would warn and go on with fresh numbers."
    for backend in ("lab", "bnb"):
        trained(base, data, tmp_path / backend, backend)
        file = tmp_path / backend / "adapter" / "adapter_model.safetensors"
        save_file(dict(sorted(load_file(file).items())[1:]), file)
        with pytest.raises(LabError, match="missing in the file|disagree"): open_run(tmp_path / backend, device="cpu")
        file.unlink()
        with pytest.raises(LabError, match="no such file"): open_run(tmp_path / backend, device="cpu")


def test_what_older_records_tell():
    "A base of experts alone has no layer to show, but a bill; bitsandbytes' type is in the command."
    identity = {"backend": "bnb", "dtype": "torch.float32", "compute_dtype": "torch.float16"}
    def told(**other): return held_as_told({"identity": identity | {"quantization": other.pop("said", None)}} | other)
    packed = {"memory": {"4-bit codes": [64, 1, 1], "quantization statistics": [2, 0, 0]}}
    assert told(**packed)["quantize"] == "auto" and told()["quantize"] is None
    fp4 = told(said="Linear4bit(in_features=4, out_features=4, bias=False)", **packed,
               provenance={"command": "qlora-lab train --backend bnb --quantize fp4"})
    assert fp4 == {"dtype": torch.float32, "compute_dtype": torch.float16, "backend": "bnb", "quantize": "fp4"}


# -- a conversation

@pytest.fixture(scope="module")
def adapters(tokenizer, tmp_path_factory):
    made, place = adapter_set(quantize_model(make_llama(max_position_embeddings=120))), tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("a", "b")):
        model = add_lora(make_llama(), LoraConfig(r=4, init_lora_weights=False), seed=seed)
        made.load_adapter(save_adapter(model, place / name), name)
    return made


def test_turns_are_answered_as_if_read_anew(adapters, tokenizer):
    "With what was read before kept, for each speaker, through stops, resets and switches."
    talk = Talk(adapters, tokenizer, "Be brief.", max_new_tokens=5)
    for text, who in [("read the file", "a"), ("sort the list", "a"), ("join two paths", "base"), ("again", "a")]:
        talk.use(who)
        fresh = Talk(adapters, tokenizer, "Be brief.", max_new_tokens=5)
        fresh.turns, fresh.who = [*talk.turns], who
        assert talk.ask(text) == fresh.ask(text)
        assert talk.reading.kept[who][1].get_seq_length() == len(talk.reading.kept[who][0])
    assert [t["role"] for t in talk.turns] == ["system", *["user", "assistant"] * 4]
    talk.reset()
    assert [t["role"] for t in talk.turns] == ["system"]


def test_one_turn_is_what_answer_gives(adapters, tokenizer):
    with adapters.using("b") as model: expected = answer(model, tokenizer, "read the file", max_new_tokens=8)[0]
    talk = Talk(adapters, tokenizer, max_new_tokens=8)
    talk.use("b")
    assert talk.ask("read the file")["b"].strip() == expected
    both = talk.ask("and now", both=True)
    assert [*both] == ["base", "a", "b"] and talk.turns[-1]["content"] == both["b"]


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(adapters, tokenizer):
    talk, seen = Talk(adapters, tokenizer, max_new_tokens=30), []
    whole = Talk(adapters, tokenizer, max_new_tokens=30).ask("read the file")["a"]
    def stop(piece):
        seen.append(piece)
        if len(seen) == 3: raise KeyboardInterrupt
    assert talk.ask("read the file", stop, both=False)["a"] == "".join(seen[:2]).rstrip() or talk.stopped
    assert talk.stopped and whole.startswith(talk.turns[-1]["content"]) and talk.turns[-1]["content"] != whole
    fresh = Talk(adapters, tokenizer, max_new_tokens=30)
    fresh.turns = [*talk.turns]
    assert talk.ask("sort the list") == fresh.ask("sort the list") and not talk.stopped


def test_a_conversation_that_is_too_long_says_so(adapters, tokenizer):
    talk = Talk(adapters, tokenizer, max_new_tokens=100)
    talk.ask("read the file")
    with pytest.raises(LabError, match=r"the model reads 120; begin anew"): talk.ask("count the words " * 20)
    assert len(talk.turns) == 2
    talk.reset()
    talk.ask("read the file")


def test_sampling_differs_and_greed_does_not(adapters, tokenizer):
    torch.manual_seed(0)
    def said(t): return {Talk(adapters, tokenizer, temperature=t, max_new_tokens=8).ask("read")["a"] for _ in range(4)}
    assert len(said(2.)) > 1 and len(said(0.)) == 1


def test_pieces_add_up_and_no_command_reaches_the_terminal(tokenizer):
    "Half a character waits; an escape sequence is left out."
    for text in ("héllo – 我们 🙂\n    indented\n", "\x1b[2Jwiped\x07", ""):
        seen = []
        pieces = Pieces(tokenizer, seen.append)
        pieces.put(torch.tensor([[5, 6]]))
        for token in tokenizer(text, add_special_tokens=False).input_ids: pieces.put(torch.tensor([token]))
        pieces.end()
        assert "".join(seen) == pieces.said == re.sub(r"[\x1b\x07]", "", text).strip() and "\ufffd" not in "".join(seen)


def test_no_text_of_a_model_or_of_data_commands_the_terminal(tokenizer, monkeypatch):
    "Nor in the report of a training, in a sheet of answers, or in a sample of data; what is written may be any."
    from rich.console import Console

    from qlora_lab.commands import report
    from qlora_lab.engine.learned_text import in_colour, runs_of, underlined
    from qlora_lab.prompt_answers import AnswerSheet
    odd = "\x1b]0;title\x07 \x9b2J good\x08\x7f"
    row = {"prompt": odd, "reference": odd, "before": odd, "after": odd}
    runs = runs_of(tokenizer, ids := tokenizer(odd, add_special_tokens=False).input_ids, [True] * len(ids))
    asked = {"name": "p", "sha256": "0" * 64, "texts": [odd]}
    sheet = AnswerSheet({"prompts": asked, "columns": {odd: {"answers": [odd]}}, "asked": {}, "texts": [odd]})
    shown = [*report._answers(SimpleNamespace(record={"answers": [row]}), 80), sheet.rich(), in_colour(runs)]
    with (out := Console(file=io.StringIO(), width=200)).capture() as told: out.print(*shown)
    for text in (told.get(), underlined(runs)):
        assert "good" in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text), repr(text)


def test_without_a_template_the_prompt_stands_alone(tokenizer):
    "Behind the tokenizer's own first mark, once, and with no earlier turn."
    from tokenizers.processors import TemplateProcessing
    plain = make_tokenizer()
    plain.chat_template = None
    turns = [{"role": "user", "content": "close a socket"}, {"role": "assistant", "content": "x"},
             {"role": "user", "content": "read the file"}]
    assert plain.decode(prompt_ids(plain, turns)) == "read the file"
    plain._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)])
    assert plain.decode(prompt_ids(plain, turns)) == "<|im_start|>read the file"
    with pytest.raises(LabError, match="no place for a system text"): Talk(make_llama(), plain, "Be brief.")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(LabError, match="refuses this conversation: no system role here"): prompt_ids(tokenizer, turns)


def test_a_model_of_one_adapter_and_one_of_none(tokenizer):
    model = add_lora(quantize_model(make_llama()), LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5), seed=0)
    talk = Talk(model.train(), tokenizer, max_new_tokens=6)
    one, two = talk.ask("read the file", both=True), Talk(model, tokenizer, max_new_tokens=6).ask("read the file")
    assert [*one] == ["base", "adapter"] and one["adapter"] == two["adapter"]
    assert one["base"] == Talk(quantize_model(make_llama()), tokenizer, max_new_tokens=6).ask("read the file")["model"]


def test_the_widget_adds_nothing(adapters, tokenizer):
    "Its callback as a plain function: the answers of `respond`, markup shown as text, a mistake shown too."
    box = chat(adapters, tokenizer, max_new_tokens=4)
    html = respond(Talk(adapters, tokenizer, max_new_tokens=4), "<b>read</b>", both=True)
    box.line.value, box.both.value = "<b>read</b>", True
    box.send()
    assert box.shown.value == html and "&lt;b&gt;read" in html and html.count("<b>") == 4 and box.line.value == ""
    box.send()
    assert "the prompt is empty" in box.shown.value and len(box.talk.turns) == 2
    box.begin_anew()
    assert box.talk.turns == [] and box.shown.value == ""


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("make, settings", [(make_llama, dict()), (make_llama, dict(use_dora=True)),
                                            (lambda: families.build("mixtral"), dict(target_modules=["q_proj"]))])
def test_weights_decoded_once_change_no_bit(make, settings, kernels):
    "With plain and faster pieces, for adapters and experts; other weights and other models go the usual way."
    model = quantize_model(make())
    add_lora(model, LoraConfig(**dict(r=4, target_modules="all-linear", init_lora_weights=False) | settings), seed=0)
    expected, other, calls = logits(model.eval()), Linear4bit.from_linear(torch.nn.Linear(64, 64)), []
    ours = [m for m in model.modules() if isinstance(m, Linear4bit)]
    def counted(q, dtype, out=None): calls.append(q.packed.data_ptr())
    try:
        use_kernels(kernels)
        plain = logits(model)
        with standing_in({("dequantize", "cpu"): counted}), decode_once(model):
            seen = [logits(model) for _ in range(3)]
            for _ in range(2): other.quantized.dequantize()
    finally: use_kernels(True)
    assert all(torch.equal(plain, once) for once in seen) and torch.allclose(plain, expected, atol=1e-5)
    assert all(calls.count(m.weight.data_ptr()) == 1 for m in ours) and calls.count(other.weight.data_ptr()) == 2


def test_an_answer_decodes_each_weight_once(tokenizer):
    "Whatever the number of tokens, and anew for the next."
    model, calls = quantize_model(make_llama()), []
    talk = Talk(model, tokenizer, max_new_tokens=5)
    with standing_in({("dequantize", "cpu"): lambda q, dtype, out=None: calls.append(q.packed.data_ptr())}):
        for turn in (1, 2):
            talk.ask("read the file")
            assert len(calls) == turn * len(set(calls)) == turn * 14 and len(talk.turns) == 2 * turn


def test_weights_that_would_not_fit_are_decoded_in_each_pass(monkeypatch):
    model = quantize_model(make_llama())
    assert decode_once(model) is not None and decode_once(make_llama()) is None
    monkeypatch.setattr("qlora_lab.engine.decoded_once.host_memory", lambda: HostMemory(2000, 1000))
    assert decode_once(model) is None


# -- the command

def told(line, capsys, monkeypatch, given=""):
    "Exit code, output and error stream, with input from a pipe."
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"): monkeypatch.delenv(name, raising=False)
    code = cli.main(["chat", *line])
    return code, *capsys.readouterr()


def test_one_shot_is_the_answer_alone(run, base, capsys, monkeypatch):
    short = ["--max-new-tokens", "6", "--device", "cpu"]
    model, tokenizer, _ = open_run(run, device="cpu")
    expected = answer(model, tokenizer, "read the file", max_new_tokens=6)[0]
    code, out, err = told([str(run), "--prompt", "read the file", *short], capsys, monkeypatch)
    assert (code, out.strip(), err) == (0, expected, "") and expected
    assert told([str(run), "--prompt", "-", *short], capsys, monkeypatch, "read the file\n")[1] == out
    both = told([str(run), "--prompt", "read the file", "--compare", *short], capsys, monkeypatch)[1]
    alone = told([str(base), "--prompt", "read the file", *short], capsys, monkeypatch)[1]
    assert both == f"[base]\n{alone}\n[mine]\n{out}" and alone != out
    lines = "read the file\n/reset\n/base\nread the file\n/reset\n/use\n/both\nread the file\n/quit\nmore\n"
    assert told([str(run), *short], capsys, monkeypatch, lines)[1] == out + alone + both


@pytest.mark.filterwarnings("ignore:run.json does not say")
def test_a_run_of_the_other_library(base, data, tmp_path, capsys, monkeypatch):
    "bitsandbytes' layers and PEFT's adapter answer as they do without this program, side by side and in turns."
    trained(base, data, tmp_path / "run", "bnb")
    model, tokenizer, _ = open_run(tmp_path / "run", device="cpu")
    with model.disable_adapter(): alone = answer(model, tokenizer, "read the file", max_new_tokens=6)[0]
    expected = answer(model, tokenizer, "read the file", max_new_tokens=6)[0]
    short = [str(tmp_path / "run"), "--max-new-tokens", "6", "--device", "cpu", "--compare"]
    code, out, _ = told([*short, "--prompt", "read the file"], capsys, monkeypatch)
    parts = [part.strip() for part in re.split(r"^\[\w+\]$", out, flags=re.M)]
    assert code == 0 and parts == ["", re.sub(r"[\x00-\x08\x0b-\x1f]", "", alone).strip(), expected]


def test_two_adapters_by_name(run, tmp_path, capsys, monkeypatch):
    other = shutil.copytree(run / "adapter", tmp_path / "v2.other")
    line = [str(run), "--adapter", str(run / "adapter"), "--adapter", str(other), "--device", "cpu",
            "--max-new-tokens", "3", "--compare", "--prompt", "read"]
    code, out, _ = told(line, capsys, monkeypatch)
    assert code == 0 and re.findall(r"^\[(.+)\]$", out, re.M) == ["base", "mine", "v2_other"]


@pytest.mark.parametrize("words, said", [
    (["{tmp}/gone"], "no run and no model here"), (["nowhere"], "no run and no model here"),
    (["{tmp}"], "no run and no model here"), (["{undone}"], "this run is not done"),
    (["{run}", "--prompt", " "], "expected text"), (["{run}", "--max-new-tokens", "0"], "expected at least 1"),
    (["{run}", "--prompt", "hi\udcff"], "--prompt has half a character at place 3"),
    (["{run}", "--system", "hi\udcff"], "--system has half a character at place 3"),
    (["{run}", "--temperature", "-1"], "expected 0, or a positive number"),
    (["{run}", "--temperature", "nan"], "expected 0, or a positive number"),
    (["{base}", "--compare"], "has no adapter beside its base"),
    (["{run}", "--adapter", "{tmp}"], "no such file"), (["{run}", "--device", "abacus"], "expected cpu or cuda"),
    ([], "expected RUN")])
def test_a_mistake_is_one_line(words, said, run, base, tmp_path, capsys, monkeypatch):
    undone = tmp_path / "undone"
    if "{undone}" in words: record_of(run, undone, lambda r: r | {"state": "running"})
    places = dict(tmp=tmp_path, run=run, base=base, undone=undone)
    code, out, err = told([w.format(**places) for w in words], capsys, monkeypatch)
    assert (code, out) == (2, "") and err.startswith("qlora-lab: ") and err.count("\n") == 1 and said in err


def test_bytes_that_are_no_text(run, capsys, monkeypatch):
    "From a pipe they are named, in one shot and in a turn of a conversation."
    def given(more, text):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        code = cli.main(["chat", str(run), "--max-new-tokens", "2", "--device", "cpu", *more])
        return code, capsys.readouterr().err
    for more, text in ((["--prompt", "-"], b"hi\xff"), ([], b"read\nhi\xff\n")):
        code, err = given(more, text)
        assert code == 2 and "prompt has half a character at place 3" in err and err.count("\n") == 1


def test_a_conversation_outlives_a_text_that_is_none(adapters, tokenizer):
    from qlora_lab.talk import Talk
    talk = Talk(adapters, tokenizer, max_new_tokens=2)
    with pytest.raises(LabError, match="prompt has half a character"): talk.ask("hi\udcff")
    assert talk.turns == [] and talk.ask("read the file")
    with pytest.raises(LabError, match="system has half a character"): Talk(adapters, tokenizer, system="\ud800")


def test_a_slip_below_a_folder_is_not_looked_for_elsewhere(tmp_path, capsys, monkeypatch):
    "runs/mien looks like 'owner/model'; a folder of that name is here, so no library is asked."
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    monkeypatch.setattr("qlora_lab.commands.chat.load_model", lambda *a, **k: pytest.fail("asked for a model"))
    code, _, err = told(["runs/mien"], capsys, monkeypatch)
    assert code == 2 and "runs/mien: no run and no model here" in err


def read_until(fd, wanted, seconds=120, seen=""):
    "What a terminal shows until some text has come, which may arrive in pieces; `seen` came before."
    end = time.monotonic() + seconds
    while wanted not in seen:
        if not select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
            raise AssertionError(f"{wanted!r} did not come: {seen[-2000:]!r}")
        try: seen += os.read(fd, 4096).decode(errors="replace")
        except OSError: raise AssertionError(f"the program ended: {seen[-2000:]!r}") from None
    return seen


def test_in_a_terminal(run, tmp_path):
    "Commands, columns, Ctrl-C in an answer and at the prompt, Ctrl-D; the program ends with 0."
    ours, theirs = pty.openpty()
    script = ("import time; from qlora_lab import talk; from qlora_lab.cli import main\n"
              "usual = talk.Talk._generate\n"
              "def slow(self, who, turns, pieces):\n"
              "    if turns[-1]['content'] != 'slow': return usual(self, who, turns, pieces)\n"
              "    pieces.said = 'PIECE'; pieces.write('PIECE'); time.sleep(600)\n"
              "talk.Talk._generate = slow\n"
              "raise SystemExit(main())")
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    program = subprocess.Popen([sys.executable, "-c", script, "chat", str(run), "--max-new-tokens", "60", "--device",
                                "cpu"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job has it ignored
                               env=env | {"TERM": "dumb", "COLUMNS": "80", "INPUTRC": "/dev/null"})
    os.close(theirs)
    def type_in(text, wanted):
        os.write(ours, text.encode())
        return read_until(ours, wanted)
    def insisting(send, came):
        "Keys again, where they fell into the moment before the prompt listens."
        for _ in range(20):
            send()
            with suppress(AssertionError, subprocess.TimeoutExpired): return came()
        raise AssertionError("no answer to a key")
    def interrupted(wanted):
        return insisting(lambda: os.killpg(program.pid, signal.SIGINT), lambda: read_until(ours, wanted, 3))
    try:
        shown = read_until(ours, "Ctrl-D ends.")
        assert "mine answers" in shown
        read_until(ours, "> ", seen=shown.partition("Ctrl-D ends.")[2])
        assert "/both" in type_in("/help\n", "the end, as Ctrl-D")
        type_in("/base\n", "now: base")
        type_in("/nobody\n", "the end, as Ctrl-D")
        type_in("/use nobody\n", "nobody here is named 'nobody'")
        type_in("/use mine\n", "now: mine")
        type_in("/both\n", "now: all")
        shown = type_in("read the file\n", "mine")
        assert "base" in shown
        type_in("/both\n", "now: mine")
        type_in("slow\n", "PIECE")
        interrupted("(stopped)")
        interrupted("(Ctrl-D ends)")
        type_in("/reset\n", "begun anew")
        assert insisting(lambda: os.write(ours, b"\x04"), lambda: program.wait(3)) == 0
    finally:
        program.kill()
        os.close(ours)
