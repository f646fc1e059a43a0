"""Several processes, one run: the steps, the bytes and the files of one process, and what may not differ."""
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from several import several
from torch import nn

from qlora_lab import cli
from qlora_lab.checkpoints import saved_step
from qlora_lab.commands import training
from qlora_lab.data import collate, encode
from qlora_lab.dealing import dealt, learned
from qlora_lab.lora import add_lora, trainable
from qlora_lab.methods import hash_of
from qlora_lab.model import load_model
from qlora_lab.nonfinite import first_odd
from qlora_lab.processes import all_say, by_first, rank, sum_gradients, world
from qlora_lab.records import LabError
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, score, summed_loss, train

lesson = import_module("qlora_lab.train")
SHORT = dict(steps=20, batch_size=3, accumulation=2, rank=4, eval_examples=8, eval_prompts=1, lr=2e-3, eval_every=10)


@pytest.fixture(scope="module")
def group():
    with several() as run: yield run


def trained(tiny, data, folder, stop=None, **settings):
    "Train, in however many processes; what each of them has afterwards."
    backend = settings.pop("backend", "lab")
    model, tokenizer = load_model(tiny, backend=backend, compute_dtype=torch.float32, device="cpu")
    config = TrainConfig(folder=str(folder), **SHORT | settings)
    if stop:
        class Ends:
            def on_start(self, outset): pass
            def on_step(self, row):
                if row["step"] == stop: raise KeyboardInterrupt
            def on_evaluation(self, row): pass
            def on_end(self, run): pass
        try: train(model, tokenizer, data, config, progress=False, watchers=[Ends()])
        except KeyboardInterrupt: return "ended"
    made = train(model, tokenizer, data, config, progress=False)
    return {"losses": made.losses, "held": made.held_out, "before": made.before.loss, "after": made.after.loss,
            "adapter": hash_of(trainable(model)), "world": world(), "answers": made.record["answers"]}


@pytest.fixture(scope="module")
def alone(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return trained(tiny, data, folder), load_file(folder / "adapter" / "adapter_model.safetensors")


def close(made, alone, folder, within=1e-5):
    "Losses of one process, and its adapter within the rounding of float32."
    assert max(abs(a - b) for a, b in zip(made["losses"], alone[0]["losses"], strict=True)) < within
    assert abs(made["before"] - alone[0]["before"]) < 1e-5 and abs(made["after"] - alone[0]["after"]) < 1e-4
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == alone[1].keys()
    assert all(torch.allclose(adapter[k], alone[1][k], atol=1e-3) for k in adapter)


@pytest.mark.parametrize("count", [2, 3])
def test_several_take_the_steps_of_one(count, group, alone, tiny, data, tmp_path):
    "Losses of 20 steps within 1e-5 in float32; all end with the same bytes; each line and file is written once."
    made = group(count, trained, tiny, data, tmp_path / "run")
    assert {m["world"] for m in made} == {count} and all(m == made[0] for m in made)
    close(made[0], alone, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "done"
    assert not list((tmp_path / "run").glob(".*"))  # no lock, nothing half


def test_going_on_with_another_number_of_processes(group, alone, tiny, data, tmp_path):
    "Two begin, one goes on, three end it: the run of one."
    folder, how = tmp_path / "run", dict(checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt): group(2, cut_short, tiny, data, folder, 6, how)
    trained(tiny, data, folder, stop=11, **how)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 11
    made = group(3, trained, tiny, data, folder, None)
    close(made[0], alone, folder)


def cut_short(tiny, data, folder, stop, how):
    "All processes end after a step, as by a signal."
    def ends(*args, real=lesson.one_step):
        if args[-1] == stop: raise KeyboardInterrupt
        return real(*args)
    with patch.object(lesson, "one_step", ends): return trained(tiny, data, folder, **how)


@pytest.mark.parametrize("how", [dict(packing=True), dict(checkpointing=True), dict(pass_size=1),
                                 dict(optimizer_bits=8, device_budget=1), dict(method="dora")],
                         ids=lambda how: next(iter(how)))
def test_with_other_settings(how, group, tiny, data, tmp_path):
    made = group(2, with_settings, tiny, data, tmp_path / "two", how | {"steps": 6})
    one = trained(tiny, data, tmp_path / "one", **how | {"steps": 6})
    assert made[0] == made[1]
    assert max(abs(a - b) for a, b in zip(made[0]["losses"], one["losses"], strict=True)) < 2e-5


def with_settings(tiny, data, folder, how): return trained(tiny, data, folder, **how)


@pytest.mark.parametrize("how", [dict(), dict(packing=True, checkpointing=True), dict(offload=True, backend="bnb")],
                         ids=["whole", "packed", "bitsandbytes"])
def test_a_shared_base_takes_the_steps_of_one(how, group, alone, tiny, data, tmp_path):
    "Parts of the base in each process; the losses, the adapter, the answers of one that has it all."
    steps = {} if not how else {"steps": 5}
    made = group(2, with_settings, tiny, data, tmp_path / "two", how | steps | {"sharding": "full"})
    here = {k: v for k, v in how.items() if k != "offload"} | steps
    one = alone[0] if not how else trained(tiny, data, tmp_path / "one", **here)
    assert made[0] == made[1] and made[0]["answers"] == one["answers"]
    assert max(abs(a - b) for a, b in zip(made[0]["losses"], one["losses"], strict=True)) < 1e-5
    if not how: close(made[0], alone, tmp_path / "two")


def test_a_base_is_shared_by_several(tiny, data, tmp_path):
    with pytest.raises(LabError, match="nobody to share the base with"):
        trained(tiny, data, tmp_path / "run", sharding="full")
    for odd in (dict(offload=True), dict(sharding="full", method="full"), dict(sharding="full", merge_aware=3),
                dict(sharding="full", init="loftq"), dict(sharding="full", budget="2GiB")):
        with pytest.raises(LabError, match="sharding='full'"): TrainConfig(**odd)


def test_shares_that_do_not_divide(group, tiny, data, tmp_path):
    "One sentence, in all processes."
    with pytest.raises(LabError, match="3 processes cannot share 4 examples a step equally .* take a multiple of 3"):
        group(3, with_settings, tiny, data, tmp_path / "run", dict(batch_size=2, accumulation=2))


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
ACCELERATE = "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"  # on a CPU it needs mpirun


def launched(tmp_path, what, *words, launcher=TORCHRUN, cards=False):
    "Exit code, output and what is said of errors, by two processes of a launcher; on the CPU, or on cards."
    start = [sys.executable, *launcher, *what]
    env = {k: v for k, v in os.environ.items() if k != "QLORA_LAB_DEBUG"} | {"OMP_NUM_THREADS": "1"}
    if not cards: env["CUDA_VISIBLE_DEVICES"] = ""
    start += map(str, words)
    done = subprocess.run(start, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("qlora-lab")]


LAB = "-m", "qlora_lab"


def options(tiny, jsonl, out):
    return ["train", "--data", jsonl, "--model", tiny, "--out", out, "--steps", "3", "--rank", "4",
            "--eval-examples", "4", "--eval-prompts", "1", "--compute-dtype", "float32"]


def test_the_same_command_in_each_process(tiny, jsonl, tmp_path, capsys):
    "One voice, one run; the finished run is shown again by one process alone."
    code, out, said = launched(tmp_path, LAB, *options(tiny, jsonl, "run"), "--sharding", "full")
    assert code == 0 and out.count("model   ") == 1 and out.count("Held-out loss") == 1 and "by 2 processes" in out, out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "done"
    assert cli.main([str(w) for w in options(tiny, jsonl, tmp_path / "run")]) == 0
    def told(text): return text[text.index("Held-out loss"):text.index("What next")]
    assert told(capsys.readouterr().out.replace(f"{tmp_path}/", "")) == told(out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_cards_by_the_command(tiny, jsonl, tmp_path, launcher, sharding):
    "Either launcher, the base whole or spread: the losses of one card."
    assert cli.main([str(w) for w in options(tiny, jsonl, tmp_path / "one")]) == 0
    code, out, said = launched(tmp_path, LAB, *options(tiny, jsonl, "two"), "--sharding", sharding, launcher=launcher,
                               cards=True)
    assert code == 0 and "by 2 processes" in out, (out, said)
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    assert len(two) == 3 and two == pytest.approx(one, rel=2e-3)


DIES = """
import os, sys
from unittest.mock import patch
from importlib import import_module
from qlora_lab import cli
lesson = import_module("qlora_lab.train")
def at(*args, real=lesson.one_step):
    if args[-1] == 6 and os.environ["RANK"] == sys.argv[1]: raise RuntimeError("something of this process alone")
    return real(*args)
with patch.object(lesson, "one_step", at): raise SystemExit(cli.main(sys.argv[2:]))
"""


def test_one_that_dies_ends_all(tiny, jsonl, tmp_path):
    "Within seconds, its own message first, the last checkpoint whole."
    (tmp_path / "dies.py").write_text(DIES)
    words = [*options(tiny, jsonl, "run"), "--steps", "9", "--checkpoint-every", "2"]
    code, _, said = launched(tmp_path, ["dies.py", "1"], *words)
    assert code and "something of this process alone" in said[0], said
    assert len(said) == 1 or "another process ended" in said[1]
    assert saved_step(tmp_path / "run") == 6 and first_odd(load_file(
        tmp_path / "run" / "checkpoint" / "state.safetensors").items()) is None


def test_a_mistake_is_said_once(tiny, jsonl, tmp_path):
    code, _, said = launched(tmp_path, LAB, *options(tiny, jsonl, "run"), "--batch-size", "3", "--accumulation", "1")
    assert code and len(said) == 1 and "2 processes cannot share 3 examples" in said[0], said


class Odd(Exception):
    "An error that other processes may not know."
    def __init__(self, one, two): super().__init__(f"{one} {two}")


def of_one_alone(tiny, data):
    "What the first process may do by itself, and how its error comes to all."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    held = encode(tokenizer, data.held_out[:3], 256, "refuse", say=lambda line: None)
    alone = score(model, held).loss if rank() == 0 else None  # as a watcher would: the others go on
    def fails(): raise Odd("not", "known")
    try: by_first(fails)
    except (LabError, Odd) as e: return by_first(lambda: alone), score(model, held, in_turns=True).loss, str(e)


def test_what_one_does_alone_and_what_all_do(group, tiny, data):
    (alone, shared, said), other = group(2, of_one_alone, tiny, data)
    assert (alone, shared) == other[:2] and alone == pytest.approx(shared, abs=1e-5)
    assert (said, other[2]) == ("not known", "Odd: not known")


def test_a_base_for_cards_is_opened_in_host_memory_as_a_card_would_hold_it(monkeypatch):
    "The types are those of the card, the place is not; without sharing it is the card."
    seen = []
    monkeypatch.setattr("qlora_lab.commands.planning.best_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(training, "load_model", lambda *args, **how: seen.append((*args[3:], how["device"].type)))
    for sharding in ("full", "none"):
        training._open_model(training.Train(training=training.RunOptions(sharding=sharding)), torch.device("cuda"))
    assert seen == [(torch.bfloat16, torch.bfloat16, "cpu"), (None, None, "cuda")]


def by_torch(tiny, data):
    "One step's gradients by DistributedDataParallel and by the lab's sum."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    config = TrainConfig(**SHORT)
    model = attach_adapters(model, config).train()
    learn = encode(tokenizer, data.train[:6], 256, "refuse", say=lambda line: None)
    chosen, lengths = [[0, 1, 2], [3, 4, 5]], [len(t.ids) for t in learn]
    batches = [collate([learn[i] for i in some]) for some in dealt(chosen, lengths, 3)]
    total = learned(learn, chosen)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, batch): return summed_loss(self.model, batch) / total

    parallel = nn.parallel.DistributedDataParallel(Loss())
    for batch in batches: parallel(batch).backward()
    theirs = [p.grad * world() for p in trainable(model)]  # it takes the mean over processes
    model.zero_grad()
    for batch in batches: (summed_loss(model, batch) / total).backward()
    sum_gradients(trainable(model))
    return max((a - p.grad).abs().max().item() for a, p in zip(theirs, trainable(model)))


def test_gradients_are_those_of_distributed_data_parallel(group, tiny, data):
    assert max(group(2, by_torch, tiny, data)) < 1e-6


def said():
    "Where all say so, where one does not; and gradients that only one process has."
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    if rank() == 1: p.grad = torch.ones(2)
    sum_gradients([p, q])
    return all_say(True), all_say(rank() == 1), p.grad.tolist(), q.grad


def test_what_all_say(group):
    assert group(2, said) == [(True, False, [1., 1.], None)] * 2 and all_say(True) and not all_say(False)


def differing(tiny, data, folder, what):
    "The second process has something else."
    config, other = TrainConfig(folder=str(folder), **SHORT), what if rank() == 1 else None
    if other == "seed": config = replace(config, seed=1)
    def other_base(model): return {"held": {}, "mark": "of another file"}
    if other == "data": data = replace(data, train=data.train[1:])
    def old(): return {"torch": "1.0"}
    def by_chance(model, lora, seed, dtype): return add_lora(model, lora, 7, dtype)
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    with ExitStack() as changed:
        if other == "versions": changed.enter_context(patch("qlora_lab.same_run.versions", old))
        if other == "base": changed.enter_context(patch("qlora_lab.same_run.base_as_held", other_base))
        if other == "adapters": changed.enter_context(patch.object(lesson, "add_lora", by_chance))
        try: train(model, tokenizer, data, config, progress=False)
        except LabError as e: return str(e)


@pytest.mark.parametrize(("what", "named"), [
    ("seed", "another seed (1) than process 0 (0)"), ("data", "another data"), ("versions", "another versions"),
    ("base", "another base"), ("adapters", "hash of what learns")])
def test_what_differs_is_refused_before_the_first_step(what, named, group, tiny, data, tmp_path):
    "By all processes, in one sentence; nothing is written."
    said = group(2, differing, tiny, data, tmp_path / "run", what)
    assert said[0] == said[1] and named in said[0] and "process 1" in said[0]
    assert not (tmp_path / "run" / "run.json").exists()
