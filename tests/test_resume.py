"""Killed at any moment, the same command goes on and ends with the very adapter that an uninterrupted run makes.

The runs are the console script's own `main`, in processes that are killed with SIGKILL: nothing can tidy up.
"""
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import pytest
from safetensors import safe_open
from several import forking

STEPS = 24


def command(jsonl, tiny, out, *more):
    return ["train", "--data", str(jsonl), "--model", str(tiny), "--out", str(out), "--steps", str(STEPS),
            "--checkpoint-every", "3", "--rank", "4", "--dropout", "0.1", "--eval-examples", "4", "--eval-prompts", "1",
            "--compute-dtype", "float32", "--held-out", "0.2", *more]


def process(argv, log, kill_at=None):
    """Run the console script; `kill_at` (n, when) ends it for good at its n-th file, before or after the file takes its
    name."""
    with open(log, "w") as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    sys.argv = ["qlora-lab", *argv]
    # what is started in the background ignores Ctrl-C, and so do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if kill_at:
        replace, n = os.replace, [0]
        def deadly(*args):
            n[0] += 1
            if kill_at == (n[0], "before"): os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
            if kill_at == (n[0], "after"): os.kill(os.getpid(), signal.SIGKILL)
        os.replace = deadly
    from qlora_lab.cli import main
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)


def start(argv, log, kill_at=None):
    p = forking().Process(target=process, args=(argv, str(log), kill_at))
    p.start()
    return p


def assert_whole(folder):
    "Every file that has its name is whole, whatever the moment."
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir(): continue
        if path.suffix == ".json": json.loads(path.read_text())
        elif path.suffix == ".jsonl": [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as f: [f.get_tensor(k) for k in f.keys()]
        else: assert path.suffix == ".md", path


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny, jsonl):
    "An uninterrupted run: its adapter, its record, its command's output, and how long it took."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    start(["--version"], folder.parent / "warm").join()  # the server of the processes starts with the first one
    began = time.perf_counter()
    p = start(command(jsonl, tiny, folder), folder.parent / "log")
    p.join()
    assert p.exitcode == 0, (folder.parent / "log").read_text()
    return folder, time.perf_counter() - began


def adapter(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "adapter").iterdir())
            if p.suffix in (".json", ".safetensors")}


def assert_same_end(folder, whole):
    assert adapter(folder) == adapter(whole)
    a, b = (json.loads((f / "run.json").read_text()) for f in (folder, whole))
    assert a["state"] == "done" and a["before"] == b["before"] and a["after"] == b["after"]
    assert a["answers"] == b["answers"]
    a, b = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole))
    def timeless(rows): return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert timeless(a) == timeless(b) and len(a) == STEPS


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed, whole_run, tiny, jsonl, tmp_path):
    """At a seeded step and a moment after it, again and again until a run gets through; one time in four within the
    first moments."""
    (whole, seconds), folder = whole_run, tmp_path / "run"
    r, kills, metrics = random.Random(seed), 0, folder / "metrics.jsonl"
    while True:
        p, more = start(command(jsonl, tiny, folder), tmp_path / "log"), r.randrange(1, 9)
        target = min((len(metrics.read_text().splitlines()) if metrics.exists() else 0) + more, STEPS)
        if kills % 4 == 3: p.join(r.uniform(0, 0.3) * seconds)
        else:
            while p.exitcode is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= target):
                time.sleep(0.002)
            p.join(r.uniform(0, 0.1))
        if p.exitcode is not None or kills == 12: break
        p.kill()
        p.join()
        kills += 1
        assert_whole(folder)
    p.join()
    assert p.exitcode == 0, (tmp_path / "log").read_text()
    assert kills > 0
    assert_same_end(folder, whole)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_file(when, whole_run, tiny, jsonl, tmp_path):
    """At each file that a run writes in turn, just before or just after it takes its name; the next run is killed two
    files further on."""
    whole, _ = whole_run
    folder, kills = tmp_path / "run", 0
    for n in (1, 2, 3, 2, 4, 3, 3, 4, 5, 4, 3, 2, 99):
        p = start(command(jsonl, tiny, folder), tmp_path / "log", (n, when))
        p.join()
        assert_whole(folder)
        if p.exitcode != -signal.SIGKILL: break
        kills += 1
    assert p.exitcode == 0, (tmp_path / "log").read_text()
    assert kills >= 4
    assert_same_end(folder, whole)


MEASURED = ("--eval-every", "2", "--schedule", "cosine", "--warmup", "0.1", "--loraplus-ratio", "4", "--lr", "1e-2")

def test_killed_while_it_measures_and_keeps_the_best(tiny, jsonl, tmp_path):
    """Held-out losses on the way, the best adapter, a schedule, two rates: killed at a file and at a moment after a
    measurement, the same command ends with the same bytes."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    first = start(command(jsonl, tiny, whole, *MEASURED), tmp_path / "whole.log")
    p = start(command(jsonl, tiny, folder, *MEASURED), tmp_path / "log", (5, "after"))
    p.join()
    assert p.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert_whole(folder)
    p, metrics = start(command(jsonl, tiny, folder, *MEASURED), tmp_path / "log"), folder / "metrics.jsonl"
    while p.exitcode is None and '"step": 14' not in metrics.read_text(): time.sleep(0.002)
    p.kill()
    p.join()
    start(command(jsonl, tiny, folder, *MEASURED), tmp_path / "log").join()
    first.join()
    assert_same_end(folder, whole)
    told = [json.loads((f / "run.json").read_text())["best"] for f in (folder, whole)]
    assert told[0] == told[1] and "every 2 steps, the best adapter is kept" in (tmp_path / "log").read_text()
    assert {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()} == {
        p.name: p.read_bytes() for p in (whole / "checkpoint").iterdir()}


def test_the_same_command_twice_at_once(tiny, jsonl, tmp_path):
    "The second is refused with exit code 2 and one line; the first, killed, leaves the folder free."
    from qlora_lab.locks import check_free
    folder = tmp_path / "run"
    first = start(command(jsonl, tiny, folder, "--steps", "5000"), tmp_path / "log")
    while first.exitcode is None and not (folder / "checkpoint").exists(): time.sleep(0.01)
    second = start(command(jsonl, tiny, folder, "--steps", "5000"), tmp_path / "second")
    second.join()
    said = (tmp_path / "second").read_text()
    assert second.exitcode == 2 and said.count("\n") == 1 and f"process {first.pid}" in said, said
    first.kill()
    first.join()
    assert_whole(folder)
    check_free(folder)


def test_the_command_says_where_it_goes_on(whole_run, tiny, jsonl, tmp_path):
    """Killed after its fourth file, the second checkpoint, a run says 'from step 6'; finished, it shows its report
    again and changes nothing."""
    folder = tmp_path / "run"
    start(command(jsonl, tiny, folder), tmp_path / "log", (4, "after")).join()
    start(command(jsonl, tiny, folder), tmp_path / "log").join()
    said = (tmp_path / "log").read_text()
    assert f"Going on from step 6 of {STEPS}." in said and "Held-out loss" in said
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    start(command(jsonl, tiny, folder), tmp_path / "again").join()
    again = (tmp_path / "again").read_text()
    assert "This run is done" in again and again[again.index("Held-out loss"):] == said[said.index("Held-out loss"):]
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert not re.search("Traceback|Warning|gemm_4bit|\\[transformers\\]", said)


def test_interrupted_by_the_user(whole_run, tiny, jsonl, tmp_path):
    "Ctrl-C: exit code 130, a word about going on, no traceback."
    folder, log = tmp_path / "run", tmp_path / "log"
    p = start(command(jsonl, tiny, folder) + ["--steps", "5000"], log)
    checkpoint = folder / "checkpoint" / "state.safetensors"
    for _ in range(3000):
        if checkpoint.exists() or p.exitcode is not None: break
        time.sleep(0.1)
    os.kill(p.pid, signal.SIGINT)
    p.join(60)
    if p.exitcode is None: p.kill()
    said = log.read_text()
    assert p.exitcode == 130 and "the same command goes on from step" in said and "Traceback" not in said
    assert_whole(folder)


def test_a_metrics_line_cut_short_is_no_obstacle(whole_run, tiny, jsonl, tmp_path):
    "A power cut, unlike a kill, can leave half a line at the end of metrics.jsonl."
    folder = tmp_path / "run"
    start(command(jsonl, tiny, folder), tmp_path / "log", (5, "after")).join()
    with open(folder / "metrics.jsonl", "a") as f: f.write('{"step": 99, "lo')
    p = start(command(jsonl, tiny, folder), tmp_path / "log")
    p.join()
    assert p.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_end(folder, whole_run[0])


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    "Whichever is gone, the file is named, and neither model nor optimizer is changed."
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file
    from torch import nn

    from qlora_lab.checkpoints import load_checkpoint, save_checkpoint, saved_step
    from qlora_lab.engine.paged_adamw import PagedAdamW
    from qlora_lab.lora import add_lora, lora_state, trainable
    from qlora_lab.records import LabError

    def fresh(seed, steps):
        torch.manual_seed(seed)
        model = add_lora(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), seed=seed)
        optimizer = PagedAdamW(trainable(model))
        for _ in range(steps):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        return model, optimizer
    save_checkpoint(tmp_path, *fresh(0, 3), 3)
    path = tmp_path / "checkpoint" / "state.safetensors"
    whole = load_file(path)
    model, optimizer = fresh(1, 1)
    before = {k: v.clone() for k, v in lora_state(model).items()}
    assert len({name.partition(".")[0] for name in whole}) == 2 and len(whole) > 4
    for gone in whole:
        save_file({k: v for k, v in whole.items() if k != gone}, path, {"step": "3"})
        with pytest.raises(LabError, match="state.safetensors: not a whole checkpoint"):
            load_checkpoint(tmp_path, model, optimizer)
    save_file(whole, path, {"step": "three"})
    with pytest.raises(LabError, match="not a whole checkpoint"): load_checkpoint(tmp_path, model, optimizer)
    assert saved_step(tmp_path) == 0 and all(torch.equal(v, before[k]) for k, v in lora_state(model).items())
    save_file(whole, path, {"step": "3"})
    assert load_checkpoint(tmp_path, model, optimizer) == saved_step(tmp_path) == 3


@pytest.fixture
def cut_short(tiny, data, tmp_path):
    "A run that was stopped in its third step, the folder of its base, and the call that goes on with it."
    import torch

    from qlora_lab.model import load_model
    from qlora_lab.settings import TrainConfig
    from qlora_lab.train import train
    from qlora_lab.watching import Watcher
    class Stop(Watcher):
        def on_step(self, row):
            if row["step"] == 3: raise KeyboardInterrupt
    folder, base = tmp_path / "run", shutil.copytree(tiny, tmp_path / "base")
    config = TrainConfig(folder=str(folder), steps=4, batch_size=4, accumulation=1, rank=2, checkpoint_every=2,
                         eval_examples=4, eval_prompts=1)
    def call(*watchers):
        model, tokenizer = load_model(base, compute_dtype=torch.float32, device="cpu")
        return train(model, tokenizer, data, config, False, watchers)
    with pytest.raises(KeyboardInterrupt): call(Stop())
    return folder, base, call


def other_template(base):
    file = base / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "### "))


def other_tokenizer(base):
    told = json.loads((base / "tokenizer.json").read_text())
    told["model"]["merges"].clear()
    (base / "tokenizer.json").write_text(json.dumps(told))


def without(folder, part):
    "run.json as a version wrote it that did not know of a part."
    record = json.loads((folder / "run.json").read_text())
    del record[part]
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("change", [other_template, other_tokenizer])
def test_the_same_examples_in_other_tokens_are_refused(change, cut_short):
    "Nothing of the run is touched; a record that is older than the hashes of tokens goes on as ever."
    from qlora_lab.records import LabError
    folder, base, call = cut_short
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    change(base)
    with pytest.raises(LabError, match="the tokens of data are others .* tokenizer or its chat template"): call()
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    without(folder, "tokens")
    assert call().record["state"] == "done"


def reconfigured(base, **settings):
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(told | settings))


@pytest.mark.parametrize("settings, said", [
    (dict(rms_norm_eps=0.5), "rms_norm_eps was 1e-06, now 0.5"), (dict(hidden_act="relu"), "hidden_act was 'silu'"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 17.}), "rope_parameters.rope_theta was 10000.0")])
def test_a_base_that_computes_otherwise_is_refused(settings, said, cut_short):
    "On resume, and by the doctor; a record that is older than this goes on as ever."
    from qlora_lab.engine.resume_organ import look_at_resume
    from qlora_lab.records import LabError
    from qlora_lab.runs import Run
    folder, base, call = cut_short
    reconfigured(base, **settings)
    with pytest.raises(LabError, match=f"not the base that it was begun with: its config.json .* {said}"): call()
    found = [f for f in look_at_resume(Run.load(folder)) if f.verdict == "ill"]
    assert [f.name for f in found] == ["another base"] and said in str(found[0])
    record = json.loads((folder / "run.json").read_text())
    del record["base"]["config"]
    (folder / "run.json").write_text(json.dumps(record))
    assert call().record["state"] == "done"


def test_a_base_that_was_written_again_is_the_same(cut_short):
    "By transformers, with other notes and settings of generation: nothing of it changes the numbers."
    from transformers import AutoModelForCausalLM

    from qlora_lab.engine.resume_organ import look_at_resume
    from qlora_lab.runs import Run
    folder, base, call = cut_short
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    reconfigured(base, transformers_version="4.40.0", torch_dtype="float32", use_cache=False, unsloth_version="1",
                 _name_or_path="elsewhere", eos_token_id=[1, 2], _attn_implementation="eager")
    assert call().record["state"] == "done"
    assert not [f for f in look_at_resume(Run.load(folder)) if f.name == "another base"]
