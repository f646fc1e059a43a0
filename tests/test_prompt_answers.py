"Answers of several runs side by side: kept with the hashes of prompts and adapters, and never beside other prompts'."
import json
import shutil

import pytest

from conftest import make_llama
from qlora_lab.adapter_sets import adapter_set, compare_answers
from qlora_lab.open_run import open_run
from qlora_lab.prompt_answers import ask_runs, changed, read_prompts, read_sheet
from qlora_lab.records import LabError
from qlora_lab.sweeping import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = dict(steps=2, batch_size=4, accumulation=1, eval_examples=4, dtype="float32", rank=2)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tokenizer, jsonl, one_thread):
    work = tmp_path_factory.mktemp("asked")
    make_llama(layers=1, hidden=64).save_pretrained(work / "small")
    tokenizer.save_pretrained(work / "small")
    grid = SHORT | {"model": str(work / "small"), "data": str(jsonl)}
    return sweep([grid | {"lr": [1e-1, 1e-3]}, grid | {"quant_type": "none"}], work / "s", progress=False)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("read the file\n\nsort the list\n")
    return path


def count(asked):
    "An asker that counts whom it asks."
    from qlora_lab.model import answer
    def ask(model, tokenizer, texts, **how):
        asked.append(len(texts))
        return answer(model, tokenizer, texts, **how)
    return ask


def test_side_by_side_and_kept(swept, prompts, tmp_path):
    "The answers are those of an adapter set; what was asked with the same bytes is not asked again."
    asked, file = [], tmp_path / "answers.json"
    two = list(swept["folder"][:2])
    sheet = ask_runs(two, prompts, file, max_new_tokens=5, ask=count(asked), device="cpu")
    model, tokenizer, _ = open_run(two[0], None, "cpu")
    adapters = adapter_set(model)
    for i, folder in enumerate(two): adapters.load_adapter(f"{folder}/adapter", f"a{i}")
    wanted = compare_answers(adapters, tokenizer, list(read_prompts(prompts).texts), max_new_tokens=5)
    found = sheet.table[["lr=0.1", "lr=0.001", "base"]]
    assert found.to_numpy().tolist() == wanted[["a0", "a1", "base"]].to_numpy().tolist()
    assert len(asked) == 3 and read_sheet(file).record == sheet.record
    again = ask_runs(two, prompts, file, max_new_tokens=5, ask=count(asked), device="cpu")
    assert len(asked) == 3 and again.record == sheet.record
    assert "lr=0.1" in sheet._repr_html_() and sheet.rich().row_count == 2


def test_a_prompt_file_that_changed(swept, prompts, tmp_path):
    "Refused in one message, and the file stays as it was; in a file of its own it is put beside the first."
    first, runs = tmp_path / "one.json", {"run": swept["folder"][0]}
    ask_runs(runs, prompts, first, max_new_tokens=4)
    before = first.read_bytes()
    prompts.write_text("read the file\nsort the lists\n")
    with pytest.raises(LabError, match="prompts.txt changed since .*one.json was made"):
        ask_runs(runs, prompts, first, max_new_tokens=4)
    assert first.read_bytes() == before
    ask_runs(runs, prompts, tmp_path / "two.json", max_new_tokens=4)
    found = changed(first, tmp_path / "two.json")
    assert set(found["prompt after"]) == {"sort the lists"} and set(found["run"]) == {"run", "base"}


def test_an_adapter_that_changed_is_asked_anew(swept, prompts, tmp_path):
    "Its old answers stay beside the new ones, under the hash of the bytes that gave them."
    run = tmp_path / "run"
    shutil.copytree(swept["folder"][0], run)
    file, asked = tmp_path / "answers.json", []
    first = ask_runs({"mine": run}, prompts, file, max_new_tokens=4, ask=count(asked))
    shutil.copy(f"{swept['folder'][1]}/adapter/adapter_model.safetensors", run / "adapter")
    second = ask_runs({"mine": run}, prompts, file, max_new_tokens=4, ask=count(asked))
    old = f"mine ({first.record['columns']['mine']['sha256'][:8]})"
    assert set(second.record["columns"]) == {old, "mine", "base"} and len(asked) == 3
    assert second.record["columns"][old] == first.record["columns"]["mine"]


def test_another_base_is_asked_for_itself(swept, prompts, tmp_path):
    "In the same file too: answers of the base that was there first stay, under the hash of how it was held."
    file, asked = tmp_path / "answers.json", []
    first = ask_runs([swept["folder"][0]], prompts, file, max_new_tokens=4, ask=count(asked))
    second = ask_runs([swept["folder"][2]], prompts, file, max_new_tokens=4, ask=count(asked))
    old = first.record["columns"]["base"]
    kept = f"base ({old['sha256'][:8]})"
    assert second.record["columns"][kept] == old and second.record["columns"]["base"]["sha256"] != old["sha256"]
    assert len(asked) == 4 and "base alone" in str(second) and f"{kept} alone" in str(second)


def test_runs_on_several_bases(swept, prompts, tmp_path):
    "Each base is asked for itself."
    sheet = ask_runs(swept["folder"], prompts, tmp_path / "a.json", max_new_tokens=3)
    assert len(sheet.record["columns"]) == 5 and sum("base of" in n for n in sheet.record["columns"]) == 2


@pytest.mark.parametrize(("name", "text", "told"), [
    ("p.txt", "\n \n", "no prompts"), ("p.txt", "a\na\n", "twice"),
    ("p.jsonl", '{"text": "a"}\n', 'expected {"prompt"'), ("p.jsonl", '{"prompt": "a"\n', "p.jsonl"),
    ("p.jsonl", '{"prompt": "a \\udcff"}\n', "p.jsonl:1: prompt has half a character"),
    ("none.txt", None, "no such file")])
def test_prompts_that_are_none(tmp_path, name, text, told):
    if text is not None: (tmp_path / name).write_text(text)
    with pytest.raises(LabError, match=told): read_prompts(tmp_path / name)


def test_other_mistakes(swept, prompts, tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(LabError, match="no sheet of answers"): read_sheet(tmp_path / "odd.json")
    with pytest.raises(LabError, match="no runs"): ask_runs([], prompts)
    with pytest.raises(LabError, match="columns of their own"): ask_runs({"base": swept["folder"][0]}, prompts)
    file = tmp_path / "answers.json"
    ask_runs({"run": swept["folder"][0]}, prompts, file, max_new_tokens=2)
    with pytest.raises(LabError, match="max_new_tokens"): ask_runs({"run": swept["folder"][0]}, prompts, file)
