"""The doctor on the folders of runs, on what was exported, on the machine, and by the command line.

Runs are the lab's own on a tiny model; each fault is put into a copy of a healthy folder.
"""
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_doctor import teach

from conftest import WORDS, make_llama, make_tokenizer
from qlora_lab.assets import SMOLLM2
from qlora_lab.cli import main
from qlora_lab.commands.doctor import SMALL
from qlora_lab.data import collate, encode, pair, split
from qlora_lab.engine import export_organ, machine_organ, resume_organ
from qlora_lab.engine.examining import examine
from qlora_lab.engine.export_organ import Stage, judged, look_at_gguf, stages_of
from qlora_lab.engine.findings import KNOWN, ill, lines_of
from qlora_lab.engine.patient import Patient
from qlora_lab.engine.resume_organ import checkpoint_marks, compare_marks, look_at_resume, marks_of
from qlora_lab.engine.step_organ import look_at_run
from qlora_lab.engine.weights_organ import look_at_weights
from qlora_lab.lora import trainable
from qlora_lab.model import load_model
from qlora_lab.open_run import open_run
from qlora_lab.records import LabError
from qlora_lab.runs import Run
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, make_optimizer, train, train_step

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = [pair(f"{w} {i}", f"{WORDS[(k + 5) % 8].capitalize()}!", group=f"{w} {i}")  # the base has learned others
        for i in range(6) for k, w in enumerate(WORDS)]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    "A run that has learned something, beside its base."
    place = tmp_path_factory.mktemp("doctor")
    teach(make_llama()).save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    model, tokenizer = load_model(place / "base", compute_dtype=torch.float32, device="cpu")
    config = TrainConfig(folder=str(place / "run"), steps=24, batch_size=4, accumulation=1, rank=8, alpha=16, lr=5e-3,
                         eval_examples=8, eval_prompts=4, checkpoint_every=8, eval_every=12)
    train(model, tokenizer, split(DATA, 0.2), config, progress=False)
    return place / "run"


@pytest.fixture
def sick(healthy, tmp_path):
    "A copy, for a fault to be put in."
    shutil.copytree(healthy, tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder, change):
    "Change run.json."
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def lines(folder, change):
    "Change each line of metrics.jsonl."
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(k, row)) + "\n" for k, row in enumerate(rows)))
    return Run.load(folder)


def names(findings): return [f.name for f in findings if f.verdict != "well"]


# -- runs ------------------------------------------------------------------------------------------------------------

def test_a_healthy_run_has_no_finding(healthy):
    found = examine(healthy)
    assert found.names == [], found
    assert {f.organ for f in found.findings} == {"weights", "adapters", "data", "step", "resume"}


def test_losses_of_a_run(sick):
    assert names(look_at_run(Run.load(sick))) == []
    assert names(look_at_run(lines(sick, lambda k, r: r | {"loss": 3 + 0.01 * (k % 3)}))) == ["loss does not fall"]
    assert names(look_at_run(lines(sick, lambda k, r: r | {"loss": 3 + 0.05 * k}))) == ["loss rises"]
    assert names(look_at_run(lines(sick, lambda k, r: r | {"loss": 0.}))) == ["loss is zero"]
    worse = lines(sick, lambda k, r: r | {"loss": 3 - 0.05 * k, "held_out": 2 + 0.1 * k})
    assert names(look_at_run(worse)) == ["held-out loss rises"]
    assert names(look_at_run(lines(sick, lambda k, r: r | {"loss": float("nan")}))) == ["loss is not finite"]


def test_a_held_out_loss_that_rises_after_the_step_that_is_kept(sick):
    "Without patience steps were too many, with it none; an adapter of a later step is worse than it could be."
    run = lines(sick, lambda k, r: r | {"loss": 3 - 0.05 * k, "held_out": abs(k - 11) / 10})
    rewrite(sick, lambda r: r.update(adapter_step=12))
    found, = (f for f in look_at_run(Run.load(sick)) if f.verdict != "well")
    assert found.name == "held-out loss rises" and found.verdict == "note" and "step 12 is kept" in found.evidence
    rewrite(sick, lambda r: r.update(steps=100))
    assert names(look_at_run(Run.load(sick))) == []
    rewrite(sick, lambda r: r.update(adapter_step=len(run.metrics)))
    assert [f.name for f in look_at_run(Run.load(sick)) if f.verdict == "ill"] == ["held-out loss rises"]


def test_settings_and_results_of_a_run(sick):
    rewrite(sick, lambda r: r["config"].update(warmup=20))
    assert "warm-up never ends" in names(look_at_run(Run.load(sick)))
    rewrite(sick, lambda r: r["config"].update(warmup=5) or r.update(after=r["before"], before=r["after"]))
    assert "worse than its base" in names(look_at_run(Run.load(sick)))


# -- resume ----------------------------------------------------------------------------------------------------------

def state_of(folder):
    path = folder / "checkpoint" / "state.safetensors"
    with safe_open(path, "pt") as f: return path, f.metadata(), {k: f.get_tensor(k) for k in f.keys()}


@pytest.mark.parametrize("part, name", [("optimizer.", "optimizer was dropped"), ("adapter.", "adapter was dropped")])
def test_a_checkpoint_without_what_it_should_hold(sick, part, name):
    path, told, tensors = state_of(sick)
    save_file({k: t * 0 if k.startswith(part) else t for k, t in tensors.items()}, path, told)
    assert name in names(look_at_resume(Run.load(sick)))


def test_a_checkpoint_that_is_cut_short(sick):
    path = sick / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "no whole checkpoint" in names(look_at_resume(Run.load(sick)))


def test_lines_that_a_checkpoint_counts_on(sick):
    (sick / "metrics.jsonl").write_text("")
    assert "no whole checkpoint" in names(look_at_resume(Run.load(sick)))


def test_a_trained_run_whose_lines_are_lost(sick):
    "Its adapter has been trained, as run.json tells, and was not changed before."
    (sick / "metrics.jsonl").unlink()
    shutil.rmtree(sick / "checkpoint")
    assert examine(sick, organs=["step"]).names == []


def test_an_adapter_of_another_run(sick):
    path = sick / "adapter" / "adapter_model.safetensors"
    with safe_open(path, "pt") as f: tensors = {k: f.get_tensor(k) * 1.01 for k in f.keys()}
    save_file(tensors, path)
    assert names(look_at_resume(Run.load(sick))) == ["not the run's adapter", "altered files"]
    assert "not the run's adapter" in examine(sick).names  # and its model is not opened


def test_another_base_under_the_same_name(sick, tmp_path):
    make_llama(seed=1).save_pretrained(tmp_path / "other")
    rewrite(sick, lambda r: r["identity"].update(model=str(tmp_path / "other")))
    assert "another base" in names(look_at_resume(Run.load(sick)))


def test_a_base_that_is_not_found_is_not_another(sick):
    "A run of a relative path, from another folder: its base was not looked at."
    rewrite(sick, lambda r: r["identity"].update(model="not/here"))
    found, = (f for f in look_at_resume(Run.load(sick)) if f.name == "another base")
    assert found.verdict == "note" and "not looked at" in found.evidence and "not/here" in found.evidence


def test_other_data_than_the_runs(healthy):
    assert "another order of data" in examine(healthy, data=split(DATA[:30], 0.2), organs=["resume"]).names
    assert examine(healthy, data=split(DATA, 0.2), organs=["resume"]).names == []


def test_a_resume_before_and_after():
    "What another trainer may lose, one at a time; and what the lab brings back, all of it."
    tokenizer, config = make_tokenizer(), TrainConfig(rank=4, batch_size=4, accumulation=1)
    rows = encode(tokenizer, DATA)
    lengths = [len(r.ids) for r in rows]
    def fresh():
        from qlora_lab.linear4bit import quantize_model
        model = attach_adapters(quantize_model(make_llama()), config).train()
        return model, make_optimizer(model, config)
    model, optimizer = fresh()
    for _ in range(3): train_step(model, optimizer, [collate(rows[:4])], 1e-3, 0.3)
    before = marks_of(model, optimizer, lengths, config, 3)
    assert names(compare_marks(before, marks_of(model, optimizer, lengths, config, 3))) == []
    again, anew = fresh()
    assert names(compare_marks(before, marks_of(again, anew, lengths, config, 0))) == [
        "adapter was dropped", "optimizer was dropped", "another order of data"]
    assert names(compare_marks(before, marks_of(model, anew, lengths, config, 3))) == ["optimizer was dropped"]


def test_a_live_resume_without_a_checkpoint(sick):
    now = checkpoint_marks(sick)
    assert names(look_at_resume(Run.load(sick), now)) == []
    shutil.rmtree(sick / "checkpoint")
    assert "no whole checkpoint" not in names(look_at_resume(Run.load(sick)))
    assert "no whole checkpoint" in names(look_at_resume(Run.load(sick), now))


def test_a_checkpoint_is_read_once(healthy, monkeypatch):
    opened, real = [], resume_organ.read_state
    monkeypatch.setattr(resume_organ, "read_state", lambda path: opened.append(path) or real(path))
    assert names(look_at_resume(Run.load(healthy), checkpoint_marks(healthy))) == [] and len(opened) == 2  # one is ours


def test_a_live_resume_from_a_folder(healthy):
    model, tokenizer = load_model(healthy.parent / "base", compute_dtype=torch.float32, device="cpu")
    model = attach_adapters(model, TrainConfig(rank=8, alpha=16)).train()
    now = marks_of(model, make_optimizer(model, TrainConfig(rank=8)))
    found = names(look_at_resume(Run.load(healthy), now))
    assert found == ["adapter was dropped", "optimizer was dropped"] and checkpoint_marks(healthy).keys() == now.keys()


# -- export ----------------------------------------------------------------------------------------------------------

def test_a_chain_that_holds_to_16_bits(healthy):
    found = examine(healthy, organs=["export"], gguf="F32")
    stages = [f for f in found.findings if f.organ == "export"]
    told = {f.name: f.verdict for f in stages}
    four = "breaks at 4 bits" if "breaks at 4 bits" in told else "4-bit"  # as tiny a model as this may break there
    assert told == {"merged": "well", four: "ill" if four != "4-bit" else "well", "GGUF": "well",
                    "template and end mark": "well"}


def test_the_stages_that_break():
    def said(*stages): return names(judged(0.4, [Stage(n, kl, 0.1) for n, kl in stages]))
    assert said(("merged", 0.001), ("4-bit", 0.1), ("GGUF", 0.1)) == []
    assert said(("merged", 0.3), ("4-bit", 0.3)) == ["breaks at the merge"]
    assert said(("merged", 0.3), ("GGUF", 0.3)) == ["breaks at the merge"]  # which is made of it
    assert said(("merged", 0.001), ("4-bit", 0.3), ("GGUF", 0.001)) == ["breaks at 4 bits"]
    assert said(("merged", 0.001), ("4-bit", 0.3), ("GGUF", 0.3)) == ["breaks at 4 bits", "breaks in the GGUF"]
    assert said(("merged", 0.001), ("GGUF", float("nan"))) == ["breaks in the GGUF"]


def test_a_base_that_was_changed_with_its_adapter_is_no_measure(healthy, monkeypatch):
    "Then 0.02 nats are allowed, where half of a large KL would be."
    stages = [Stage("merged", 0.03, 0.1)]
    assert names(judged(0.4, stages)) == [] and names(judged(None, stages)) == ["breaks at the merge"]
    model, tokenizer, _ = open_run(healthy, device="cpu")
    rows = encode(tokenizer, DATA[:4])
    assert stages_of(model, rows, {})[0] > 0 and stages_of(model, rows, {}, TrainConfig(init="pissa"))[0] is None


def test_stages_are_opened_where_the_model_is(healthy, monkeypatch):
    "A card beside it is no reason to take that, and its 16 bits."
    model, tokenizer, _ = open_run(healthy, device="cpu")
    asked, real = [], export_organ.load_model

    def noted(*args, **how):
        asked.append(how["device"])
        return real(*args, **how)

    monkeypatch.setattr(export_organ, "load_model", noted)
    assert stages_of(model, encode(tokenizer, DATA[:2]), {"merged": healthy.parent / "base"})[1]
    assert asked == [torch.device("cpu")]


def test_an_export_that_cannot_be_looked_at(healthy, merged, tmp_path, monkeypatch):
    "Refused before anything is opened."
    from qlora_lab.engine import examining
    monkeypatch.setattr(examining, "open_run", lambda *_, **__: pytest.fail("opened"))
    def refused(match, **options):
        with pytest.raises(LabError, match=match): examine(healthy, **options)
    refused("there is no 'gguf'; expected some of merged, 4-bit, GGUF", stages={"gguf": merged})
    refused("either its type", stages={"merged": merged}, gguf="Q8_0")
    refused("none.gguf: no such file", stages={"GGUF": "none.gguf"})
    refused("name it in organs=", stages={"merged": merged}, organs=["weights"])
    for organ in ("machine", "checkpointing"): refused(f"'{organ}': not asked of a run", organs=[organ])
    monkeypatch.setattr(Run, "whole", True)
    refused("trained all weights", organs=["export"])


@pytest.fixture(scope="module")
def merged(healthy):
    "The run's model, merged, in a folder."
    from qlora_lab.merged_model import save_merged
    from qlora_lab.ship import merge
    model, tokenizer, _ = open_run(healthy, device="cpu")
    return save_merged(merge(model), healthy.parent / "merged", tokenizer)


def test_a_merge_of_another_adapter(healthy, merged, tmp_path):
    "The folder that is served holds the base without what was learned."
    assert examine(healthy, organs=["export"], stages={"merged": merged}).names == []
    shutil.copytree(healthy.parent / "base", tmp_path / "plain")
    assert "breaks at the merge" in examine(healthy, organs=["export"], stages={"merged": tmp_path / "plain"}).names


def test_a_gguf_that_lost_its_template(healthy, merged, tmp_path):
    from qlora_lab.engine.gguf_files import to_gguf
    tokenizer = make_tokenizer()
    file = to_gguf(merged, "F32", tmp_path / "whole")
    assert names(look_at_gguf(file, tokenizer)) == []
    tokenizer.chat_template, tokenizer.eos_token = tokenizer.chat_template + " ", "<|im_start|>"
    assert names(look_at_gguf(file, tokenizer)) == ["another template", "another end mark"]
    bare = make_tokenizer()
    assert names(look_at_gguf(file, bare)) == []
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:200])
    with pytest.raises(LabError, match="not a whole GGUF"): look_at_gguf(tmp_path / "half.gguf", bare)


def test_numbers_of_a_gguf_that_changed(healthy, merged, tmp_path, monkeypatch):
    "The file in a block format whose rows were written in another order."
    from qlora_lab.engine import gguf_files
    real = gguf_files.packed
    monkeypatch.setattr(gguf_files, "packed", lambda w, kind, name: real(
        w[::-1].copy() if "blk" in name and w.ndim == 2 else w, kind, name))
    file = gguf_files.to_gguf(merged, "Q8_0", tmp_path / "odd")
    assert "breaks in the GGUF" in examine(healthy, organs=["export"], stages={"merged": merged, "GGUF": file}).names


# -- bitsandbytes' repacking -----------------------------------------------------------------------------------------

def test_weights_that_bitsandbytes_has_repacked(healthy):
    model, _ = load_model(healthy.parent / "base", backend="bnb", device="cpu")
    assert names(look_at_weights(Patient(model))) == []
    layer = next(m for m in model.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None)
    layer.weight.quant_state.packing_format_for_cpu = True  # what its forward in eval mode leaves on some CPUs
    assert names(look_at_weights(Patient(model))) == ["repacked"]


# -- the machine -----------------------------------------------------------------------------------------------------

def test_the_machine(monkeypatch, tmp_path):
    from collections import namedtuple
    from types import SimpleNamespace as Some

    from qlora_lab.threads import Choice
    monkeypatch.setattr(machine_organ, "available", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine_organ, "choose", lambda: Choice("active", "the machine was free"))
    assert machine_organ._threads(0.1).verdict == "well" and machine_organ._threads(2.).name == "threads spin"
    monkeypatch.setattr(machine_organ, "choose", lambda: Choice("passive", "others are at work"))
    assert machine_organ._threads(2.).verdict == "well" and machine_organ._threads(3.8).name == "a busy machine"
    here = tmp_path, tmp_path / "of no process"
    assert names(machine_organ._limits(*here)) == []
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1048576\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # a number for each level, as OpenMP allows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert names(machine_organ._limits(*here)) == ["fewer cores than it seems", "memory is limited"]
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine_organ.cores_allowed(*here) is None
    sensor = namedtuple("Sensor", "label current high critical")
    assert machine_organ._hot({"cpu": [sensor("", 60., 95., 100.)]}) is None
    assert "97 °C" in machine_organ._hot({"cpu": [sensor("", 97., 95., 100.)]})
    monkeypatch.setattr(machine_organ.psutil, "sensors_temperatures", lambda: {"c": [sensor("", 99., 95., None)]},
                        raising=False)
    assert names(machine_organ._heat()) == ["too hot"]
    monkeypatch.setattr(machine_organ.psutil, "swap_memory", lambda: Some(used=2 ** 32))
    monkeypatch.setattr(machine_organ.psutil, "virtual_memory", lambda: Some(available=1, total=2 ** 34))
    assert names(machine_organ._swap()) == ["swapping"]


def test_tools_that_are_there_and_broken(monkeypatch):
    from qlora_lab.engine import dispatch
    monkeypatch.setattr(machine_organ.shutil, "which", lambda c: c)
    monkeypatch.setattr(machine_organ, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_found", lambda place: lambda: "it makes no code")
    assert names(machine_organ._broken()) == ["a broken compiler", "a broken Triton"]
    monkeypatch.setattr(dispatch, "_found", lambda place: lambda: None)
    assert machine_organ._broken() == []


# -- the command -----------------------------------------------------------------------------------------------------

def doctor(capsys, *argv):
    code = main(["doctor", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_run_by_the_command(healthy, sick, capsys):
    code, text, _ = doctor(capsys, healthy)
    assert code == 0 and "Nothing is ill." in text and "ILL" not in text
    code, told, _ = doctor(capsys, healthy, "--json")
    told = json.loads(told)
    assert code == 0 and told["well"] and told["kind"] == "run" and {"organ", "name"} <= told["findings"][0].keys()
    rewrite(sick, lambda r: r["config"].update(warmup=1000))
    code, text, _ = doctor(capsys, sick)
    assert code == 1 and re.search("step +ILL +warm-up never ends", text) and KNOWN["warm-up never ends"].cure in text


def test_a_model_by_the_command(healthy, capsys, tmp_path):
    base, out = healthy.parent / "base", tmp_path / "mine.jsonl"
    out.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in DATA[:8]))
    code, text, _ = doctor(capsys, base, "--data", out)
    assert code == 0 and "4-bit" not in text.splitlines()[0] and "ms a pass" in text and "^^^" in text
    code, text, _ = doctor(capsys, base, "--quantize", "none")
    assert code == 0 and "none in 4 bits" in text


def test_data_by_the_command(healthy, capsys, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": e.prompt, "completion": e.answer} for e in DATA]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = healthy.parent / "base"
    assert doctor(capsys, file, "--model", base)[0] == 0
    code, text, _ = doctor(capsys, file, "--model", base, "--max-length", 12, "--held-out", "none")
    assert code == 1 and "too long" in text
    file.write_text("".join(json.dumps(r) + "\n" for r in rows + rows))
    code, told, _ = doctor(capsys, file, "--model", base, "--json")
    assert code == 1 and "the same again" in {f["name"] for f in json.loads(told)["findings"]}


@pytest.mark.parametrize("words, said", [
    (["--data", "x.jsonl"], "--data: means nothing for this machine, it is for MODEL or RUN"),
    (["base", "--max-length", "3"], "--max-length: means nothing for MODEL, it is for DATA"),
    (["base", "--gguf", "Q8_0"], "--gguf: means nothing for MODEL, it is for RUN"),
    (["base", "--model", "mine"], "--model: means nothing for MODEL, it is for DATA"),
    (["run", "--quantize", "none"], "--quantize: means nothing for RUN, it is for MODEL"),
    (["run", "--held-out", "0.2"], "--held-out: means nothing for RUN, it is for DATA"),
    (["run/run.json", "--export"], "--export: means nothing for DATA, it is for RUN"),
    (["run/run.json", "--data", "x.jsonl"], "--data: means nothing for DATA, it is for MODEL or RUN")])
def test_an_option_that_means_nothing(healthy, capsys, words, said):
    "Dropped in silence, it would seem to have been looked at."
    words = [str(healthy.parent / w) if w.split("/")[0] in ("base", "run") else w for w in words]
    code, out, err = doctor(capsys, *words)
    assert (code, out) == (2, "") and said in err


def test_what_is_none_of_the_three(capsys, tmp_path):
    code, _, err = doctor(capsys, tmp_path)
    assert code == 2 and "config.json" in err and "Traceback" not in err
    with pytest.raises(LabError, match="expected a model"): examine(3)
    with pytest.raises(LabError, match="organs='heart'"): examine(make_llama(), organs=["heart"])
    with pytest.raises(LabError, match="tokenizer"): examine(split(DATA, 0.2))
    assert SMALL == SMOLLM2


def test_a_finding_in_words():
    assert all(len(line) <= 80 for name in KNOWN for line in lines_of(ill(name, "seen " * 30)))


def test_the_optimizer_that_is_made_too_early(healthy):
    "Its parameters are no longer those of the model: steps are taken, and nothing moves."
    model, tokenizer = load_model(healthy.parent / "base", compute_dtype=torch.float32, device="cpu")
    early = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    model, rows = attach_adapters(model, TrainConfig(rank=4)).train(), encode(tokenizer, DATA[:4])
    for _ in range(2): train_step(model, early, [collate(rows)], 1e-3, 0.3)
    assert all(p.grad is not None for p in trainable(model))
    assert examine(model, tokenizer, data=rows, steps=2, organs=["adapters"]).names == ["still zero"]
